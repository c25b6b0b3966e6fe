"""A certificate and its evidence as one HTML file: no script, and nothing is asked of a network."""

import functools
import importlib.resources
from typing import TYPE_CHECKING

from lora_export.errors import InputError
from lora_export.records import Certificate, Evidence
from lora_export.report import _wording

if TYPE_CHECKING:
    import jinja2


def render(certificate: Certificate, evidence: Evidence | None = None) -> str:
    """Return the page; its plots are those that `evidence` has something for.

    Raises:
        InputError: jinja2 or matplotlib is not installed.
    """
    try:
        template = _template()
        from lora_export.report import _plots
    except ImportError as error:
        raise InputError(f"html needs {error.name}: pip install 'lora-export[report]'") from error
    return template.render(
        certificate=certificate,
        failing=_wording.failing(certificate),
        passing=[verdict for verdict in certificate.verdicts if verdict.passed],
        plots=_plots.plots(evidence) if evidence is not None else [],
        wording=_wording,
    )


@functools.cache
def _template() -> "jinja2.Template":
    import jinja2

    file = importlib.resources.files("lora_export") / "data" / "report.html.jinja"
    surroundings = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return surroundings.from_string(file.read_text("utf-8"))
