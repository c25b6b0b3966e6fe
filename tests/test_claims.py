"""What a merged model and its artifacts say, after each of many changes to one of their files."""

import dataclasses
import json
import shutil

import live_made
import on_disk
import pytest

from lora_export import claims, merged_files, opening, stages
from lora_export.companions import PROVENANCE
from lora_export.records import MERGED


@pytest.fixture(scope="module")
def made(tiny_base, tiny_adapter, tmp_path_factory):
    """A job, the model that it was merged into, and a TorchScript file of that."""
    folder = tmp_path_factory.mktemp("claims")
    path, _ = tiny_adapter(folder, str(tiny_base))
    job = opening.open_job(path)
    record = merged_files.merge_stage(job, folder / "merged")
    subject = stages.load_subject(folder / "merged")
    (folder / "out").mkdir()
    artifact = stages.export_stage("torchscript", subject, folder / "out")
    return job, folder, record, stages.about(subject), artifact


@pytest.fixture
def merged(made, tmp_path):
    """A copy of the merged model, to be changed."""
    return shutil.copytree(made[1] / "merged", tmp_path / "merged")


def wrong(found):
    assert len(found) > 3
    return [claim.name for claim in found if claim.expected != claim.found]


def edit(file, change):
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def test_what_a_merge_wrote_is_so(made):
    job, folder, record, _, _ = made
    found = claims.of_merged(job, folder / "merged", record.base)
    assert wrong(found) == []
    names = {claim.name for claim in found}
    assert names > {
        "adapter sha256", "adapter labels", "base id", "base fingerprint", "base files",
        "config.json id2label", "config.json layer_norm_eps", "config.json hidden_act",
        "config.json num_attention_heads", "config.json architectures", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert {claim.subject for claim in found} == {MERGED}
    assert claims.of_merged(job, folder / "merged") == found


FIELDS = {
    "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "num_attention_heads": 2, "pad_token_id": 7,
    "id2label": {"0": "positive", "1": "negative"}, "label2id": {"negative": 1, "positive": 0},
    "max_position_embeddings": 32, "surprise": 1, "architectures": ["BertModel"],
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_config_that_was_changed_is_named(made, merged, field):
    edit(merged / "config.json", lambda fields: fields.update({field: FIELDS[field]}))
    assert wrong(claims.of_merged(made[0], merged)) == [f"config.json {field}"]


def test_a_field_of_the_config_that_is_gone_is_named(made, merged):
    edit(merged / "config.json", lambda fields: fields.pop("hidden_act"))
    assert wrong(claims.of_merged(made[0], merged)) == ["config.json hidden_act"]


@pytest.mark.parametrize(
    ("part", "entry"),
    [("adapter", "sha256"), ("adapter", "labels"), ("base", "fingerprint"), ("base", "files")],
)
def test_a_statement_of_provenance_that_was_changed_is_named(made, merged, part, entry):
    edit(merged / PROVENANCE, lambda said: said[part].update({entry: "other"}))
    assert wrong(claims.of_merged(made[0], merged)) == [f"{part} {entry}"]


def test_another_adapter_is_named(made, tiny_base, tiny_adapter, tmp_path):
    """The merged model is that of an adapter with other weights."""
    other = opening.open_job(tiny_adapter(tmp_path, str(tiny_base), seed=5)[0])
    assert "adapter sha256" in wrong(claims.of_merged(other, made[1] / "merged"))


def test_a_tokenizer_of_another_model_is_named(made, merged):
    edit(merged / "tokenizer.json", lambda fields: fields["model"]["vocab"].pop("film"))
    edit(merged / "tokenizer_config.json", lambda fields: fields.update(model_max_length=7))
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert wrong(claims.of_merged(made[0], merged)) == names


def test_a_file_of_a_tokenizer_that_nobody_put_there_is_named(made, merged):
    (merged / "added_tokens.json").write_text("{}")
    assert wrong(claims.of_merged(made[0], merged)) == ["added_tokens.json"]


def test_a_merged_model_that_others_wrote_says_nothing_of_who_was_merged(made, merged):
    (merged / PROVENANCE).unlink()
    found = claims.of_merged(made[0], merged)
    assert wrong(found) == []
    assert "adapter sha256" not in {claim.name for claim in found}


def test_one_of_ours_that_no_longer_says_it_is_wrong(made, merged):
    said = json.loads((merged / PROVENANCE).read_text())
    del said["adapter"]
    (merged / PROVENANCE).write_text(json.dumps(said))
    assert "adapter sha256" in wrong(claims.of_merged(made[0], merged))


def test_what_an_artifact_says_is_so(made):
    _, folder, _, about, artifact = made
    found = claims.of_artifact(artifact, about, folder / "merged", folder / "out")
    assert wrong(found) == []
    assert {claim.name for claim in found} > {
        "lora_export.labels", "lora_export.adapter", "lora_export.base", "lora_export.max_length",
        "lora_export.pad_token_id", "lora_export.padding_side", "lora_export.precision",
        "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["lora_export.labels", "lora_export.adapter"])
def test_an_artifact_of_an_earlier_model_is_named(made, key):
    _, folder, _, about, artifact = made
    now = {**about, key: '"another"'}
    assert wrong(claims.of_artifact(artifact, now, folder / "merged", folder / "out")) == [key]


def test_an_artifact_of_another_precision_is_named(made):
    _, folder, _, about, artifact = made
    narrow = dataclasses.replace(artifact, precision="int8")
    found = claims.of_artifact(narrow, about, folder / "merged", folder / "out")
    assert wrong(found) == ["lora_export.precision"]


def test_a_tokenizer_beside_an_artifact_that_is_not_the_models_is_named(made, tmp_path):
    _, folder, _, about, artifact = made
    out = shutil.copytree(folder / "out", tmp_path / "out")
    edit(out / "tokenizer" / "tokenizer.json", lambda fields: fields.update(version="9"))
    (out / "tokenizer" / "vocab.txt").unlink(missing_ok=True)
    found = wrong(claims.of_artifact(artifact, about, folder / "merged", out))
    assert "tokenizer.json" in found


def test_metadata_that_is_gone_is_named(made):
    _, folder, _, about, artifact = made
    silent = dataclasses.replace(artifact, facts={"metadata": {}})
    found = wrong(claims.of_artifact(silent, about, folder / "merged", folder / "out"))
    assert set(found) == {*about, "lora_export.precision"}


@pytest.mark.parametrize("case", live_made.CASES)
def test_of_every_kind_of_adapter_what_a_merge_wrote_is_so(bases, tmp_path, case):
    family, tensors, config = live_made.CASES[case]
    place = on_disk.peft_folder(tmp_path / "adapter", tensors, **config)
    job = opening.open_job(place, str(bases(family)))
    merged_files.merge_stage(job, tmp_path / "merged")
    assert wrong(claims.of_merged(job, tmp_path / "merged")) == []
