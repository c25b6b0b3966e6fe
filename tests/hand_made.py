"""Evidence of a run that never happened, small enough to check by eye. Numpy only.

Every number is a multiple of a power of two, so that deviations, floors and limits are exact.
"""

import dataclasses
import json

import numpy as np

from lora_export import checks, environment, exporters, judging, registry, storage
from lora_export.records import (
    IDLE,
    MERGED,
    REFERENCE,
    UNMERGED,
    Account,
    Alone,
    Artifact,
    Batch,
    Certificate,
    Claim,
    Evidence,
    FileDigest,
    Fusion,
    GraphAnswer,
    Measurement,
    Modules,
    Placement,
    Recording,
    Repeat,
    Reply,
    Signature,
    Status,
    TensorSpec,
    Timing,
    Verdict,
    WeightAudit,
    Written,
)

# What an artifact says of itself that can be made again.
SAID = {
    registry.PRECISION: '"fp32"',
    exporters.MADE_WITH: json.dumps(environment.writers(), sort_keys=True),
}
NOISE = 2.0**-20  # how far the unmerged model lies from the reference: the noise floor
LIMIT = 8 * NOISE
TEXTS = ("Good film.", "Bad film.", "So | so.")
LABELS = (1, 0, 1)
LOGITS = (
    np.array([[-2.0, 2.0], [1.5, -1.5], [0.25, 0.75]]),
    np.array([[0.5, -0.25], [3.0, 1.0]]),
)
MASKS = (
    np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
    np.array([[1, 1, 1], [1, 1, 0]]),
)
SETTINGS = {"seed": 7, "overwrite": False}
FILES = (
    FileDigest("merged/model.safetensors", 100, "blake3-tensors:aa"),
    FileDigest("model.onnx", 9, "sha256:bb"),
)


def signature(**changes):
    """A classifier with three inputs and one output."""
    axes = ("batch", "sequence")
    inputs = tuple(
        TensorSpec(name, "int64", axes)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    outputs = (TensorSpec("logits", "float32", ("batch", 2)),)
    made = Signature(inputs, outputs, max_length=64, vocab_size=50, pad_token_id=0)
    return dataclasses.replace(made, **changes)


def artifact(name="onnx", **changes):
    """An artifact that declares what `signature` asks for."""
    made = Artifact(
        format=name,
        files=(FileDigest("model.onnx", 2_000_000, "sha256:bb"),),
        inputs=signature().inputs,
        outputs=signature().outputs,
        facts={"opset": 20, "metadata": SAID},
        lora_names=(),
        leaked_paths=(),
    )
    return dataclasses.replace(made, **changes)


def batches():
    """Three sentences, and two rows of a grid; the later rows of both are padded."""
    arrays = [
        {"input_ids": mask * 7, "attention_mask": mask, "token_type_ids": mask * 0}
        for mask in MASKS
    ]
    return (
        Batch("text", "sentences 1 to 3", arrays[0], TEXTS, LABELS),
        Batch("grid", "batch 2, length 3, padding right", arrays[1]),
    )


def recording(name, outputs, dtype=np.float32):
    """What the runner `name` answered: one array of logits per batch."""
    answers = tuple({"logits": np.asarray(output, dtype)} for output in outputs)
    return Recording(name, np.dtype(dtype).name, answers)


def recordings(reference=LOGITS):
    """The reference, and four others within the tolerance but for the idle one, far outside."""
    return {
        REFERENCE: recording(REFERENCE, reference, np.float64),
        UNMERGED: recording(UNMERGED, [logits + NOISE for logits in reference]),
        MERGED: recording(MERGED, [logits - NOISE for logits in reference]),
        IDLE: recording(IDLE, [logits + 1 for logits in reference]),
        "onnx": recording("onnx", [logits + 2 * NOISE for logits in reference]),
    }


def graphs(name="onnx", by=NOISE / 4, rounding=NOISE):
    """What the graph of an artifact answers in float64: both batches, `by` off the model."""
    return tuple(
        GraphAnswer(
            name,
            place,
            expected={"logits": logits},
            found={"logits": logits + by},
            rounded={"logits": (logits - rounding).astype(np.float32)},
        )
        for place, logits in enumerate(LOGITS)
    )


def timing(rounds=30, **ratios):
    """Samples of the unmerged model at about 8 ms, and of others at a multiple of each of them."""
    own = [8.0 + (i % 5) / 4 for i in range(rounds)]
    samples = {name: tuple(ratio * ms for ms in own) for name, ratio in ratios.items()}
    return Timing(1, 32, 2, {UNMERGED: tuple(own), **samples})


def audit(tensor="layer.0.query.weight", **changes):
    """A merged tensor without a fault."""
    elements = changes.pop("elements", 64)
    made = WeightAudit(
        tensor, elements, of=elements, misrounded=0, largest_ulp=0.5, unmoved=0, lost_share=1e-7
    )
    return dataclasses.replace(made, **changes)


def placement(tensor="layer.0.query.weight", **changes):
    """A merged tensor that is in the artifact as it is."""
    made = Placement("onnx", tensor, (f"model.{tensor}",), "as it is", 64, differing=0, largest=0.0)
    return dataclasses.replace(made, **changes)


def alone(runners=(MERGED, "onnx"), answers=None):
    """What they answer to the second sentence, and to the second row of the grid, each alone."""
    known = recordings() if answers is None else answers
    return tuple(
        Alone(runner, batch, 1, {"logits": known[runner].outputs[batch]["logits"][1:2]})
        for runner in runners
        for batch in (0, 1)
    )


def repeat(name="onnx", **changes):
    """A second export that gave the same."""
    files, operators = artifact(name).files, {"Gemm": 4, "Add": 2}
    made = Repeat(name, files, files, (), operators, operators)
    return dataclasses.replace(made, **changes)


def claims(**found):
    """What the merged model and the artifact say, and `found` what the latter says otherwise."""
    labels, digest = '["negative", "positive"]', "aa"
    said = {"labels": labels, "tokenizer.json": digest}
    return tuple(
        Claim(subject, name, value, found.get(name, value) if subject == "onnx" else value)
        for subject in (MERGED, "onnx")
        for name, value in said.items()
    )


FUSIONS = (
    Fusion("onnx", "LayerNorm", 5, 5, "5 LayerNormalization"),
    Fusion("onnx", "GELU", 2, 3, "3 Gelu"),
)


TOKENS = np.array([[5, 7, 9, 7], [8, 8, 6, 5]])


def writing(**changes):
    """Evidence of a decoder with a cache of one layer, and of what was written with it."""
    of = TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "past", 4))
    known = signature(inputs=(*signature().inputs, of))
    texts = tuple(
        Written(name, cached, TOKENS, np.full(TOKENS.shape, 1.0))
        for name in (REFERENCE, MERGED, "onnx")
        for cached in (True, False)
    )
    own = artifact(inputs=known.inputs)
    return evidence(**{"signature": known, "artifacts": (own,), "written": texts, **changes})


def account(**changes):
    """Two modules merged, a head placed, and every base tensor where it belongs."""
    made = Account(
        adapter_merged=("layer.0.query", "layer.0.value"),
        adapter_placed=("classifier.weight",),
        adapter_left=(),
        base_changed=("layer.0.query.weight", "layer.0.value.weight"),
        base_identical=("embeddings.weight",),
        base_dropped={"embeddings.position_ids": "a buffer"},
        base_damaged=(),
        unexplained=(),
    )
    return dataclasses.replace(made, **changes)


def evidence(**changes):
    """Evidence that every check passes, with `changes` to its fields."""
    tree = {"": "Classifier", "layer.0.query": "Linear"}
    made = Evidence(
        account=account(),
        weights=(audit(),),
        modules=Modules(tree, tree, ()),
        signature=signature(),
        artifacts=(artifact(),),
        batches=batches(),
        recordings=recordings(),
        timings=(timing(merged=1.0, onnx=0.5),),
        files=FILES,
        files_now=FILES,
        placements=(placement(), placement("classifier.bias", elements=2)),
        alone=alone(),
        fusions=FUSIONS,
        claims=claims(),
        repeats=(repeat(),),
        graphs=graphs(),
    )
    return dataclasses.replace(made, **changes)


def reduced(**changes):
    """The same, of an artifact in eight bits."""
    return evidence(artifacts=(dataclasses.replace(artifact(), precision="int8"),), **changes)


def reading(**changes):
    """The same, of an artifact with the tokenizer inside, and of what it made of the sentences."""
    classes = ("negative", "positive")
    known = signature(labels=classes)
    own = artifact(inputs=known.of_text.inputs, outputs=known.of_text.outputs)
    text, ids = batches()[0], {"input_ids": MASKS[0] * 7, "attention_mask": MASKS[0]}
    logits = LOGITS[0].astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = tuple(classes[index] for index in logits.argmax(-1))
    hard = Reply(("", "é"), {"input_ids": MASKS[1]}, {"input_ids": MASKS[1]})
    answers = {"logits": logits, "probabilities": shares.astype(np.float32)}
    replies = (hard, Reply(text.texts, ids, ids, chosen, answers))
    more = {"signature": known, "artifacts": (own,), "replies": replies}
    return evidence(**{**more, **changes})


def per_token():
    """The same, for a model that answers once per token: shape (batch, sequence, 2)."""
    spec = TensorSpec("logits", "float32", ("batch", "sequence", 2))
    spread = [
        np.repeat(logits[:, None, :], mask.shape[1], axis=1)
        for logits, mask in zip(LOGITS, MASKS, strict=True)
    ]
    return evidence(signature=signature(outputs=(spec,)), recordings=recordings(spread))


def with_answer(found, runner, batch, array):
    """`found`, but for what `runner` answered to one batch."""
    old = found.recordings[runner]
    outputs = list(old.outputs)
    outputs[batch] = {"logits": array}
    return with_recording(found, runner, dataclasses.replace(old, outputs=tuple(outputs)))


def with_recording(found, runner, new):
    """`found`, but for one recording; `None` leaves it out."""
    kept = {name: old for name, old in found.recordings.items() if name != runner}
    return dataclasses.replace(found, recordings=kept if new is None else kept | {runner: new})


def moved(found, runner, batch, place, by):
    """`found`, but for one element of what `runner` answered."""
    array = found.recordings[runner].outputs[batch]["logits"].copy()
    array[place] += by
    return with_answer(found, runner, batch, array)


def verdict(status=Status.PASS, **changes):
    """A verdict of the given status."""
    made = Verdict("parity", "onnx", status, 1.5, 8.0, "abs", 10, "as it should be")
    return dataclasses.replace(made, **changes)


def certificate(*verdicts, **changes):
    """A certificate over `verdicts`."""
    made = Certificate(
        command="lora-export run --adapter sst2.safetensors",
        verdicts=verdicts,
        measurements=(Measurement("size", "onnx", 2.0, "MB", 1),),
        inputs=(FileDigest("sst2.safetensors", 5, "blake3-tensors:cc"),),
        outputs=FILES,
        environment={"python": "3.12.0"},
        settings={"seed": 0},
    )
    return dataclasses.replace(made, **changes)


def write_run(folder, found, kept=("merged/model.safetensors", "model.onnx")):
    """Write a run by hand: the files, the evidence of them, the certificate; return what is left.

    The content of each file is its name.
    """
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    files = tuple(storage.digest(folder / name, name) for name in kept)
    artifacts = tuple(
        dataclasses.replace(a, files=tuple(f for f in files if f.name in {g.name for g in a.files}))
        for a in found.artifacts
    )
    found = dataclasses.replace(found, artifacts=artifacts, files=files, files_now=files)
    given = (FileDigest("sst2.safetensors", 5, "sha256:" + "c" * 64),)
    made = judging.certify(found, checks.RUN, "lora-export run", given, SETTINGS, 3)
    return judging.publish_evidence(found, made, folder)


def edit_tensors(file, change):
    """Rewrite a safetensors file after `change` was made to its arrays."""
    infos, metadata = storage.read_header(file)
    arrays = {name: info.array() for name, info in infos.items()}
    change(arrays)
    tensors = [storage.NewTensor.of(name, array) for name, array in arrays.items()]
    storage.write_safetensors(file, tensors, metadata)
