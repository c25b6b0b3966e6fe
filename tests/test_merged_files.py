"""`merge_files` and `verify_merged`: what they certify, and what a failure leaves behind."""

import errno
import json
import os

import pytest
from hand_made import edit_tensors

from lora_export import checks, merged_files, storage
from lora_export.errors import InputError
from lora_export.opening import Options
from lora_export.records import Status


@pytest.fixture(scope="module")
def merged(tiny_base, tiny_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    path, _ = tiny_adapter(folder, str(tiny_base))
    return path, folder / "merged", merged_files.merge_files(path, out=folder / "merged")


def test_every_check_of_a_merge_passes(merged):
    _, _, certificate = merged
    assert {v.check for v in certificate.verdicts} == {"accounted", "exact", "plain"}
    assert {v.status for v in certificate.verdicts} == {Status.PASS}


def test_the_certificate_digests_inputs_and_outputs(merged, tiny_base):
    path, folder, certificate = merged
    assert set(certificate.outputs) == set(storage.digest_tree(folder))
    given = {file.name: file.digest for file in certificate.inputs}
    assert given[path.name] == storage.digest(path).digest
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert given[f"base/{name}"] == storage.digest(tiny_base / name).digest


def test_what_the_merge_cost_is_measured(merged):
    found = {m.name: m for m in merged[2].measurements}
    units = {
        "streaming": "s", "sync": "s", "audit": "s", "merge": "s", "throughput": "GB/s",
        "peak memory": "MB",
    }  # fmt: skip
    assert {name: m.unit for name, m in found.items()} == units
    assert {m.subject for m in found.values()} == {"merge"}
    assert all(m.value >= 0 for m in found.values())
    assert found["merge"].value >= found["streaming"].value + found["audit"].value
    assert found["peak memory"].value > 10


def test_the_bytes_written_are_told_as_they_are_written(merged, tmp_path):
    told = []
    merged_files.merge_files(
        merged[0], out=tmp_path / "merged", advance=lambda done, total: told.append((done, total))
    )
    done, totals = zip(*told, strict=True)
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert set(totals) == {size}
    assert list(done) == sorted(done)
    assert done[-1] == size


def test_a_large_model_is_audited_in_part_and_in_full_when_asked(merged, monkeypatch, tmp_path):
    monkeypatch.setattr(merged_files.auditing, "SAMPLE", 1000)
    sampled = merged_files.merge_files(merged[0], out=tmp_path / "a")
    full = merged_files.merge_files(merged[0], out=tmp_path / "b", full_audit=True)
    verified = merged_files.verify_merged(tmp_path / "a", merged[0])
    exact = [
        [v for v in found.verdicts if v.check == "exact"] for found in (sampled, full, verified)
    ]
    assert sampled.ok
    assert full.ok
    assert verified.ok
    assert {v.compared for v in exact[1]} == {v.compared for v in exact[2]}
    assert {v.compared < full.compared for v, full in zip(*exact[:2], strict=True)} == {True}
    assert all("`lora-export verify` derives all" in v.note for v in exact[0])
    assert not any("derived" in v.note for v in (*exact[1], *exact[2]))


# ---------------------------------------------------------------- verify


def test_a_merge_is_verified_and_nothing_is_written(merged):
    path, folder, _ = merged
    before = storage.digest_tree(folder.parent)
    certificate = merged_files.verify_merged(folder, path)
    assert certificate.ok
    assert {v.check for v in certificate.verdicts} == {"accounted", "exact", "intact", "plain"}
    assert storage.digest_tree(folder.parent) == before


def test_a_merge_is_verified_with_the_options_that_it_wrote_down(merged, tmp_path):
    out = tmp_path / "merged"
    assert merged_files.merge_files(merged[0], out=out, dtype="bfloat16", shard_size="20KB").ok
    assert merged_files.recorded_options(out, {}) == Options(dtype="bfloat16", shard_size="20KB")
    assert merged_files.verify_merged(out, merged[0]).ok
    assert not merged_files.verify_merged(out, merged[0], dtype="float32").ok


def test_options_of_another_version_are_refused(merged, tmp_path):
    out = tmp_path / "merged"
    merged_files.merge_files(merged[0], out=out)
    known = json.loads((out / "lora_export.json").read_text())
    (out / "lora_export.json").write_text(json.dumps({**known, "options": {"colour": "red"}}))
    with pytest.raises(InputError, match="is damaged"):
        merged_files.verify_merged(out, merged[0])


def test_a_changed_index_fails(merged, tmp_path):
    out = tmp_path / "merged"
    merged_files.merge_files(merged[0], out=out, shard_size="20KB")
    index = out / storage.INDEX
    index.write_text(index.read_text() + " ")
    certificate = merged_files.verify_merged(out, merged[0])
    assert [v.check for v in certificate.verdicts if not v.passed] == ["intact"]


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", {"exact", "intact"}),
        ("bert.embeddings.LayerNorm.bias", {"accounted", "intact"}),
        ("classifier.weight", {"accounted", "intact"}),
    ],
    ids=["merged", "copied", "placed"],
)
def test_one_changed_element_fails(merged, tmp_path, name, failed):
    out = tmp_path / "merged"
    merged_files.merge_files(merged[0], out=out)

    def change(arrays):
        arrays[name].reshape(-1)[-1] += 1

    edit_tensors(out / "model.safetensors", change)
    certificate = merged_files.verify_merged(out, merged[0])
    assert {v.check for v in certificate.verdicts if not v.passed} == failed
    assert {v.check for v in certificate.verdicts} == set(checks.names()) & {
        "accounted", "exact", "intact", "plain",
    }  # fmt: skip


def test_what_no_merge_wrote_is_not_verified(tmp_path, merged):
    with pytest.raises(InputError, match="was not written by `lora-export merge`"):
        merged_files.verify_merged(tmp_path, merged[0])


# ---------------------------------------------------------------- nothing is left behind


def test_nothing_is_left_beside_a_merge(merged):
    path, folder, _ = merged
    assert {file.name for file in folder.parent.iterdir()} == {path.name, folder.name}


def test_a_full_disk_is_an_input_error_and_leaves_nothing(merged, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="No space left on device"):
        merged_files.merge_files(merged[0], out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_merge_leaves_nothing(merged, tmp_path):
    def interrupted(done, total):
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged_files.merge_files(merged[0], out=tmp_path / "merged", advance=interrupted)
    assert list(tmp_path.iterdir()) == []
