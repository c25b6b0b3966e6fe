"""Ways to show a certificate, one file each.

A report is a module with one function: render(certificate) -> str.
"""

from lora_export import registry
from lora_export.records import Certificate


def names() -> tuple[str, ...]:
    """Return the known reports: the files of this folder."""
    return registry.names(__name__)


def render(name: str, certificate: Certificate) -> str:
    """Return `certificate` as the report `name` shows it."""
    text: str = registry.load(__name__, name).render(certificate)
    return text
