"""The results of `study.py`: statistics, table, plots and the page that explains them."""

from pathlib import Path


def write(out: Path) -> None:
    """Write all results of the study in `out`."""
