import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hand_made import (
    LABELS,
    LOGITS,
    TEXTS,
    account,
    audit,
    batches,
    certificate,
    evidence,
    per_token,
    recording,
    recordings,
    timing,
    verdict,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lora_export import checks, codec
from lora_export.errors import InputError
from lora_export.records import Batch, Certificate, Evidence, FileDigest, Status, Verdict

quick = settings(deadline=None, max_examples=25)


def _there_and_back(value, kind=Evidence):
    with tempfile.TemporaryDirectory() as folder:
        codec.save(value, Path(folder), "evidence")
        return codec.load(kind, Path(folder), "evidence")


# ---------------------------------------------------------------- there and back

NAMES = st.lists(st.text(max_size=8), max_size=4).map(tuple)
# Nonzero everywhere, so that the smallest noise floor is not zero.
VALUES = st.floats(0.125, 8.0, width=32) | st.sampled_from([np.nan, np.inf])
ANSWERS = st.tuples(*(hnp.arrays(np.float32, logits.shape, elements=VALUES) for logits in LOGITS))
COUNTS = st.integers(0, 99)
AUDITS = st.builds(audit, st.text(max_size=8), elements=COUNTS, misrounded=COUNTS, unmoved=COUNTS,
                   largest_ulp=st.floats(0, 9), lost_share=st.floats(0, 1))  # fmt: skip
DIGESTS = st.lists(st.builds(FileDigest, st.text(max_size=8), COUNTS, st.text(max_size=4)))
RATIOS = st.floats(0.25, 4.0)


@st.composite
def observed(draw):
    """Evidence of a run, sound or not, with parts that may be missing."""
    found = recordings([np.abs(logits) for logits in LOGITS])
    for name in draw(st.sets(st.sampled_from(sorted(found)))):
        found[name] = recording(name, draw(ANSWERS))
    groups = {name: draw(NAMES) for name in ("adapter_left", "base_damaged", "unexplained")}
    made = evidence(
        account=draw(st.none() | st.just(account(**groups))),
        weights=tuple(draw(st.lists(AUDITS, max_size=3))),
        recordings={name: found[name] for name in draw(st.sets(st.sampled_from(sorted(found))))},
        timings=(timing(draw(st.integers(0, 12)), onnx=draw(RATIOS), merged=draw(RATIOS)),),
        files=tuple(draw(DIGESTS)),
        files_now=tuple(draw(DIGESTS)),
    )
    parts = {"modules": None, "signature": None, "artifacts": ()}
    missing = draw(st.sets(st.sampled_from(sorted(parts))))
    return dataclasses.replace(made, **{name: parts[name] for name in missing})


@quick
@given(observed())
def test_evidence_is_judged_the_same_after_saving_and_loading(found):
    again = _there_and_back(found)
    for scope in (checks.MERGE, checks.EXPORT, checks.RUN):
        assert checks.judge(again, scope) == checks.judge(found, scope)


@quick
@given(hnp.arrays(st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, bool]),
                  hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))  # fmt: skip
def test_arrays_come_back_bit_for_bit(array):
    batch = Batch("grid", "", {"x": array})
    (again,) = _there_and_back((batch,), tuple[Batch, ...])
    found = again.arrays["x"]
    assert (found.dtype, found.shape, found.tobytes()) == (
        array.dtype, array.shape, array.tobytes(),
    )  # fmt: skip


def test_an_array_that_is_a_view_comes_back_as_it_looks():
    (again,) = _there_and_back(
        (Batch("grid", "", {"x": np.arange(6).reshape(2, 3).T}),), tuple[Batch, ...]
    )
    assert again.arrays["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_texts_and_labels_come_back():
    again = _there_and_back(evidence())
    assert again.batches[0].texts == TEXTS
    assert again.batches[0].labels == LABELS


def test_mappings_keep_their_order():
    # Verdicts and measurements are listed in the order in which the runners were timed.
    again = _there_and_back(evidence(timings=(timing(onnx=0.5, merged=1.0),)))
    assert list(again.timings[0].samples_ms) == ["unmerged", "onnx", "merged"]


def test_records_without_arrays_come_back_equal():
    found = dataclasses.replace(evidence(), batches=(), recordings={}, alone=(), graphs=())
    assert _there_and_back(found) == found


def test_evidence_of_nothing_comes_back_equal():
    assert _there_and_back(Evidence()) == Evidence()


def test_axes_that_are_names_and_axes_that_are_numbers_come_back_as_such():
    (spec,) = _there_and_back(per_token()).signature.outputs
    assert spec.axes == ("batch", "sequence", 2)


def test_a_certificate_comes_back_equal():
    made = certificate(verdict(), verdict(Status.NOT_RUN, measured=None, limit=None))
    assert codec.from_json(Certificate, codec.to_json(made, {}), {}) == made


def test_the_same_evidence_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        codec.save(evidence(), tmp_path, name)
    for suffix in ("json", "safetensors"):
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_arrays_are_kept_out_of_the_json(tmp_path):
    codec.save(evidence(), tmp_path, "evidence")
    saved = json.loads((tmp_path / "evidence.json").read_text())
    assert saved["value"]["batches"][0]["arrays"]["input_ids"].startswith("array:")


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved():
    """The JSON of sound evidence, and the bytes of its arrays."""
    with tempfile.TemporaryDirectory() as folder:
        codec.save(evidence(), Path(folder), "evidence")
        text, data = (Path(folder, f"evidence.{s}").read_bytes() for s in ("json", "safetensors"))
    return json.loads(text), data


def _load(folder, content, data):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "evidence.json").write_bytes(text)
    if data is not None:
        (folder / "evidence.safetensors").write_bytes(data)
    return codec.load(Evidence, folder, "evidence")


def _changed(content, place, value):
    """A copy of `content` in which `value` stands at `place`."""
    made = copy.deepcopy(content)
    *path, last = place
    inner = made["value"]
    for step in path:
        inner = inner[step]
    inner[last] = value
    return made


def test_what_is_not_damaged_is_read(tmp_path, saved):
    assert _load(tmp_path, *saved).account == account()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("batches", 0, "source"), 3),
        (("batches", 0, "labels", 1), "one"),
        (("batches", 1, "texts"), "a text"),
        (("weights", 0, "elements"), "many"),
        (("weights", 0, "elements"), 1.5),
        (("weights", 0, "elements"), True),
        (("weights", 0, "lost_share"), "little"),
        (("weights", 0, "lost_share"), False),
        (("weights", 0, "lost_share"), None),
        (("timings", 0, "samples_ms", "onnx", 0), "fast"),
        (("timings", 0, "samples_ms"), [1.0]),
        (("artifacts", 0, "inputs", 1, "axes", 0), 1.5),
        (("artifacts", 0, "inputs", 1, "axes", 0), None),
        (("artifacts", 0, "facts"), []),
        (("artifacts", 0), "onnx"),
        (("recordings", "onnx"), None),
        (("recordings", "onnx", "outputs"), {}),
        (("recordings", "onnx", "outputs", 0, "logits"), [1.0, 2.0]),
        (("files", 0, "size_bytes"), "100"),
        (("floor",), 1),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_its_place_named(tmp_path, saved, place, value):
    where = "/".join(map(str, place))
    with pytest.raises(InputError, match=f"the record (is damaged|lacks the array) at /{where}"):
        _load(tmp_path, _changed(saved[0], place, value), saved[1])


@pytest.mark.parametrize("value", [1, "all", [], {}, {"adapter_merged": []}])
def test_an_optional_record_of_the_wrong_type_is_refused(tmp_path, saved, value):
    with pytest.raises(InputError, match="the record is damaged at /account"):
        _load(tmp_path, _changed(saved[0], ("account",), value), saved[1])


@pytest.mark.parametrize("place", [(), ("batches", 0), ("weights", 0), ("recordings", "onnx")])
def test_an_unknown_field_is_refused_and_its_place_named(tmp_path, saved, place):
    where = "/".join(map(str, place))
    content = _changed(saved[0], (*place, "extra"), 1)
    with pytest.raises(InputError, match=f"the record is damaged at /{where}: not a"):
        _load(tmp_path, content, saved[1])


@pytest.mark.parametrize("place", [("account",), ("batches", 0, "note"), ("files", 1, "digest")])
def test_a_missing_field_is_refused_and_its_place_named(tmp_path, saved, place):
    content = copy.deepcopy(saved[0])
    inner = content["value"]
    for step in place[:-1]:
        inner = inner[step]
    del inner[place[-1]]
    where = "/".join(map(str, place[:-1]))
    with pytest.raises(InputError, match=f"the record is damaged at /{where}: not a"):
        _load(tmp_path, content, saved[1])


@pytest.mark.parametrize("value", ["array:/nowhere", "/batches/0/arrays/input_ids", "array:"])
def test_a_missing_array_is_refused_and_its_place_named(tmp_path, saved, value):
    content = _changed(saved[0], ("batches", 0, "arrays", "input_ids"), value)
    with pytest.raises(InputError, match="lacks the array at /batches/0/arrays/input_ids"):
        _load(tmp_path, content, saved[1])


@pytest.mark.parametrize("schema", [1, 4, 0, "5", None])
def test_another_schema_is_refused(tmp_path, saved, schema):
    content = saved[0] | {"schema": schema}
    with pytest.raises(InputError, match=f"has schema {schema}; this version: 5"):
        _load(tmp_path, content, saved[1])


def test_evidence_without_a_schema_is_refused(tmp_path, saved):
    with pytest.raises(InputError, match="has schema None"):
        _load(tmp_path, {"value": saved[0]["value"]}, saved[1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b'{"schema": 5', "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"schema": 5}', "the record is damaged at /: not a Evidence"),
        (b'{"schema": 5, "value": "\xff\xfe"}', r"evidence\.json"),
        (b'{"schema": 5, "value": ' + b"9" * 5000 + b"}", r"evidence\.json"),
        (b'{"schema": 5, "value": ' + b"[" * 100_000, r"evidence\.json"),
    ],
    ids=["empty", "cut short", "a list", "no value", "no text", "a huge number", "too deep"],
)
def test_a_file_that_holds_no_record_is_refused(tmp_path, saved, text, said):
    with pytest.raises(InputError, match=said):
        _load(tmp_path, text, saved[1])


def test_a_number_too_large_for_a_float_is_refused(tmp_path, saved):
    content = _changed(saved[0], ("weights", 0, "lost_share"), 10**400)
    with pytest.raises(InputError, match="/weights/0/lost_share"):
        _load(tmp_path, content, saved[1])


def test_absent_evidence_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*evidence\.json"):
        codec.load(Evidence, tmp_path, "evidence")


def test_evidence_without_its_arrays_is_refused(tmp_path, saved):
    with pytest.raises(InputError, match=r"cannot read .*evidence\.safetensors"):
        _load(tmp_path, saved[0], None)


def test_arrays_that_are_cut_short_are_refused(tmp_path, saved):
    with pytest.raises(InputError, match="truncated"):
        _load(tmp_path, saved[0], saved[1][:-1])


def test_an_unknown_status_is_refused():
    value = codec.to_json(verdict(), {}) | {"status": "passed"}
    with pytest.raises(InputError, match="the record is damaged at /status: 'passed'"):
        codec.from_json(Verdict, value, {})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def _places(value, at=()):
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*at, key))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _places(inner, (*at, index))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_json_anywhere_gives_a_whole_record_or_an_input_error(saved, data):
    places = [place for place in _places(saved[0]["value"]) if place]
    content = _changed(saved[0], data.draw(st.sampled_from(places)), data.draw(JSON))
    arrays = {f"/batches/{i}/arrays/{n}": a for i, b in enumerate(batches())
              for n, a in b.arrays.items()}  # fmt: skip
    arrays |= {f"/recordings/{r}/outputs/{i}/logits": logits for r in recordings()
               for i, logits in enumerate(LOGITS)}  # fmt: skip
    found = message = None
    try:
        found = codec.from_json(Evidence, content["value"], arrays)
    except InputError as error:
        message = str(error)
    if found is None:
        assert " at /" in message
    else:
        assert codec.to_json(found, {}) == content["value"]
