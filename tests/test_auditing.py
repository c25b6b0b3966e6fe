"""The audit of a merge must see every kind of damage: each test damages a good merge and looks."""

import dataclasses

import numpy as np
import pytest

from lora_export import auditing, checks, pipeline, storage
from lora_export.opening import Options, open_job
from lora_export.records import Evidence
from lora_export.storage import Checkpoint, NewTensor


@pytest.fixture(scope="module")
def merged(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    path, _ = tiny_adapter(folder, str(tiny_base))
    pipeline.merge_files(path, out=folder / "merged")
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
    pipeline.merge_files(job.source, out=tmp_path / "bf16", dtype="bfloat16")
    narrow = open_job(job.source, options=Options(dtype="bfloat16"))
    coarse = auditing.weights(
        narrow.plan, job.adapter, job.checkpoint, Checkpoint.open(tmp_path / "bf16")
    )
    assert max(a.lost_share for a in fine) < 1e-6 < min(a.lost_share for a in coarse)
    assert sum(a.misrounded for a in coarse) == 0
