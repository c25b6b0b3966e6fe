"""The audit of a merge must see every kind of damage: each test damages a good merge and looks."""

import dataclasses
import itertools
import math

import numpy as np
import on_disk
import pytest
from hand_made import edit_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from live_made import CASES

from lora_export import auditing, checks, merged_files, storage
from lora_export.opening import Options, open_job
from lora_export.records import Evidence
from lora_export.storage import Checkpoint, NewTensor


@pytest.fixture(scope="module")
def merged(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    path, _ = tiny_adapter(folder, str(tiny_base))
    merged_files.merge_files(path, out=folder / "merged")
    return open_job(path), Checkpoint.open(folder / "merged")


@pytest.fixture
def verdicts(merged, tmp_path):
    """Judge the merge after `change` has been made to the written tensors."""
    job, written = merged

    def judge(change):
        arrays = {name: info.array() for name, info in written.tensors.items()}
        change(arrays)
        file = tmp_path / storage.SINGLE
        storage.write_safetensors(file, [NewTensor.of(n, a) for n, a in arrays.items()], {})
        damaged = Checkpoint.open(tmp_path)
        evidence = Evidence(
            account=auditing.account(job.plan, job.adapter, job.checkpoint, damaged),
            weights=auditing.weights(job.plan, job.adapter, job.checkpoint, damaged),
        )
        found = checks.judge(evidence, checks.MERGE)
        return {(v.check, v.subject): v.passed for v in found if v.check != "plain"}

    return judge


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
MISROUNDED = ("exact", "merged weights")
STOOD_STILL = ("exact", "weights that move")
ADAPTER, BASE = ("accounted", "adapter tensors"), ("accounted", "base tensors")


def failed(found):
    return {name for name, passed in found.items() if not passed}


def test_an_undamaged_merge_passes(verdicts):
    assert failed(verdicts(lambda arrays: None)) == set()


def test_one_weight_off_by_one_ulp_fails(verdicts):
    def change(arrays):
        arrays[QUERY][3, 4] = np.nextafter(arrays[QUERY][3, 4], np.float32(9))

    assert failed(verdicts(change)) == {MISROUNDED}


def test_a_wrong_scale_fails(merged, verdicts):
    job, _ = merged
    base = job.checkpoint.tensors[QUERY.removeprefix("bert.")].array()

    def change(arrays):
        arrays[QUERY] = base + (arrays[QUERY] - base) * np.float32(1.01)

    assert MISROUNDED in failed(verdicts(change))


def test_a_layer_that_was_not_merged_fails(merged, verdicts):
    job, _ = merged

    def change(arrays):
        arrays[QUERY] = job.checkpoint.tensors[QUERY.removeprefix("bert.")].array()

    assert failed(verdicts(change)) == {MISROUNDED, STOOD_STILL}


def test_a_transposed_update_fails(merged, verdicts):
    job, _ = merged
    pair = job.adapter.modules[QUERY.removesuffix(".weight")]

    def change(arrays):
        base = job.checkpoint.tensors[QUERY.removeprefix("bert.")].array()
        arrays[QUERY] = base + pair.scale * (pair.b @ pair.a).T

    assert MISROUNDED in failed(verdicts(change))


def test_a_value_that_is_no_number_fails(verdicts):
    def change(arrays):
        arrays[QUERY][0, 0] = np.nan

    assert MISROUNDED in failed(verdicts(change))


def test_a_changed_base_tensor_fails(verdicts):
    def change(arrays):
        arrays["bert.embeddings.LayerNorm.bias"][0] += np.float32(1e-6)

    assert failed(verdicts(change)) == {BASE}


def test_a_lost_head_fails(verdicts):
    assert failed(verdicts(lambda arrays: arrays.pop("classifier.weight"))) == {ADAPTER}


def test_a_random_head_fails(verdicts):
    def change(arrays):
        arrays["classifier.weight"] = arrays["classifier.weight"] + np.float32(0.1)

    assert failed(verdicts(change)) == {ADAPTER}


def test_a_tensor_out_of_nowhere_fails(verdicts):
    def change(arrays):
        arrays["bert.extra.weight"] = np.zeros(3, np.float32)

    assert failed(verdicts(change)) == {BASE}


def test_an_adapter_module_that_was_left_over_fails(merged):
    job, written = merged
    adapter = dataclasses.replace(
        job.adapter,
        modules={**job.adapter.modules, "more": next(iter(job.adapter.modules.values()))},
    )
    account = auditing.account(job.plan, adapter, job.checkpoint, written)
    assert account.adapter_left == ("more",)


def test_the_share_lost_in_rounding_grows_with_a_narrower_dtype(merged, tmp_path):
    job, written = merged
    fine = auditing.weights(job.plan, job.adapter, job.checkpoint, written)
    merged_files.merge_files(job.source, out=tmp_path / "bf16", dtype="bfloat16")
    narrow = open_job(job.source, options=Options(dtype="bfloat16"))
    coarse = auditing.weights(
        narrow.plan, job.adapter, job.checkpoint, Checkpoint.open(tmp_path / "bf16")
    )
    assert max(a.lost_share for a in fine) < 1e-6 < min(a.lost_share for a in coarse)
    assert sum(a.misrounded for a in coarse) == 0


# ---------------------------------------------------------------- a sample of large models


@given(
    name=st.text(),
    rows=st.integers(1, 300),
    unit=st.integers(1, 40),
    most=st.none() | st.integers(1, 5000),
)
@settings(deadline=None)
def test_the_places_to_look_at_are_whole_rows_and_none_twice(name, rows, unit, most):
    size = rows * unit
    spans = auditing._looks(name, size, unit, most)
    assert spans == auditing._looks(name, size, unit, most)
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(start < stop for start, stop in spans)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert all(edge % unit == 0 for span in spans for edge in span)
    looked_at = sum(stop - start for start, stop in spans)
    if most is None or size <= most:
        assert looked_at == size
    else:
        assert looked_at <= max(most, 4 * unit)


def test_a_sample_is_told_by_the_number_of_its_elements(merged):
    job, written = merged
    every = auditing.weights(job.plan, job.adapter, job.checkpoint, written)
    some = auditing.weights(job.plan, job.adapter, job.checkpoint, written, 1000)
    assert [(a.elements, a.of) for a in every] == [(a.of, a.of) for a in some]
    assert all(0 < a.elements < a.of for a in some)


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_sample_sees_the_ends_of_every_tensor(merged, tmp_path, place):
    job, written = merged
    arrays = {name: info.array() for name, info in written.tensors.items()}
    for value in arrays.values():
        value.reshape(-1)[place] += np.float32(0.5)
    file = tmp_path / storage.SINGLE
    storage.write_safetensors(file, [NewTensor.of(n, a) for n, a in arrays.items()], {})
    everything = (job.plan, job.adapter, job.checkpoint, Checkpoint.open(tmp_path), 1000)
    account = auditing.account(*everything)
    assert account.base_identical == ()
    assert account.adapter_placed == ()
    assert {audit.misrounded for audit in auditing.weights(*everything)} == {1}


@pytest.fixture
def damaged(merged, tmp_path):
    """The merged checkpoint after `change` has been made to its tensors."""

    def make(change):
        arrays = {name: info.array() for name, info in merged[1].tensors.items()}
        change(arrays)
        file = tmp_path / storage.SINGLE
        storage.write_safetensors(file, [NewTensor.of(n, a) for n, a in arrays.items()], {})
        return Checkpoint.open(tmp_path)

    return make


def beside(name, info, unit, of_each):
    """An element that the sample of a tensor does not hold."""
    size = math.prod(info.shape)
    looks = auditing._looks(name, size, unit, of_each)
    gaps = [stop for (_, stop), (start, _) in itertools.pairwise(looks) if stop < start]
    assert gaps, "the sample is everything"
    return gaps[0]


MOST = 2000  # elements of all tensors


def test_what_a_sample_misses_the_full_audit_finds(merged, damaged):
    job, written = merged
    merges = [step for step in job.plan.steps if step.parts]
    copies = job.plan.of("copy")
    name, copy = merges[1].name, max(copies, key=lambda step: step.size)
    in_merges = MOST // (auditing._SHARE * len(merges))
    in_copies = max(MOST // (auditing._SHARE * len(copies)), 1)

    def change(arrays):
        for of, unit, share in ((name, 32, in_merges), (copy.name, 1, in_copies)):
            place = beside(of, written.tensors[of], unit, share)
            arrays[of].reshape(-1)[place] += np.float32(0.25)

    everything = (job.plan, job.adapter, job.checkpoint, damaged(change))
    sampled = auditing.weights(*everything, MOST)
    assert not any(audit.misrounded for audit in sampled)
    assert auditing.account(*everything, MOST).base_damaged == ()
    found = {audit.tensor: audit.misrounded for audit in auditing.weights(*everything)}
    assert {tensor for tensor, count in found.items() if count} == {name}
    assert found[name] == 1
    assert auditing.account(*everything).base_damaged == (copy.source,)


@pytest.mark.parametrize("fault", ["scale", "transposed", "not merged", "another's"])
def test_a_fault_of_a_whole_tensor_is_found_in_a_sample(merged, damaged, fault):
    job, _ = merged
    base = job.checkpoint.tensors[QUERY.removeprefix("bert.")].array()
    pair = job.adapter.modules[QUERY.removesuffix(".weight")]
    update = pair.scale * (pair.b @ pair.a)

    def change(arrays):
        arrays[QUERY] = {
            "scale": base + np.float32(1.01) * update,
            "transposed": base + update.T,
            "not merged": base,
            "another's": arrays[QUERY.replace("query", "value")],
        }[fault]

    everything = (job.plan, job.adapter, job.checkpoint, damaged(change), MOST)
    found = {audit.tensor: audit for audit in auditing.weights(*everything)}
    assert {name for name, audit in found.items() if audit.misrounded} == {QUERY}
    assert 0 < found[QUERY].elements < found[QUERY].of
    assert found[QUERY].misrounded > found[QUERY].elements / 2


def test_a_copied_tensor_that_is_another_is_found_in_a_sample(merged, damaged):
    job, _ = merged
    one, other = (f"bert.encoder.layer.{i}.output.LayerNorm.weight" for i in (0, 1))

    def change(arrays):
        arrays[one], arrays[other] = arrays[other], arrays[one]

    account = auditing.account(job.plan, job.adapter, job.checkpoint, damaged(change), MOST)
    assert set(account.base_damaged) == {one.removeprefix("bert."), other.removeprefix("bert.")}


# ---------------------------------------------------------------- every kind of update


@pytest.fixture
def merge_of(bases, tmp_path):
    """`merge_of(case)`: the job of a hand-made adapter, and the directory of its merge."""

    def make(case):
        family, tensors, config = CASES[case]
        place = on_disk.peft_folder(tmp_path / "adapter", tensors, **config)
        base = str(bases(family))
        assert merged_files.merge_files(place, base=base, out=tmp_path / "merged").ok
        return open_job(place, base), tmp_path / "merged"

    return make


def audited(job, folder, adapter=None):
    found = auditing.weights(
        job.plan, adapter or job.adapter, job.checkpoint, Checkpoint.open(folder)
    )
    return {audit.tensor: audit for audit in found}


@pytest.mark.parametrize("case", CASES)
def test_one_element_off_by_two_ulp_is_seen_in_every_kind_of_update(merge_of, case):
    job, folder = merge_of(case)
    clean = audited(job, folder)
    assert clean
    assert not any(audit.misrounded or audit.unmoved for audit in clean.values())

    def change(arrays):
        for name in clean:
            flat, middle = arrays[name].reshape(-1), arrays[name].size // 2
            for _ in range(2):  # at a tie the neighbour is as near
                flat[middle] = np.nextafter(flat[middle], np.float32(99))

    (file,) = folder.glob("*.safetensors")
    edit_tensors(file, change)
    assert {audit.misrounded for audit in audited(job, folder).values()} == {1}


@pytest.mark.parametrize("case", CASES)
def test_a_sample_of_every_kind_of_update_is_clean_and_sees_another_scale(merge_of, case):
    job, folder = merge_of(case)
    written = Checkpoint.open(folder)
    everything = (job.plan, job.adapter, job.checkpoint, written)
    most = sum(audit.of for audit in auditing.weights(*everything)) // 2
    for few in (most, 1):
        found = auditing.weights(*everything, few)
        assert found
        assert not any(audit.misrounded or audit.unmoved for audit in found)
        assert any(audit.elements < audit.of for audit in found)
    modules = {
        path: dataclasses.replace(pair, scale=pair.scale * 1.5)
        for path, pair in job.adapter.modules.items()
    }
    other = dataclasses.replace(job.adapter, modules=modules)
    for audit in auditing.weights(job.plan, other, job.checkpoint, written, most):
        assert audit.misrounded or (case == "rows" and "embed" in audit.tensor)


@pytest.mark.parametrize("case", CASES)
def test_another_adapter_of_the_same_kind_is_seen(merge_of, case):
    """The weights were merged from other factors than those that they are held against."""
    job, folder = merge_of(case)
    modules = {
        path: dataclasses.replace(
            pair, b=pair.b[..., ::-1, :].copy() if pair.b.ndim < 4 else -pair.b
        )
        for path, pair in job.adapter.modules.items()
    }
    found = audited(job, folder, dataclasses.replace(job.adapter, modules=modules))
    touched = [audit for name, audit in found.items() if not name.endswith(".bias")]
    if case == "rows":
        touched = [audit for audit in touched if "embed" not in audit.tensor]
    assert touched
    assert all(audit.misrounded > audit.elements / 4 for audit in touched)


# ---------------------------------------------------------------- what a wrong tensor holds


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_how_much_of_the_update_is_there_is_measured(merged, tmp_path, factor):
    job, written = merged
    arrays = {name: info.array() for name, info in written.tensors.items()}
    base = job.checkpoint.tensors[QUERY.removeprefix("bert.")].array()
    arrays[QUERY] = base + (arrays[QUERY] - base) * np.float32(factor)
    storage.write_safetensors(
        tmp_path / storage.SINGLE, [NewTensor.of(n, a) for n, a in arrays.items()], {}
    )
    found = auditing.weights(job.plan, job.adapter, job.checkpoint, Checkpoint.open(tmp_path))
    one = next(audit for audit in found if audit.tensor == QUERY)
    assert one.applied == pytest.approx(factor, abs=1e-5)
    assert one.strange < 1e-5


def test_another_update_is_told_from_a_multiple(merged, tmp_path):
    job, written = merged
    arrays = {name: info.array() for name, info in written.tensors.items()}
    base = job.checkpoint.tensors[QUERY.removeprefix("bert.")].array()
    arrays[QUERY] = base + (arrays[QUERY] - base).T
    storage.write_safetensors(
        tmp_path / storage.SINGLE, [NewTensor.of(n, a) for n, a in arrays.items()], {}
    )
    found = auditing.weights(job.plan, job.adapter, job.checkpoint, Checkpoint.open(tmp_path))
    one = next(audit for audit in found if audit.tensor == QUERY)
    assert one.strange > 0.5
    # against plain sums over the matrices
    pair = job.adapter.modules[QUERY.removesuffix(".weight")]
    update = pair.scale * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))
    went = arrays[QUERY].astype(np.float64) - base.astype(np.float64)
    applied = (went * update).sum() / (update**2).sum()
    assert one.applied == pytest.approx(applied, rel=1e-6)
    rest = np.linalg.norm(went - applied * update) / np.linalg.norm(went)
    assert one.strange == pytest.approx(rest, rel=1e-6)
