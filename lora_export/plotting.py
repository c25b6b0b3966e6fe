"""Figures, drawn by matplotlib: the extra `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.errors import InputError
from lora_export.records import ModuleOutput

EXTRA = "pip install 'lora-export[report]'"
KINDS = (".png", ".svg")


def error_by_depth(outputs: Sequence[ModuleOutput], at: ModuleOutput | None, path: Path) -> None:
    """Draw the error of each module, as they run, and its limit; `at` is where they part.

    Raises:
        InputError: there are no modules; or see `figure_for`.
    """
    if not outputs:
        raise InputError("nothing to draw: the artifact's graph was not evaluated in float64")
    figure = figure_for(path)(figsize=(9, 4.5), layout="constrained")
    axes, places = figure.subplots(), range(len(outputs))
    sizes = [one.size or 1.0 for one in outputs]
    shown = [
        None if one.excused else max(one.error / size, 1e-17)
        for one, size in zip(outputs, sizes, strict=True)
    ]
    limits = [one.limit / size for one, size in zip(outputs, sizes, strict=True)]
    axes.semilogy(places, limits, color="0.6", label="limit")
    drawn = [(place, error) for place, error in enumerate(shown) if error is not None]
    axes.semilogy(*zip(*drawn, strict=True), ".-", label="error")
    if at is not None:
        place = next(i for i, one in enumerate(outputs) if one is at)
        axes.axvline(place, color="C3", label=f"parts at {at.module}")
    axes.set(xlabel="modules, as they run", ylabel="largest error, in units of the output")
    axes.legend()
    figure.savefig(path)


def figure_for(path: Path) -> Any:
    """Return matplotlib's class of figures, if a figure can be drawn into `path`.

    Raises:
        InputError: matplotlib is not installed, or `path` is neither .png nor .svg.
    """
    if path.suffix not in KINDS:
        raise InputError(f"{path.name} is no {' or '.join(KINDS)} file")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"matplotlib is not installed; {EXTRA}") from error
    return Figure
