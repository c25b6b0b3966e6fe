"""Does each artifact declare the interface that was asked for, and nothing of this machine?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Artifact, Evidence, Signature, TensorSpec, Verdict

SCOPES = (checks.EXPORT, checks.RUN)
LEAST_OPSET = 18


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a name, dtype or axis that differs, an old opset, or a path of this machine."""
    if evidence.signature is None or not evidence.artifacts:
        return [checks.not_run("structure", "artifacts", "no artifact was recorded")]
    asked = evidence.signature
    return [_judge(a, asked.of_text if a.takes_text else asked) for a in evidence.artifacts]


def _judge(artifact: Artifact, signature: Signature) -> Verdict:
    faults = [f"mentions {path}" for path in artifact.leaked_paths]
    sides = (
        ("input", signature.inputs, artifact.inputs),
        ("output", signature.outputs, artifact.outputs),
    )
    compared = 0
    for side, expected, found in sides:
        if [spec.name for spec in expected] != [spec.name for spec in found]:
            names = ", ".join(spec.name for spec in found)
            faults.append(f"{side}s are {names or 'none'}")
            continue
        compared += len(expected)
        faults += [
            f"{side} {want.name} is {got.dtype}{list(got.axes)}, expected {want.dtype}"
            f"{list(want.axes)}"
            for want, got in zip(expected, found, strict=True)
            if not _declares(got, want)
        ]
    opset = artifact.facts.get("opset")
    if opset is not None and opset < LEAST_OPSET:
        faults.append(f"opset {opset}, expected at least {LEAST_OPSET}")
    if not artifact.facts.get("metadata"):
        faults.append("no labels and no provenance in the metadata")
    note = listed("faults", faults) if faults else _summary(artifact)
    return checks.counted("structure", artifact.format, len(faults), compared, "faults", note)


def _declares(got: TensorSpec, want: TensorSpec) -> bool:
    """Whether the artifact's own declaration agrees; a format may leave dtype and axes out."""
    if got.dtype and got.dtype != want.dtype:
        return False
    return not got.axes or got.axes == want.axes


def _summary(artifact: Artifact) -> str:
    size = sum(file.size_bytes for file in artifact.files)
    opset = f", opset {artifact.facts['opset']}" if "opset" in artifact.facts else ""
    return f"{len(artifact.files)} file(s), {size / 1e6:.1f} MB{opset}"
