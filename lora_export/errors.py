"""The package's errors, and the exit code that each branch of the tree stands for.

    LoraExportError          1   never raised itself
    ├── InputError           2   a path, flag, file or setting that the caller can correct
    ├── AdapterMismatch      3   adapter and base model do not fit together
    ├── ExportFailed         4   an artifact could not be written or opened again
    └── CheckFailed          5   files are written, but a verdict is not a pass

Programming mistakes stay `TypeError` and `AssertionError` and exit with 1. The translation from
error to exit code happens in one place, `lora_export.cli`.
"""

from collections.abc import Iterable

MOST_LISTED = 20


class LoraExportError(Exception):
    """Root of every error that this package raises on purpose."""

    exit_code = 1


class InputError(LoraExportError, ValueError):
    """A path, flag, file or setting that the caller can correct."""

    exit_code = 2


class AdapterMismatch(LoraExportError, ValueError):
    """The adapter and the base model do not fit together."""

    exit_code = 3


class ExportFailed(LoraExportError, RuntimeError):
    """A backend could not write an artifact, or could not open it again."""

    exit_code = 4


class CheckFailed(LoraExportError, RuntimeError):
    """Files are written, but a required verdict is not a pass."""

    exit_code = 5


def listed(summary: str, faults: Iterable[str]) -> str:
    """Return one message that lists every fault: sorted, the first 20, then a count of the rest."""
    found = sorted(faults)
    shown = "; ".join(found[:MOST_LISTED])
    rest = len(found) - MOST_LISTED
    return f"{summary}: {shown}" + (f"; and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
