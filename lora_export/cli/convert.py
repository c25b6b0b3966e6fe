"""The command `convert`."""

import json
from pathlib import Path
from typing import Any

import click

from lora_export.cli import _shared


@click.command("convert", short_help="Write an adapter in another format, or normalised.")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="What to write.")
@click.option(
    "--to",
    "format",
    type=click.Choice(["peft", "native"]),
    default="peft",
    show_default=True,
    help="PEFT's directory, or one safetensors file.",
)
@click.option(
    "--normalise",
    is_flag=True,
    help="Multiply scales, patterns and rsLoRA into B, so that any loader reads it right.",
)
@_shared.reading_options
@_shared.overwrite_option
@_shared.json_option
def command(
    adapter: Path,
    out: Path,
    format: str,
    normalise: bool,
    overwrite: bool,
    as_json: bool,
    adapter_format: str | None,
    **options: Any,
) -> None:
    """Write an adapter as PEFT or this project would, without changing what it computes.

    \b
    lora-export convert sst2.safetensors --out sst2-peft
    lora-export convert peft_dir --out plain --normalise
    """
    from lora_export import conversion
    from lora_export.records import Reading

    written = conversion.convert(
        adapter,
        out,
        format=format,
        normalise=normalise,
        overwrite=overwrite,
        adapter_format=adapter_format,
        reading=Reading(**options),
    )
    facts = {
        "written": str(out),
        "format": format,
        "variant": written.variant,
        "low-rank modules": len(written.modules),
        "tensors stored whole": len(written.replaced),
        "notes": list(written.notes),
    }
    if as_json:
        click.echo(json.dumps({"schema": 1, "ok": True, **facts}))
        return
    _shared.print_table(("", ""), [(name, value) for name, value in facts.items() if value])
