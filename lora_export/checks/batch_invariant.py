"""Does a row get the same answer alone as among others? No row may depend on its neighbours."""

from dataclasses import replace

from lora_export import checks
from lora_export.compare import distance, tolerance
from lora_export.inputs import alone, of_row
from lora_export.records import (
    MERGED,
    REFERENCE,
    Alone,
    Distance,
    Evidence,
    Recording,
    Signature,
    Status,
    Verdict,
)

CHECK = "batch_invariant"
SCOPES = (checks.EXPORT, checks.QUICK, checks.RUN)


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail where an answer changes by more than the tolerance when the other rows are gone.

    In reduced precision the two may lie twice as far apart as the artifact lies from the reference
    at most: eight-bit ranges that are found anew in every call are those of the whole batch. Where
    the reference itself depends on the others (it takes its tokenizer's padding for text, say), a
    row alone is held against the reference's answer to it alone.
    """
    signature, reduced = evidence.signature, {a.format: a.is_reduced for a in evidence.artifacts}
    known = evidence.recordings
    wanted = [name for name in (MERGED, *reduced) if name != MERGED or name in known]
    found = []
    for name in wanted:
        rows = [a for a in evidence.alone if a.runner == name and _is_there(a, evidence)]
        answers = [known.get(of) for of in (REFERENCE, evidence.floor, name)]
        whole = all(a and len(a.outputs) == len(evidence.batches) for a in answers)
        if signature and rows and whole:
            found.append(_judge(name, rows, evidence, signature, reduced.get(name, False)))
        else:
            found.append(checks.not_run(CHECK, name, "no row was passed alone"))
    return found or [checks.not_run(CHECK, "rows", "nothing answered them")]


def _is_there(alone: Alone, evidence: Evidence) -> bool:
    """Return whether the batch and the row are among those of the evidence."""
    if not 0 <= alone.batch < len(evidence.batches):
        return False
    arrays = evidence.batches[alone.batch].arrays.values()
    return 0 <= alone.row < min((len(array) for array in arrays), default=0)


def _judge(
    name: str, rows: list[Alone], evidence: Evidence, signature: Signature, is_reduced: bool
) -> Verdict:
    known = evidence.recordings

    def limit_of(output: str) -> float:
        if is_reduced:
            return 2 * distance(known[REFERENCE], known[name], evidence, output).largest
        return tolerance(evidence, output)

    own = {(a.batch, a.row): a for a in evidence.alone if a.runner == REFERENCE}
    limits = {spec.name: limit_of(spec.name) for spec in signature.outputs}
    deviations, where, defects, models_own = [], [], [], 0
    for row in rows:
        exact = own.get((row.batch, row.row))
        if exact and not all(
            _distance(exact, o, evidence, signature).largest <= limits[o] for o in limits
        ):
            models_own += 1
        else:
            exact = None
        found = [(_distance(row, o, evidence, signature, exact), limits[o]) for o in limits]
        deviations += found
        if not all(not far.defect and far.largest <= limit for far, limit in found):
            batch = evidence.batches[row.batch]
            text = [repr(text[:40]) for text in batch.texts[row.row : row.row + 1]]
            where += text or [alone(batch, row.row, signature).note]
            defects += [far.defect for far, _ in found if far.defect]
    worst, limit = max(
        deviations, key=lambda d: (not d[0].largest <= d[1], d[0].largest / (d[1] or 1))
    )
    note = f"{len(rows) - len(where)} of {len(rows)} rows are answered alone as among others"
    if is_reduced:
        note += "; the limit is twice the artifact's distance from the reference"
    if models_own:
        note += f"; {models_own} as the reference answers them alone: it depends on others itself"
    compared = sum(far.compared for far, _ in deviations)
    status = Status.PASS if compared and not where else Status.FAIL
    return Verdict(
        CHECK, name, status, worst.largest, limit, "abs", compared,
        "; ".join([note, *defects[:1]]), tuple(where),
    )  # fmt: skip


def _distance(
    row: Alone, output: str, evidence: Evidence, signature: Signature, exact: Alone | None = None
) -> Distance:
    """Return how far what was answered alone lies from what was answered among others.

    With `exact`, from that answer.
    """
    batch = evidence.batches[row.batch]
    among = evidence.recordings[row.runner].outputs[row.batch]
    kept = of_row(batch, row.row, among, signature.outputs, signature)
    wanted = kept if exact is None else exact.outputs
    if output not in wanted.keys() & row.outputs.keys():
        return Distance(float("inf"), 0, f"there is no {output}", row.batch)
    single = replace(evidence, batches=(alone(batch, row.row, signature),))
    expected, found = (Recording(row.runner, "", (outputs,)) for outputs in (wanted, row.outputs))
    return distance(expected, found, single, output)
