"""`python -m lora_export` is `lora-export`."""

from lora_export.cli import main

main()
