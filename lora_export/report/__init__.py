"""Ways to show a certificate, one file each.

A report is a module with one function: render(certificate, evidence) -> str. Plots are drawn from
the evidence; where there is none, evidence is None.
"""

from lora_export import registry
from lora_export.records import Certificate, Evidence
from lora_export.report._wording import reasons as reasons
from lora_export.report._wording import verdicts as verdicts


def names() -> tuple[str, ...]:
    """Return the known reports: the files of this folder."""
    return registry.names(__name__)


def render(name: str, certificate: Certificate, evidence: Evidence | None = None) -> str:
    """Return `certificate`, and `evidence` where the report has plots, as the report `name`.

    Raises:
        InputError: there is no such report, or a package is missing that it is made with.
    """
    text: str = registry.load(__name__, name).render(certificate, evidence)
    return text
