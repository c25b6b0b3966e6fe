"""Narrow weights in ONNX graphs: how they are rounded, and which layers keep theirs."""

import collections
import dataclasses
import json
from functools import partial

import families
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_made import arrays_of, counts, exported

from lora_export import calling, environment, exporters, inputs
from lora_export.errors import ExportFailed, InputError
from lora_export.exporters import _onnx_choose, _onnx_schemes, _onnx_translate
from lora_export.exporters._onnx_choose import choose, ranges
from lora_export.exporters._onnx_layers import linears, matrix
from lora_export.exporters._onnx_schemes import Blocks, Dynamic, Static, quantise
from lora_export.records import Form, Signature, TensorSpec
from lora_export.runners.onnx import OnnxRunner

HIDDEN = 32


def asked(signature, runs, precision):
    return exporters.Request(None, signature, {}, {}, None, Form(precision), runs)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A BERT with a head per token, in float32."""
    return exported("bert-tokens", tmp_path_factory.mktemp("full") / "full.onnx")


@pytest.fixture
def graph(full):
    return ir.load(str(full[1]))


@pytest.fixture(scope="module")
def runs(full):
    return [inputs.made(full[0], 4, 9, "right", seed) for seed in range(3)]


def answers(model, runs, tmp_path):
    _onnx_translate.save(model, tmp_path / "asked.onnx")
    runner = OnnxRunner(tmp_path / "asked.onnx", 1)
    return [runner.run(run) for run in runs]


# ---------------------------------------------------------------- int8


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    return exported(
        "bert-tokens", tmp_path_factory.mktemp("int8") / "model.onnx", precision="int8"
    )[1]


def test_weights_and_embeddings_are_signed_bytes(full, eight_bits):
    small, large = (
        sum(a.nbytes for a in arrays_of(path).values()) for path in (eight_bits, full[1])
    )
    assert small < 0.4 * large
    bytes_of = [a for a in arrays_of(eight_bits).values() if a.dtype == np.int8 and a.ndim == 2]
    assert len(bytes_of) == 12 + 3
    assert not any(a.dtype == np.uint8 and a.ndim for a in arrays_of(eight_bits).values())
    assert counts(eight_bits)["MatMulInteger"] == 12


def test_layers_that_share_an_input_share_its_bytes(eight_bits):
    """Query, key and value are products of one tensor, which is made bytes of once."""
    assert counts(eight_bits)["DynamicQuantizeLinear"] == 2 * (12 // 2 - 2)


def test_a_head_of_few_outputs_stays_in_float(eight_bits):
    """What costs nothing and decides the answer."""
    assert [
        a.shape for a in arrays_of(eight_bits).values() if a.shape in [(HIDDEN, 5), (5, HIDDEN)]
    ]


def test_the_weights_are_rounded_to_the_nearest_byte_of_their_column(full, eight_bits):
    floats = {a.tobytes(): a for a in arrays_of(full[1]).values() if a.ndim == 2}
    found = arrays_of(eight_bits)
    checked = 0
    for name, array in found.items():
        if not name.endswith("_int8") or f"{name.removesuffix('_int8')}_scale" not in found:
            continue
        scale = found[f"{name.removesuffix('_int8')}_scale"]
        restored = array.astype(np.float64) * scale
        near = [
            f
            for f in floats.values()
            for g in (f, f.T)
            if g.shape == array.shape and np.abs(g - restored).max() <= 0.501 * scale.max()
        ]
        assert near, name
        assert np.abs(array).max() == 127
        checked += 1
    assert checked == 15


def test_the_decoder_is_made_int8_without_its_tied_head(tmp_path):
    """OPT's head is its embedding: made bytes for one, it would be stored twice or be wrong."""
    signature, path = exported("opt", tmp_path / "model.onnx", precision="int8")
    assert counts(path)["MatMulInteger"] >= 12
    arrays = inputs.made(signature, 2, 6, "left", 0)
    assert OnnxRunner(path, 1).run(arrays)["logits"].shape == (2, 6, 100)


# ---------------------------------------------------------------- static ranges


def one_layer(x, weight, bias):
    """A graph of one linear layer, and what it is named."""
    values = [ir.val(n, const_value=ir.tensor(a, name=n)) for n, a in (("w", weight), ("b", bias))]
    shape = ir.Shape(("rows", weight.shape[0]))
    given = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    node = ir.node("Gemm", [given, *values])
    node.outputs[0].name, node.outputs[0].dtype = "logits", ir.DataType.FLOAT
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layer', 'linear']"
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=values, name="one")
    graph.opset_imports[""] = 20
    assert list(linears(ir.Model(graph, ir_version=10))) == ["layer"]
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def layer():
    dice = np.random.default_rng(0)
    x, w = dice.normal(size=(5, 40)), dice.normal(size=(40, 24))
    return tuple(a.astype(np.float32) for a in (x, w, dice.normal(size=24)))


@pytest.mark.parametrize("signed", [False, True])
def test_a_static_layer_computes_what_its_integers_say(layer, tmp_path, signed):
    """Against the formula in float64; a value beyond the range is taken as its end."""
    x, w, b = layer
    reach = 2.0
    model = one_layer(x, w, b)
    quantise(model, Static({"x": reach}, signed=signed))
    (found,) = answers(model, [{"x": x}], tmp_path)
    step, scales = np.float32(reach / 127), np.abs(w).max(0) / np.float32(127)
    integers = np.clip(np.rint(x / step), -127 - 1, 127).astype(np.float64)
    bias = b if signed else np.rint(b / (step * scales)) * (step * scales)
    wanted = integers @ np.rint(w / scales) * (np.float64(step) * scales) + bias
    assert (np.abs(x) > reach).any()
    np.testing.assert_allclose(found["logits"], wanted, atol=2e-5)
    assert np.abs(found["logits"] - (x @ w + b)).max() > 0.05  # it is not the layer in float32


def test_only_a_static_answer_is_the_same_whatever_else_is_in_the_batch(layer, tmp_path):
    x, w, b = layer
    x[-1] *= 30  # what a range that is found in the call follows
    differ = {}
    for name, scheme in (("static", partial(Static, {"x": 3.0})), ("dynamic", Dynamic)):
        model = one_layer(x, w, b)
        quantise(model, scheme())
        whole, alone = answers(model, [{"x": x}, {"x": x[:1]}], tmp_path)
        differ[name] = np.abs(whole["logits"][0] - alone["logits"][0]).max()
    assert differ["static"] == 0
    assert differ["dynamic"] > 0.1


def test_a_range_is_what_a_share_of_the_values_reach(layer, monkeypatch):
    x, w, b = layer
    runs = [{"x": x}, {"x": np.zeros_like(x)}, {"x": -100 * x[:1]}]
    monkeypatch.setattr(_onnx_choose, "SHARES", (1.0, 0.97))
    monkeypatch.setattr(_onnx_choose, "_LARGEST", 0.5)
    found = ranges(one_layer(x, w, b), runs)
    everything = np.sort(np.concatenate([np.abs(run["x"]).ravel() for run in runs]))
    assert found[0] == {"x": pytest.approx(everything[-1])}
    above = [(everything > one["x"]).sum() for one in found]
    assert above == [0, int(0.03 * everything.size)]


def test_the_largest_values_suffice_to_find_every_share():
    """Of each run so many are kept that none above the least share is lost, up to 100 runs."""
    assert 100 * (1 - min(_onnx_choose.SHARES)) <= _onnx_choose._LARGEST


def test_static_ranges_need_inputs(full, graph):
    with pytest.raises(InputError, match="needs inputs to find ranges on"):
        _onnx_choose.narrow(graph, asked(full[0], [], "int8"), static=True)


def test_the_static_file_is_run_on_integers(full, runs, tmp_path, monkeypatch):
    """onnxruntime takes QuantizeLinear, Gemm and DequantizeLinear together, or nothing is won."""
    monkeypatch.setattr(_onnx_choose, "TARGET", 1e9)
    _, path = exported("bert-tokens", tmp_path / "m.onnx", runs, precision="int8", static=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options)
    assert counts(tmp_path / "seen.onnx")["QGemm"] == 12


# ---------------------------------------------------------------- processors without VNNI


def test_pairs_of_products_of_safe_weights_fit_into_sixteen_bits():
    assert 2 * 255 * _onnx_schemes.SAFE_BYTE < 2**15
    assert 2 * 255 * (_onnx_schemes.SAFE_BYTE + 1) >= 2**15
    assert 2 * 255 * _onnx_schemes.BYTE >= 2**15  # so there is something to be safe from


@pytest.mark.parametrize(
    ("target", "flags", "wanted"),
    [
        ("generic", {"avx2", "avx512_vnni"}, 64),
        ("cpu-avx512", {"avx2"}, 127),
        ("cpu-amx", {"avx2"}, 127),
        ("native", {"avx2", "avx512f"}, 64),
        ("native", {"avx2", "avx_vnni"}, 127),
        ("native", {"avx2", "avx512_vnni"}, 127),
        ("native", {"asimd"}, 127),
        ("native", set(), 64),
    ],
)
def test_weights_are_as_large_as_the_target_can_add_up(monkeypatch, target, flags, wanted):
    monkeypatch.setattr(environment, "_processor", lambda: ("a processor", flags))
    assert _onnx_schemes.largest(target) == wanted


@pytest.mark.parametrize("static", [False, True])
def test_a_file_for_any_processor_has_safe_weights(full, runs, tmp_path, static):
    form = {"precision": "int8", "static": static}
    largest = {}
    for target in ("generic", "cpu-avx512"):
        _, path = exported("bert-tokens", tmp_path / target, runs, target=target, **form)
        found = [a for n, a in arrays_of(path).items() if n.endswith("weight_int8") and a.ndim == 2]
        tables = [a for a in found if a.shape[0] in (100, 64, 2)]  # of embeddings: only looked up
        largest[target] = max(np.abs(a.astype(int)).max() for a in found if not any(
            a is table for table in tables))  # fmt: skip
    assert largest == {"generic": 64, "cpu-avx512": 127}


# ---------------------------------------------------------------- four bits


def restored(packed, scales, bits, features):
    """Return the matrix that MatMulNBits multiplies by, after its documentation, in float64."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    values = (packed.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(len(values), -1)[:, :features].T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("features", [32, 96, 40])
def test_blocks_are_unpacked_to_the_nearest_weights(bits, features):
    w = np.random.default_rng(1).normal(size=(features, 7)).astype(np.float32)
    w[:32, 3] = 0  # a block of zeros has no scale of its own
    packed, scales = _onnx_schemes.blockwise(w, bits)
    assert packed.shape == (7, -(-features // 32), 32 * bits // 8)
    found = restored(packed, scales, bits, features)
    assert (found[:32, 3] == 0).all()
    steps = np.repeat(np.abs(scales), 32, axis=1)[:, :features].T
    inside = np.abs(w) < 0.7 * np.abs(steps) * 2 ** (bits - 1)
    assert inside.any()
    assert (np.abs(found - w) <= 0.501 * steps)[inside].all()


def test_the_scale_of_a_block_loses_no_more_than_the_plain_one(monkeypatch):
    w = np.random.default_rng(2).standard_t(4, size=(256, 64)).astype(np.float32)

    def loss():
        return np.square(restored(*_onnx_schemes.blockwise(w, 4), 4, 256) - w).mean()

    searched = loss()
    monkeypatch.setattr(_onnx_schemes, "_CLIPS", (1.0,))
    assert searched < 0.97 * loss()


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_multiplies_by_the_weights_of_the_blocks(layer, tmp_path, bits):
    x, w, b = layer
    model = one_layer(x, w, b)
    quantise(model, Blocks(bits))
    (found,) = answers(model, [{"x": x}], tmp_path)
    wanted = x @ restored(*_onnx_schemes.blockwise(w, bits), bits, 40) + b
    # `accuracy_level` 4 rounds the inputs to eight bits by blocks.
    assert np.abs(found["logits"] - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.abs(wanted - (x @ w + b)).max() > (0.1 if bits == 4 else 0.005)


@pytest.mark.slow
def test_layers_that_four_bits_cost_too_much_get_eight(full, runs, tmp_path, monkeypatch):
    _, path = exported("bert-tokens", tmp_path / "m.onnx", runs, precision="int4")
    kept = json.loads(
        exporters.load("onnx").inspect(path).facts["metadata"]["lora_export.kept_wider"]
    )
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    bits = collections.Counter(
        attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"
    )
    assert bits == {4: 12 - len(kept), 8: len(kept)}
    assert 0 < len(kept) < 12
    monkeypatch.setattr(_onnx_choose, "TARGET", 1e9)
    _, small = exported("bert-tokens", tmp_path / "small.onnx", runs, precision="int4")
    assert small.stat().st_size < path.stat().st_size


# ---------------------------------------------------------------- which layers stay


def test_layers_are_named_by_their_place_in_the_model(graph):
    assert "bert.encoder.layer.1.attention.self.value" in linears(graph)
    assert len(linears(graph)) == 12


@pytest.fixture
def chosen(full, graph, runs):
    """Return the choice among `schemes` on the small BERT."""
    return lambda *schemes, on=runs: choose(graph, full[0], on, schemes)


def test_a_loss_that_is_small_enough_keeps_no_layer(chosen, monkeypatch):
    monkeypatch.setattr(_onnx_choose, "TARGET", 1e9)
    assert chosen(Dynamic) == (Dynamic, ())


def test_without_inputs_to_judge_by_no_layer_is_kept(chosen):
    assert chosen(Dynamic, Blocks, on=[]) == (Dynamic, ())


def test_a_loss_that_nothing_reaches_keeps_every_layer(chosen, graph, monkeypatch):
    monkeypatch.setattr(_onnx_choose, "TARGET", -1.0)
    assert set(chosen(Dynamic)[1]) == linears(graph).keys()


def loss_of(graph, signature, runs, tmp_path, scheme, kept):
    """Return the loss of a graph of its own."""
    trial = graph.clone()
    quantise(trial, scheme(), kept)
    both = (answers(model, runs, tmp_path) for model in (graph, trial))
    return _onnx_choose._loss(signature, runs, *both)


def test_the_most_sensitive_layers_are_kept_and_no_more(
    full, chosen, graph, runs, tmp_path, monkeypatch
):
    """What is found by a graph for each layer alone, against the choice within one."""
    loss = partial(loss_of, graph, full[0], runs, tmp_path, Dynamic)
    layers = list(linears(graph))
    alone = {layer: loss([x for x in layers if x != layer]) for layer in layers}
    ranked = sorted(alone, key=alone.get, reverse=True)
    target = loss(ranked[:3]) * 1.001
    monkeypatch.setattr(_onnx_choose, "TARGET", target)
    _, kept = chosen(Dynamic)
    assert kept == tuple(ranked[: len(kept)])
    assert 1 <= len(kept) <= 3
    assert loss(kept) <= target
    assert loss(kept[:-1]) > target


def test_the_scheme_that_loses_least_is_taken(full, chosen, graph, runs, tmp_path):
    reach = ranges(graph, runs)[0]
    narrow = {name: value / 50 for name, value in reach.items()}
    schemes = [partial(Static, narrow), partial(Static, reach)]
    assert chosen(*schemes)[0] is schemes[1]
    first, second = (loss_of(graph, full[0], runs, tmp_path, one, ()) for one in schemes)
    assert second < first / 2


def test_a_scheme_without_an_answer_is_not_the_one_that_loses_least(chosen, monkeypatch):
    losses = iter([np.nan, 0.5, 0.2])
    monkeypatch.setattr(_onnx_choose, "_trial_loss", lambda *_: next(losses))
    schemes = [partial(Dynamic, largest) for largest in (127, 64, 32)]
    assert chosen(*schemes)[0] is schemes[2]


def test_products_are_counted_in_the_graph(graph, runs):
    """Of pictures it is not the pixels that are multiplied, so no input says how many there are."""
    found, products = _onnx_choose._asked(graph, runs)
    sizes = sum(matrix(node).size for nodes in linears(graph).values() for node in nodes)
    assert products == [4 * 9 * sizes] * 3
    assert [list(one) for one in found] == [["logits"]] * 3


def test_neighbours_are_tried_together_where_each_alone_is_too_much_work(monkeypatch):
    layers = list("abcdefghijkl")
    monkeypatch.setattr(_onnx_choose, "MOST_PRODUCTS", 12 * 100)
    assert _onnx_choose._groups(layers, 100) == [[layer] for layer in layers]
    groups = _onnx_choose._groups(layers, 450)
    assert [len(group) for group in groups] == [5, 5, 2]
    assert [layer for group in groups for layer in group] == layers


def test_a_large_model_is_tried_on_fewer_inputs_in_groups(chosen, graph, runs, monkeypatch):
    monkeypatch.setattr(_onnx_choose, "MOST_PRODUCTS", 16 * 250)
    assert _onnx_choose._affordable([100, 100, 100]) == 2
    assert _onnx_choose._affordable([10, 10, 10]) == 3
    assert _onnx_choose._affordable([9999, 9999]) == 1
    _, products = _onnx_choose._asked(graph, runs)
    monkeypatch.setattr(_onnx_choose, "MOST_PRODUCTS", 3 * products[0])
    monkeypatch.setattr(_onnx_choose, "TARGET", -1.0)
    assert set(chosen(Dynamic)[1]) == linears(graph).keys()


def test_what_is_kept_stands_in_the_file_and_is_kept(full, runs, tmp_path, monkeypatch):
    whole = _onnx_choose.choose
    few = ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.key")
    monkeypatch.setattr(_onnx_choose, "choose", lambda *given: (whole(*given)[0], few))
    _, path = exported("bert-tokens", tmp_path / "m.onnx", runs, precision="int8", target="generic")
    said = exporters.load("onnx").inspect(path).facts["metadata"]
    assert tuple(json.loads(said["lora_export.kept_wider"])) == few
    made = {"layers": 12, "static": False, "target": "generic"}
    assert json.loads(said["lora_export.quantised"]) == made
    assert counts(path)["MatMulInteger"] == 10


def test_a_model_in_which_nothing_would_be_narrow_is_refused(full, graph, runs, monkeypatch):
    """A file of float32 would pass every check, and be called int8."""
    monkeypatch.setattr(_onnx_choose, "TARGET", -1.0)
    with pytest.raises(ExportFailed, match="int8 costs too much in each of 12 layers"):
        _onnx_choose.narrow(graph, asked(full[0], runs, "int8"), static=False)
    monkeypatch.setattr(_onnx_choose, "linears", lambda _: {})
    for precision, static in (("int8", False), ("int8", True), ("int4", False)):
        with pytest.raises(ExportFailed, match=f"no linear layer that {precision}"):
            _onnx_choose.narrow(graph, asked(full[0], runs, precision), static=static)


def test_a_long_search_says_what_it_does(full, graph, runs, monkeypatch):
    monkeypatch.setattr(_onnx_choose, "TARGET", -1.0)
    stages = []
    request = dataclasses.replace(asked(full[0], runs, "int8"), say=stages.append)
    with pytest.raises(ExportFailed, match="costs too much"):
        _onnx_choose.narrow(graph, request, static=True)
    assert stages[0] == "finding the ranges of activations"
    assert stages[1].startswith("trying each of 12 layers alone")
    assert stages[2] == "finding how many of them have to stay wider"


def one_output(name, axes):
    return Signature((), (TensorSpec(name, "float32", axes),), 9, 9, 0)


def test_the_loss_is_the_divergence_of_probabilities():
    p, q = np.array([[0.7, 0.3]]), np.array([[0.6, 0.4]])
    given = [{"logits": np.log(p) + 5}], [{"logits": np.log(q) - 3}]
    found = _onnx_choose._loss(one_output("logits", ("batch", 2)), [{}], *given)
    assert found == pytest.approx(float((p * np.log(p / q)).sum()))


def test_the_loss_of_an_embedding_is_its_turn():
    a, b = np.array([[3.0, 0.0]]), np.array([[1.0, 1.0]])
    signature = one_output("sentence_embedding", ("batch", 2))
    given = [{"sentence_embedding": a}], [{"sentence_embedding": b}]
    assert _onnx_choose._loss(signature, [{}], *given) == pytest.approx(1 - np.sqrt(0.5))


def test_the_loss_of_a_score_is_its_drift():
    """Its direction is a sign, and its softmax is one."""
    a = np.array([[1.0], [2.0], [4.0]])
    signature = one_output("logits", ("batch", 1))
    found = _onnx_choose._loss(signature, [{}], [{"logits": a}], [{"logits": a + 0.5}])
    assert found == pytest.approx(0.25 / a.var())


def test_padding_costs_nothing():
    signature = one_output("logits", ("batch", "sequence", 2))
    ids = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
    signature = dataclasses.replace(signature, inputs=(ids,))
    a, mask = np.zeros((1, 3, 2)), np.array([[1, 1, 0]])
    losses = []
    for place in (1, 2):
        b = a.copy()
        b[0, place] = 5, -5
        run = {"attention_mask": mask}
        losses.append(_onnx_choose._loss(signature, [run], [{"logits": a}], [{"logits": b}]))
    assert losses[0] > 1
    assert losses[1] == 0


# ---------------------------------------------------------------- graphs of all kinds


def test_a_bias_beyond_its_weights_is_kept(tmp_path):
    """Dead outputs, whose weights have decayed, keep what their bias says."""
    x, w = np.ones((3, 40), np.float32), np.zeros((40, 24), np.float32)
    w[:, 1] = 1e-9
    b = np.linspace(-0.5, 0.7, 24).astype(np.float32)
    for signed in (False, True):
        model = one_layer(x, w, b)
        quantise(model, Static({"x": 1.0}, signed=signed))
        (found,) = answers(model, [{"x": x}], tmp_path)
        np.testing.assert_allclose(found["logits"], np.tile(b, (3, 1)), atol=1e-6)


@pytest.mark.parametrize("scheme", [Dynamic, partial(Static, {"x": 3.0, "y": 30.0}), Blocks])
def test_a_weight_that_is_used_as_it_is_and_transposed_is_two(tmp_path, scheme):
    dice = np.random.default_rng(0)
    x, w = (dice.normal(size=shape).astype(np.float32) for shape in ((5, 32), (32, 32)))
    weight = ir.val("w", const_value=ir.tensor(w, name="w"))
    bias = ir.val("b", const_value=ir.tensor(np.zeros(32, np.float32), name="b"))
    given = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("rows", 32)))
    first = ir.node("Gemm", [given, weight, bias], name="first")
    second = ir.node("Gemm", [first.outputs[0], weight, bias], {"transB": 1}, name="second")
    for node, name in ((first, "y"), (second, "logits")):
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{node.name}', 'linear']"
    nodes = [first, second]
    graph = ir.Graph([given], second.outputs, nodes=nodes, initializers=[weight, bias], name="two")
    graph.opset_imports[""] = 20
    model = ir.Model(graph, ir_version=10)
    quantise(model, scheme())
    (found,) = answers(model, [{"x": x}], tmp_path)
    wanted = x @ w @ w.T
    assert np.abs(found["logits"] - wanted).max() < 0.15 * np.abs(wanted).max()


def test_an_embedding_is_made_bytes_of_once(full, runs, tmp_path):
    """int4 keeps some layers in eight bits; that is no reason to look at embeddings again."""
    _, four = exported("bert-tokens", tmp_path / "four.onnx", runs, precision="int4")
    _, eight = exported("bert-tokens", tmp_path / "eight.onnx", runs, precision="int8")
    assert counts(four)["Gather"] == counts(eight)["Gather"]
    assert not [name for name in arrays_of(four) if "scale_" in name]


@pytest.mark.parametrize("form", [{"precision": "int8"}, {"precision": "int4"},
                                  {"precision": "int8", "static": True}], ids=str)  # fmt: skip
def test_a_layer_that_is_applied_several_times_is_narrow_each_time(tmp_path, form):
    """ALBERT's layers share their weights, and their inputs are met in the order of the graph."""
    model = families.build("albert")
    signature = calling.interface_of(model, families.tokens_of(model)).signature
    runs = [inputs.made(signature, 4, 9, "right", 0)]
    _, plain = exported("albert", tmp_path / "plain.onnx")
    _, path = exported("albert", tmp_path / "m.onnx", runs, **form)
    onnx.checker.check_model(path, full_check=form["precision"] == "int8")
    made = inputs.made(signature, 3, 6, "right", 1)
    found, wanted = (OnnxRunner(file, 1).run(made)["logits"] for file in (path, plain))
    most = 0.3 if form["precision"] == "int4" else 0.1
    assert 0 < np.abs(found - wanted).max() < most * np.abs(wanted).max() + 0.05
