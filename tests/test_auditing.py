"""The audit of a merge must see every kind of damage: each test damages a good merge and looks."""

import dataclasses

import numpy as np
import on_disk
import pytest
from hand_made import edit_tensors
from live_made import CASES, base_of

from lora_export import auditing, checks, pipeline, storage
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


# ---------------------------------------------------------------- every kind of update


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """`bases(family)`: a directory with a tiny base."""
    root = tmp_path_factory.mktemp("bases")
    return lambda family: base_of(family, root)


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
