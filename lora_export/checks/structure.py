"""Does each artifact have the interface asked for, at every shape, and nothing to spare?"""

from lora_export import checks
from lora_export.errors import listed
from lora_export.records import Artifact, Evidence, Signature, TensorSpec, Verdict

SCOPES = (checks.TRIAL, checks.EXPORT, checks.QUICK, checks.RUN, checks.REPLAY)
LEAST_OPSET = 18
# Bytes of a weight; int8 and int4 keep layers, and scales, that are wider.
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "int4": 4}
_SURPLUS = 0.25  # of the weights: constants of the graph, alignment
_PROGRAM = 8e6  # bytes: of the graph, of a tokenizer, of machine code


def judge(evidence: Evidence) -> list[Verdict]:
    """Fail on a name, dtype or axis that differs, an old opset, or a path of this machine.

    And on a shape that the artifact does not run at, whatever axes it declares, and on a file much
    larger than the weights in it.
    """
    if evidence.signature is None or not evidence.artifacts:
        return [checks.not_run("structure", "artifacts", "no artifact was recorded")]
    asked = evidence.signature
    return [
        _judge(a, asked.of_text if a.takes_text else asked, evidence) for a in evidence.artifacts
    ]


def _judge(artifact: Artifact, signature: Signature, evidence: Evidence) -> Verdict:
    faults = [f"mentions {path}" for path in artifact.leaked_paths]
    faults += _refused_shapes(artifact, evidence) + _surplus(artifact, evidence)
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
    return checks.counted(
        "structure", artifact.format, len(faults), compared, "faults", note, faults
    )


def _refused_shapes(artifact: Artifact, evidence: Evidence) -> list[str]:
    recording = evidence.recordings.get(artifact.format)
    raised = zip(evidence.batches, recording.errors if recording else (), strict=False)
    return [f"does not run at {batch.note}: {error}" for batch, error in raised if error]


def _surplus(artifact: Artifact, evidence: Evidence) -> list[str]:
    """Return the fault of a file that holds its weights twice, or wider than it says."""
    own = [p.elements for p in evidence.placements if p.artifact == artifact.format]
    weights = sum(own) * _BYTES[artifact.precision]
    size = sum(file.size_bytes for file in artifact.files)
    if not own or size <= weights * (1 + _SURPLUS) + _PROGRAM:
        return []
    return [f"{size / 1e6:.1f} MB for {weights / 1e6:.1f} MB of weights"]


def _declares(got: TensorSpec, want: TensorSpec) -> bool:
    """Whether the artifact's own declaration agrees; a format may leave dtype and axes out."""
    if got.dtype and got.dtype != want.dtype:
        return False
    return not got.axes or got.axes == want.axes


def _summary(artifact: Artifact) -> str:
    size = sum(file.size_bytes for file in artifact.files)
    opset = f", opset {artifact.facts['opset']}" if "opset" in artifact.facts else ""
    return f"{len(artifact.files)} file(s), {size / 1e6:.1f} MB{opset}"
