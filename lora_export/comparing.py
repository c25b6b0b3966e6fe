"""What changed between two certificates."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lora_export.records import Certificate, FileDigest, Measurement, Status, Verdict

T = TypeVar("T")
# From the best outcome to the worst: what was not asked is unknown, what failed is known.
_ORDER = (Status.PASS, Status.INCONCLUSIVE, Status.NOT_RUN, Status.FAIL)


@dataclass(frozen=True)
class Change(Generic[T]):
    """One thing by name, as each side has it; None where a side lacks it."""

    name: str
    before: T | None
    after: T | None

    @property
    def ratio(self) -> float | None:
        """The second number in units of the first; None where they are no such numbers."""
        before, after = map(_number, (self.before, self.after))
        return after / before if before and after is not None else None

    @property
    def worse(self) -> bool:
        """Whether this is a verdict that got worse, is gone, or is new and no pass."""
        if isinstance(self.after, Verdict):
            old = self.before.status if isinstance(self.before, Verdict) else Status.PASS
            return _ORDER.index(self.after.status) > _ORDER.index(old)
        return isinstance(self.before, Verdict)


@dataclass(frozen=True)
class Comparison:
    """What differs between two certificates; what is the same is left out."""

    verdicts: tuple[Change[Verdict], ...]
    measurements: tuple[Change[Measurement], ...]
    settings: tuple[Change[Any], ...]
    environment: tuple[Change[Any], ...]
    inputs: tuple[Change[FileDigest], ...]
    outputs: tuple[Change[FileDigest], ...]

    @property
    def ok(self) -> bool:
        """Whether no verdict got worse or is gone, and none is new and no pass."""
        return not any(change.worse for change in self.verdicts)


def compare(before: Certificate, after: Certificate) -> Comparison:
    """Return what changed from `before` to `after`."""
    return Comparison(
        verdicts=_changes(
            *({f"{v.check}: {v.subject}": v for v in c.verdicts} for c in (before, after))
        ),
        measurements=_changes(
            *({f"{m.name}: {m.subject}": m for m in c.measurements} for c in (before, after))
        ),
        settings=_changes(*(_flat(c.settings) for c in (before, after))),
        environment=_changes(*(_flat(c.environment) for c in (before, after))),
        inputs=_changes(*(_by_name(c.inputs) for c in (before, after))),
        outputs=_changes(*(_by_name(c.outputs) for c in (before, after))),
    )


def _changes(before: Mapping[str, T], after: Mapping[str, T]) -> tuple[Change[T], ...]:
    names = dict.fromkeys((*before, *after))
    pairs = (Change(name, before.get(name), after.get(name)) for name in names)
    return tuple(change for change in pairs if change.before != change.after)


def _by_name(files: Iterable[FileDigest]) -> dict[str, FileDigest]:
    return {file.name: file for file in files}


def _flat(value: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return the values below `value` by their path."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{at}{name}/")
        else:
            found[at + name] = inner
    return found


def _number(value: object) -> float | None:
    """Return what a verdict or a measurement measured; of anything else nothing."""
    if isinstance(value, Verdict):
        return value.measured
    return value.value if isinstance(value, Measurement) else None
