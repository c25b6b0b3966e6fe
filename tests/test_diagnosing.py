"""Faults planted into graphs that were exported rightly: each is found, and at the right module."""

import dataclasses
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx_made import edited, filled, named, nodes, subject_of

from lora_export import compare, diagnosing, exporters, inputs, localising, models
from lora_export.checks import graph
from lora_export.errors import ExportFailed, InputError
from lora_export.records import Evidence, ModuleOutput


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(family, name)`: a file that is right, its model and its inputs; made once."""
    made = {}

    def make(family, name="onnx"):
        if (family, name) not in made:
            folder = tmp_path_factory.mktemp(family)
            subject, exporter = subject_of(family, folder), exporters.load(name)
            path = folder / f"model{exporter.SUFFIX}"
            signature = subject.signature
            example = inputs.example(signature)
            request = exporters.Request(
                subject.interface.bind(subject.model), signature, example, {}, path
            )
            with models.quiet():
                exporter.export(request)
            made[family, name] = subject, path, inputs.grid_batches(signature, 3)
        return made[family, name]

    return make


@pytest.fixture
def faulty(exported, tmp_path):
    """`faulty(family, change)`: the same with a copy of the ONNX file, its graph changed."""

    def make(family, change):
        subject, path, batches = exported(family)
        copy = tmp_path / f"faulty-{path.name}"
        copy.write_bytes(path.read_bytes())
        edited(copy, change)
        return subject, copy, batches

    return make


def evidence_of(subject, path, batches, name="onnx"):
    artifact = exporters.describe(name, path)
    answers = diagnosing.graph_answers(subject, artifact, path, batches)
    return artifact, Evidence(
        signature=subject.signature, artifacts=(artifact,), batches=batches, graphs=answers
    )


def parted(subject, path, batches):
    """The verdict on the file's graph, and the module at which it parts from the model."""
    artifact, evidence = evidence_of(subject, path, batches)
    (verdict,) = graph.judge(evidence)
    batch = batches[diagnosing.worst(evidence.graphs, evidence)]
    return verdict, compare.parted(localising.module_outputs(subject, artifact, path, batch))


# ---------------------------------------------------------------- faults


def attribute(node, name):
    (found,) = [a for a in node.attribute if a.name == name]
    return found


def no_bias(part):
    def change(graph):
        tensor = named(graph, part)
        filled(tensor, 0 * onnx.numpy_helper.to_array(tensor))

    return change


def one_element(part, by):
    def change(graph):
        tensor = named(graph, part)
        array = onnx.numpy_helper.to_array(tensor).copy()
        array.flat[3] += by
        filled(tensor, array)

    return change


def swapped(first, second):
    def change(graph):
        pair = named(graph, first), named(graph, second)
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in pair]
        for tensor, array in zip(pair, reversed(arrays), strict=True):
            filled(tensor, array)

    return change


def approximated(graph):
    attribute(nodes(graph, "Gelu")[1], "approximate").s = b"tanh"


def coarse_gelu(graph):
    """The constant of its approximation loses its last two digits."""
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.ndim == 0 and abs(float(array) - 0.044715) < 1e-6:
            filled(tensor, np.array(0.0447))


def epsilon(to):
    def change(graph):
        attribute(nodes(graph, "LayerNormalization")[2], "epsilon").f = to

    return change


def rms_epsilon(graph):
    """Of the first norm of Llama alone: the others share the constant."""
    first = next(node for node in graph.node if node.op_type == "Sqrt")
    (before,) = [node for node in graph.node if first.input[0] in node.output]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-3), "other"))
    before.input[1] = "other"


def no_mask(graph):
    always = onnx.helper.make_node("Equal", ["attention_mask"] * 2, ["always"])
    casts = [onnx.helper.make_node("Cast", ["always"], ["ones"], to=onnx.TensorProto.INT64)]
    for node in graph.node:
        if node.op_type in ("Cast", "Reshape"):  # the places are counted by another
            node.input[:] = ["ones" if n == "attention_mask" else n for n in node.input]
    graph.node.insert(0, casts[0])
    graph.node.insert(0, always)


def next_position(find):
    """One is added to the positions that the node reads which `find` chooses, at its last input."""

    def change(graph):
        place = next(i for i, node in enumerate(graph.node) if find(node))
        graph.initializer.append(onnx.numpy_helper.from_array(np.int64(1), "one"))
        graph.node.insert(
            place, onnx.helper.make_node("Add", [graph.node[place].input[-1], "one"], ["next"])
        )
        graph.node[place + 1].input[-1] = "next"

    return change


def other_axis(graph):
    attribute(nodes(graph, "Softmax")[1], "axis").i = -2


def reads(part):
    return lambda node: node.op_type == "Gather" and part in node.input[0]


BERT, GPT2, LLAMA = "bert.encoder.layer", "transformer.h", "model.layers"
FAULTS = [
    ("bert", no_bias("layer.1.intermediate.dense.bias"), f"{BERT}.1.intermediate.dense"),
    ("bert", one_element("layer.0.output.LayerNorm.bias", 1e-4), f"{BERT}.0.output.LayerNorm"),
    ("bert", approximated, f"{BERT}.1.intermediate.intermediate_act_fn"),
    ("bert", epsilon(1e-5), f"{BERT}.0.output.LayerNorm"),
    ("bert", no_mask, f"{BERT}.0.attention.self"),
    (
        "bert",
        next_position(reads("position_embeddings")),
        "bert.embeddings.position_embeddings",
    ),
    (
        "bert",
        swapped("layer.0.output.dense.weight", "layer.1.output.dense.weight"),
        f"{BERT}.0.output.dense",
    ),
    ("bert", other_axis, f"{BERT}.1.attention.self"),
    ("gpt2", no_bias("h.1.mlp.c_fc.bias"), f"{GPT2}.1.mlp.c_fc"),
    ("gpt2", one_element("h.0.ln_2.bias", 1e-4), f"{GPT2}.0.ln_2"),
    ("gpt2", coarse_gelu, f"{GPT2}.0.mlp.act"),
    ("gpt2", epsilon(1e-4), f"{GPT2}.1.ln_1"),
    ("gpt2", no_mask, f"{GPT2}.0.attn"),
    ("gpt2", next_position(reads("wpe")), "transformer.wpe"),
    ("gpt2", swapped("h.0.mlp.c_proj.weight", "h.1.mlp.c_proj.weight"), f"{GPT2}.0.mlp.c_proj"),
    ("gpt2", other_axis, f"{GPT2}.1.attn"),
    ("llama", one_element("layers.1.mlp.up_proj.weight", 1e-2), f"{LLAMA}.1.mlp.up_proj"),
    ("llama", rms_epsilon, f"{LLAMA}.0.input_layernorm"),
    ("llama", no_mask, f"{LLAMA}.0.self_attn"),
    ("llama", next_position(lambda node: node.op_type == "Cast" and node.output[0] == "to_7"),
     "model.rotary_emb"),
    ("llama", swapped("layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj"),
     f"{LLAMA}.0.mlp.gate_proj"),
    ("llama", other_axis, f"{LLAMA}.1.self_attn"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "module"),
    [
        pytest.param(
            *fault, marks=pytest.mark.slow if fault[0] == "llama" else (), id=f"{fault[0]}-{n}"
        )
        for n, fault in enumerate(FAULTS)
    ],
)
def test_a_planted_fault_fails_and_is_located(faulty, family, change, module):
    verdict, found = parted(*faulty(family, change))
    assert not verdict.passed, verdict.note
    assert found is not None
    assert found.module == module


# ---------------------------------------------------------------- no false alarm

QUICK = [("bert", "onnx"), ("gpt2", "torchscript"), ("vit", "pt2")]
SLOW = [
    *[(family, "onnx") for family in ("gemma3", "deberta-v2", "t5", "mpnet", "swin", "mistral")],
    *[("bart", "torchscript"), ("llama", "pt2"), ("deberta-v2", "pt2")],
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_right_file_agrees_in_every_module_on_every_batch(exported, family, name):
    subject, path, batches = exported(family, name)
    artifact, evidence = evidence_of(subject, path, batches, name)
    (verdict,) = graph.judge(evidence)
    assert verdict.passed, verdict.note
    assert verdict.measured < 0.75 * verdict.limit
    for answer in evidence.graphs:
        outputs = localising.module_outputs(subject, artifact, path, batches[answer.batch])
        assert sum(one.agrees for one in outputs) > len(outputs) / 2
        assert compare.parted(outputs) is None


@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_what_torch_wrote_is_in_float64_what_the_model_is(exported, name):
    """No constant is rounded in these files, so nothing is left."""
    subject, path, batches = exported({"torchscript": "gpt2", "pt2": "vit"}[name], name)
    _, evidence = evidence_of(subject, path, batches, name)
    (verdict,) = graph.judge(evidence)
    assert verdict.measured < 1e-12


def test_the_file_of_another_model_parts_at_its_first_weight(exported, tmp_path):
    subject, path, batches = exported("gpt2", "torchscript")
    weights = torch.jit.load(str(path))
    with torch.no_grad():
        dict(weights.named_parameters())["model.transformer.h.1.mlp.c_fc.bias"][5] += 1e-3
    changed = tmp_path / "model.pt"
    torch.jit.save(weights, str(changed), _extra_files=extra_of(path))
    artifact, evidence = evidence_of(subject, changed, batches, "torchscript")
    batch = batches[diagnosing.worst(evidence.graphs, evidence)]
    found = compare.parted(localising.module_outputs(subject, artifact, changed, batch))
    assert (found.module, found.kind) == ("transformer.h.1.mlp.c_fc", "Conv1D")


def extra_of(path):
    extra = {"signature.json": "", "lora_export.json": ""}
    torch.jit.load(str(path), _extra_files=extra)
    return extra


# ---------------------------------------------------------------- what the graph answers


def test_answers_are_in_float64_and_beside_them_the_model_in_float32(exported):
    subject, path, batches = exported("bert")
    _, evidence = evidence_of(subject, path, batches)
    assert len(evidence.graphs) == diagnosing.MOST_BATCHES
    for answer in evidence.graphs:
        kinds = [str(side["logits"].dtype) for side in (answer.expected, answer.found)]
        assert [*kinds, str(answer.rounded["logits"].dtype)] == ["float64", "float64", "float32"]


def test_batches_without_padding_and_with_every_kind_of_it_are_asked(exported):
    subject, path, batches = exported("bert")
    _, evidence = evidence_of(subject, path, batches)
    notes = " ".join(batches[answer.batch].note for answer in evidence.graphs)
    assert all(f"padding {kind}" in notes for kind in ("none", "left", "hole", "all but one"))


def test_where_every_batch_is_large_the_smallest_is_asked(exported):
    subject, path, batches = exported("bert")
    large = [batch for batch in batches if batch.mask.size > diagnosing.MOST_TOKENS]
    answers = diagnosing.graph_answers(subject, exporters.describe("onnx", path), path, large)
    assert [large[a.batch].mask.size for a in answers] == [min(b.mask.size for b in large)]


def test_a_graph_that_cannot_be_evaluated_gives_an_answer_that_says_so(faulty):
    def unknown(graph):
        graph.node[0].op_type = "Nonsense"

    subject, path, batches = faulty("bert", lambda graph: None)
    artifact = exporters.describe("onnx", path)
    edited(path, unknown)
    (answer,) = diagnosing.graph_answers(subject, artifact, path, batches)
    assert "Nonsense" in answer.error
    assert not answer.found


@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_an_input_that_the_model_does_not_have_is_an_error_of_the_export(exported, name):
    _, path, _ = exported({"torchscript": "gpt2", "pt2": "vit"}[name], name)
    inside = exporters.load(name).in_double(path)
    for ask in (inside.run, inside.values):
        with pytest.raises(ExportFailed, match="cannot be evaluated: "):
            ask({"nobody": np.zeros(1)})


def test_a_format_without_evaluation_and_a_narrow_artifact_give_no_answers(exported):
    subject, path, batches = exported("bert")
    artifact = exporters.describe("onnx", path)
    for changes in ({"precision": "int8"}, {"format": "openvino"}, {"format": "aoti"}):
        other = dataclasses.replace(artifact, **changes)
        assert diagnosing.graph_answers(subject, other, path, batches) == ()


def test_a_model_too_large_for_the_memory_is_not_evaluated(exported, monkeypatch):
    subject, path, batches = exported("bert")
    monkeypatch.setattr(diagnosing, "MOST_BYTES", 1000)
    assert diagnosing.graph_answers(subject, exporters.describe("onnx", path), path, batches) == ()


# ---------------------------------------------------------------- the nearest value


def test_a_value_is_found_with_its_axes_in_another_order_and_reshaped():
    array = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    values = {
        "noise": np.random.default_rng(1).standard_normal((2, 3, 20)),
        "turned": array.reshape(2, 3, 20).transpose(2, 0, 1) + 1e-9,
        "short": array[:1],
    }
    name, error = localising._Values(values).nearest(array, np.arange(array.size))
    assert name == "turned"
    assert error == pytest.approx(1e-9, rel=1e-5)


def test_of_no_value_of_that_size_nothing_is_nearest():
    array = np.zeros((2, 3))
    assert localising._Values({"x": np.zeros(5)}).nearest(array, np.arange(6)) == ("", np.inf)


def test_the_nearest_is_that_of_all_elements_and_not_of_a_few():
    array = np.zeros(10_000)
    near, far = array + 1e-3, array.copy()
    far[4321] = 1  # between the elements that are looked at first
    values = localising._Values({"far": far, "near": near})
    assert values.nearest(array, np.arange(10_000)) == ("near", pytest.approx(1e-3))


def test_a_value_with_nan_is_not_near():
    array = np.zeros(4)
    values = localising._Values({"x": np.array([0, np.nan, 0, 0])})
    assert values.nearest(array, np.arange(4)) == ("", np.inf)


def test_padded_places_are_left_out_wherever_the_tokens_are():
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    counted = {
        shape: len(localising._attended(shape, [mask.astype(bool)]))
        for shape in [(2, 3, 5), (6, 5), (2, 4, 3, 5), (2, 5), (7, 3)]
    }
    assert counted == {(2, 3, 5): 20, (6, 5): 20, (2, 4, 3, 5): 80, (2, 5): 10, (7, 3): 21}


# ---------------------------------------------------------------- the module at which they part


def outputs(*errors, excused=()):
    return [
        ModuleOutput("onnx", str(i), "", error, 1.0, 1e-6, "Linear", i in excused)
        for i, error in enumerate(errors)
    ]


def test_it_is_the_first_that_differs():
    assert compare.parted(outputs(0, 1e-7, 1, 1)).module == "2"


def test_it_is_none_that_is_excused():
    assert compare.parted(outputs(0, 1, 0, 1, excused={1})).module == "3"


def test_a_module_without_a_number_differs():
    assert compare.parted(outputs(0, float("nan"))).module == "1"


def test_where_all_agree_they_do_not_part():
    assert compare.parted(outputs(0, 1e-7)) is None
    assert compare.parted(outputs(0, 1, 0, excused={1})) is None


def judged(errors, feeds, sound=lambda place: True):
    """The place of the module at fault: `feeds` says where the output of each place goes."""
    kinds = ["Linear"] * (len(errors) - 1) + [localising.OUTPUT]
    made = [
        ModuleOutput("onnx", f"a.{i}", "", error, 1.0, 1e-6, kind)
        for i, (error, kind) in enumerate(zip(errors, kinds, strict=True))
    ]
    found = localising._judged(made, lambda place: feeds.get(place, range(place + 1, 9)), sound)
    at = compare.parted(found)
    return None if at is None else int(at.module[2:])


CHAIN = {i: range(i + 1, 5) for i in range(5)}


def test_a_module_that_a_fusion_left_out_is_passed_over():
    assert judged([0, 1, 0, 1, 1], CHAIN) == 3


def test_a_later_module_that_is_not_computed_from_it_excuses_nothing():
    assert judged([0, 1, 0, 1, 1], CHAIN | {1: (3, 4)}) == 1


def test_a_module_that_no_output_is_computed_from_is_passed_over():
    assert judged([1, 0, 0, 1, 1], CHAIN | {0: ()}) == 3


def test_where_the_outputs_agree_nobody_is_at_fault():
    assert judged([1, 1, 0, 1, 0], CHAIN) is None


# ---------------------------------------------------------------- the whole diagnosis


def diagnosed(subject, path, batches):
    return diagnosing.located(subject, exporters.describe("onnx", path), path, batches)


def test_a_right_file_parts_nowhere(exported):
    found = diagnosed(*exported("bert"))
    assert found.ok
    assert found.module is None
    assert found.sentence.startswith("nothing parts")
    assert {v.check for v in found.verdicts} == {"graph", "parity"}


def test_a_fault_is_told_in_one_sentence(faulty):
    found = diagnosed(*faulty("bert", approximated))
    assert not found.ok
    assert found.sentence.startswith(
        "parts at bert.encoder.layer.1.intermediate.intermediate_act_fn (GELUActivation): "
    )
    assert found.facts()["module"]["kind"] == "GELUActivation"


@pytest.mark.parametrize("first", ["ORT_DISABLE_ALL", "ORT_ENABLE_EXTENDED"])
def test_a_runtime_that_does_not_do_what_the_graph_says_is_told_with_its_level(
    exported, monkeypatch, first
):
    """The control: a runtime whose rewriting makes every answer larger, from one level on."""
    subject, path, batches = exported("bert")
    exporter = exporters.load("onnx")
    levels = list(exporter.levels(path, 1))
    place = next(i for i, (level, _) in enumerate(levels) if level == first)

    class Wrong:
        name = precision = "float32"

        def run(self, arrays):
            return {n: 1.01 * a for n, a in levels[0][1].run(arrays).items()}

    wrong = [(level, Wrong() if i >= place else r) for i, (level, r) in enumerate(levels)]
    monkeypatch.setattr(exporter, "levels", lambda *_: wrong)
    monkeypatch.setattr(exporter, "open_runner", lambda *_: Wrong())
    found = diagnosed(subject, path, batches)
    assert not found.ok
    assert found.level == first
    assert "the graph agrees in float64" in found.sentence
    assert found.sentence.endswith(first)


def test_a_file_that_takes_fewer_inputs_and_gives_more_outputs_is_compared(faulty):
    """As other tools write it: one segment for all, no input for it, and a state beside."""

    def foreign(graph):
        (segments,) = [value for value in graph.input if value.name == "token_type_ids"]
        graph.input.remove(segments)
        graph.node.insert(
            0, onnx.helper.make_node("Sub", ["input_ids", "input_ids"], ["token_type_ids"])
        )
        state = nodes(graph, "Tanh")[0].output[0]
        graph.output.append(onnx.helper.make_tensor_value_info(state, 1, ["batch", 32]))

    assert diagnosed(*faulty("bert", foreign)).ok


def test_a_file_of_another_exporter_is_understood_without_its_names(tmp_path):
    """torch's older one traces, and calls its values by paths of its own or by numbers."""
    subject, path = subject_of("distilbert", tmp_path), tmp_path / "model.onnx"
    signature = subject.signature
    names, example = [spec.name for spec in signature.inputs], inputs.example(signature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            subject.interface.bind(subject.model),
            tuple(torch.from_numpy(example[name]) for name in names),
            str(path),
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
            dynamo=False,
            opset_version=17,
        )
    batches = inputs.grid_batches(signature, 3)
    right = diagnosed(subject, path, batches)
    assert right.ok
    assert all(one.agrees for one in right.outputs)
    edited(path, other_axis)
    wrong = diagnosed(subject, path, batches)
    assert wrong.module.module == "distilbert.transformer.layer.1.attention"


def test_a_file_with_none_of_the_models_outputs_is_refused(faulty):
    def renamed(graph):
        graph.node[-1].output[0] = graph.output[0].name = "scores"

    with pytest.raises(InputError, match="none of the model's outputs: logits"):
        diagnosed(*faulty("bert", renamed))


def test_a_file_that_its_runtime_cannot_run_is_refused(faulty):
    def baked(graph):
        (shape,) = [tensor for tensor in graph.initializer if tensor.name == "flat_32"]
        shape.CopyFrom(onnx.numpy_helper.from_array(np.array([14, 32]), shape.name))

    with pytest.raises(ExportFailed, match="does not run on batch 1"):
        diagnosed(*faulty("bert", baked))
