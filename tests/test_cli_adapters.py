"""The command line over adapters: inspect, convert and verify, and their exit codes."""

import json

import numpy as np
import on_disk
import pytest
from hand_made import edit_tensors
from on_disk import PREFIX, delta, factors, keyed, numbers, pair

from lora_export import read_adapter, registry, storage
from lora_export.refusals import TABLE

PATH = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    tensors = keyed({PATH: pair(32, 32)})
    return on_disk.peft_folder(
        tmp_path / "adapter", tensors, task_type="CAUSAL_LM", target_modules=["q_proj"]
    )


@pytest.fixture
def merged(call, adapter, base, tmp_path):
    """A fresh merge, and the words that name what it was made from."""
    given = ("--adapter", adapter, "--base", base)
    assert call("merge", *given, "--quiet")[0] == 0
    return tmp_path / "merged", given


# ---------------------------------------------------------------- inspect


def test_the_refusals_are_printed_with_reason_and_remedy(call):
    code, out, _ = call("inspect", "--refusals")
    assert code == 0
    for name, entry in TABLE.items():
        assert f"{name}: {entry.case}" in out
        assert entry.why in out
        assert entry.remedy in out


def test_the_refusals_are_one_json_object(call):
    code, out, _ = call("inspect", "--refusals", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    assert [row["name"] for row in found["refusals"]] == list(TABLE)
    assert all(row.keys() == {"name", "case", "why", "remedy"} for row in found["refusals"])


def test_inspect_without_anything_is_a_usage_error(call):
    code, _, err = call("inspect")
    assert code == 2
    assert "Missing argument 'ADAPTER'" in err


def test_inspect_says_rank_scale_norm_and_who_misreads(call, adapter):
    code, out, _ = call("inspect", adapter)
    assert code == 0
    assert PATH in out
    assert "mlx-lm" in out


def test_inspect_with_a_base_says_the_plan_and_the_share(call, adapter, base):
    code, out, _ = call("inspect", adapter, "--base", base, "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    (module,) = found["modules"]
    weight = on_disk.arrays(base)[f"{PATH}.weight"].astype(np.float64)
    expected = np.linalg.norm(delta(factors(32, 32))[0]) / np.linalg.norm(weight)
    assert module["relative"] == pytest.approx(expected, rel=1e-12)
    assert [s["tensor"] for s in found["plan"] if s["operation"] == "merge"] == [f"{PATH}.weight"]


def test_inspect_with_a_base_that_does_not_fit_exits_with_3(call, base, tmp_path):
    adapter = on_disk.peft_folder(tmp_path / "adapter", keyed({PATH: pair(8, 8)}))
    code, out, err = call("inspect", adapter, "--base", base, "--json")
    assert code == 3
    assert json.loads(out)["error"]["type"] == "AdapterMismatch"
    assert "adapter is for (out, in) (8, 8)" in err


@pytest.mark.parametrize(
    ("config", "options", "name"),
    [
        ({"alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 2}}, (), "pattern-order"),
        ({"alora_invocation_tokens": [5]}, (), "alora"),
        ({"r": 3}, (), "rank-mismatch"),
    ],
)
def test_inspect_of_what_is_refused_exits_with_2_and_names_the_case(
    call, tmp_path, config, options, name
):
    place = on_disk.peft_folder(tmp_path / "a", keyed({PATH: pair()}), **config)
    code, _, err = call("inspect", place, *options)
    assert code == 2
    assert TABLE[name].remedy in err


def test_what_the_remedy_says_works(call, tmp_path):
    """The two options that a reader takes, given on the command line."""
    patterns = {"q_proj": 1, "self_attn.q_proj": 2}
    place = on_disk.peft_folder(tmp_path / "a", keyed({PATH: pair()}), alpha_pattern=patterns)
    for order, alpha in (("first", 1.0), ("last", 2.0)):
        code, out, _ = call("inspect", place, "--pattern-order", order, "--json")
        assert code == 0
        assert json.loads(out)["modules"][0]["alpha"] == alpha
    bare = on_disk.save(tmp_path / "bare.safetensors", keyed({PATH: pair()}))
    assert call("inspect", bare)[0] == 2
    code, out, _ = call("inspect", bare, "--alpha", "3", "--json")
    assert code == 0
    assert json.loads(out)["modules"][0]["scale"] == 1.5


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("name", ["merge", "run", "inspect", "verify"])
def test_every_command_that_merges_takes_the_same_options(name):
    wanted = {
        "--adapter-format", "--alpha", "--pattern-order", "--expert-b", "--tied",
        "--residual-base", "--expert-layout", "--allow-base-mismatch",
    }  # fmt: skip
    command = registry.load("lora_export.cli", name).command
    assert wanted <= {word for option in command.params for word in option.opts}


def test_an_untrained_adapter_is_merged_and_that_is_said(call, base, tmp_path):
    a, b = pair(32, 32)
    place = on_disk.peft_folder(tmp_path / "a", keyed({PATH: (a, b * 0)}), task_type="CAUSAL_LM")
    code, out, _ = call("merge", "--adapter", place, "--base", base)
    assert code == 0
    assert "note: the adapter is untrained" in out
    before, after = on_disk.arrays(base), on_disk.arrays(tmp_path / "merged")
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_notes_are_printed_with_the_verdicts(call, base, tmp_path):
    place = on_disk.peft_folder(tmp_path / "a", keyed({PATH: pair(32, 32)}, ""))
    code, out, _ = call("merge", "--adapter", place, "--base", base)
    assert code == 0
    assert "note: 2 tensors have no prefix" in " ".join(out.split())


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("to", ["peft", "native"])
def test_convert_writes_what_can_be_read_again(call, adapter, tmp_path, to):
    code, out, _ = call("convert", adapter, "--out", "out", "--to", to, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["format"], found["low-rank modules"]) == (0, True, to, 1)
    assert read_adapter(tmp_path / "out").format == to


def test_convert_normalises_when_told(call, tmp_path):
    place = on_disk.peft_folder(tmp_path / "a", keyed({PATH: pair()}), use_rslora=True)
    code, out, _ = call("convert", place, "--out", "out", "--normalise")
    assert code == 0
    assert "lora" in out
    config = json.loads((tmp_path / "out" / on_disk.CONFIG).read_text())
    assert config["use_rslora"] is False
    assert config["r"] == config["lora_alpha"]


def test_convert_of_what_cannot_be_normalised_exits_with_2_and_leaves_nothing(call, tmp_path):
    tensors = keyed({PATH: pair()}) | {f"{PREFIX}{PATH}.lora_magnitude_vector": numbers(8)}
    place = on_disk.peft_folder(tmp_path / "a", tensors, use_dora=True)
    code, _, err = call("convert", place, "--out", "out", "--normalise")
    assert code == 2
    assert "cannot be normalised: dora" in err
    assert not (tmp_path / "out").exists()


def test_convert_needs_an_output(call, adapter):
    assert call("convert", adapter)[0] == 2


def test_convert_to_a_format_that_is_not_written_is_a_usage_error(call, adapter):
    assert call("convert", adapter, "--out", "out", "--to", "mlx")[0] == 2


@pytest.mark.parametrize("to", ["peft", "native"])
def test_convert_replaces_its_own_output_only_when_told(call, adapter, tmp_path, to):
    words = ("convert", adapter, "--out", "out", "--to", to)
    assert call(*words)[0] == 0
    assert call(*words)[0] == 2
    assert call(*words, "--overwrite")[0] == 0
    assert read_adapter(tmp_path / "out").modules.keys() == {PATH}


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_convert_takes_no_alpha_that_is_no_number_above_zero(call, tmp_path, alpha):
    bare = on_disk.save(tmp_path / "bare.safetensors", keyed({PATH: pair()}))
    code, _, err = call("convert", bare, "--out", "out", "--alpha", alpha)
    assert code == 2
    assert "alpha" in err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- verify


def test_a_fresh_merge_verifies_and_nothing_is_written(call, merged, tmp_path):
    folder, given = merged
    before = storage.digest_tree(tmp_path)
    code, out, err = call("verify", folder, *given)
    assert code == 0, out
    assert "proven: " in out
    assert "deriving every tensor again" in err
    assert storage.digest_tree(tmp_path) == before


def test_verify_prints_one_json_object(call, merged):
    folder, given = merged
    code, out, _ = call("verify", folder, *given, "--quiet", "--json")
    found = json.loads(out)
    assert (code, found["ok"]) == (0, True)
    checked = {verdict["check"] for verdict in found["verdicts"]}
    assert checked == {"accounted", "exact", "intact", "plain"}


def failed(call, folder, given):
    code, out, _ = call("verify", folder, *given, "--quiet", "--json")
    verdicts = json.loads(out)["verdicts"]
    return code, {v["check"] for v in verdicts if v["status"] != "pass"}


def nudged(name):
    """Move one element by two units in its last place: at a tie one would be as near."""

    def change(arrays):
        value = arrays[name].reshape(-1)
        for _ in range(2):
            value[5] = np.nextafter(value[5], np.float32(9))

    return change


def test_one_weight_that_was_changed_fails(call, merged):
    folder, given = merged
    edit_tensors(folder / "model.safetensors", nudged(f"{PATH}.weight"))
    assert failed(call, folder, given) == (5, {"exact", "intact"})


def test_one_copied_weight_that_was_changed_fails(call, merged):
    folder, given = merged
    edit_tensors(folder / "model.safetensors", nudged("model.norm.weight"))
    assert failed(call, folder, given) == (5, {"accounted", "intact"})


def test_a_change_whose_digest_was_forged_fails(call, merged):
    """What was written down is not believed: the weights are derived again."""
    folder, given = merged
    edit_tensors(folder / "model.safetensors", nudged(f"{PATH}.weight"))
    known = json.loads((folder / "lora_export.json").read_text())
    known["files"]["model.safetensors"] = storage.digest(folder / "model.safetensors").digest
    (folder / "lora_export.json").write_text(json.dumps(known))
    assert failed(call, folder, given) == (5, {"exact"})


def test_a_tensor_that_is_gone_fails(call, merged):
    folder, given = merged
    edit_tensors(folder / "model.safetensors", lambda arrays: arrays.pop("model.norm.weight"))
    code, checks = failed(call, folder, given)
    assert code == 5
    assert {"accounted", "intact"} <= checks


def test_a_merged_tensor_that_is_gone_fails(call, merged):
    folder, given = merged
    edit_tensors(folder / "model.safetensors", lambda arrays: arrays.pop(f"{PATH}.weight"))
    code, checks = failed(call, folder, given)
    assert code == 5
    assert "accounted" in checks


def test_a_merged_tensor_of_another_shape_fails(call, merged):
    folder, given = merged

    def cut(arrays):
        arrays[f"{PATH}.weight"] = arrays[f"{PATH}.weight"][:5]

    edit_tensors(folder / "model.safetensors", cut)
    code, checks = failed(call, folder, given)
    assert code == 5
    assert "intact" in checks


def test_a_tensor_out_of_nowhere_fails(call, merged):
    folder, given = merged

    def add(arrays):
        arrays["extra"] = numbers(3)

    edit_tensors(folder / "model.safetensors", add)
    code, checks = failed(call, folder, given)
    assert code == 5
    assert {"accounted", "intact"} <= checks


def test_another_adapter_fails(call, merged, base, tmp_path):
    folder, _ = merged
    other = on_disk.peft_folder(
        tmp_path / "other", keyed({PATH: pair(32, 32, seed=9)}), task_type="CAUSAL_LM"
    )
    code, checks = failed(call, folder, ("--adapter", other, "--base", base))
    assert (code, checks) == (5, {"exact"})


def test_another_scale_fails(call, merged, base, tmp_path):
    folder, _ = merged
    other = on_disk.peft_folder(
        tmp_path / "other", keyed({PATH: pair(32, 32)}), task_type="CAUSAL_LM", lora_alpha=4.001
    )
    assert failed(call, folder, ("--adapter", other, "--base", base)) == (5, {"exact"})


def test_another_base_fails(call, merged, adapter, tiny, tmp_path):
    folder, _ = merged
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    code, checks = failed(call, folder, ("--adapter", adapter, "--base", tmp_path / "other"))
    assert code == 5
    assert "accounted" in checks


def test_a_merge_verifies_with_the_options_that_it_was_made_with(call, base, tmp_path):
    bare = on_disk.save(tmp_path / "bare.safetensors", keyed({PATH: pair(32, 32)}))
    given = ("--adapter", bare, "--base", base, "--quiet")
    assert call("merge", *given, "--alpha", "3", "--dtype", "bfloat16")[0] == 0
    assert call("verify", "merged", *given)[0] == 0
    assert call("verify", "merged", *given, "--alpha", "3")[0] == 0
    assert failed(call, "merged", (*given, "--alpha", "3.5")) == (5, {"exact"})


def test_a_merge_of_another_dtype_than_is_asked_for_fails(call, adapter, base):
    given = ("--adapter", adapter, "--base", base, "--quiet")
    assert call("merge", *given, "--dtype", "bfloat16")[0] == 0
    assert call("verify", "merged", *given, "--dtype", "float16")[0] == 5


@pytest.mark.parametrize("where", ["nowhere", "adapter"])
def test_what_was_never_merged_exits_with_2(call, adapter, base, where):
    code, _, err = call("verify", where, "--adapter", adapter, "--base", base)
    assert code == 2
    assert "was not written by `lora-export merge`" in err


def test_a_merge_without_its_provenance_exits_with_2(call, merged):
    folder, given = merged
    (folder / "lora_export.json").unlink()
    assert call("verify", folder, *given)[0] == 2


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {}}', '{"files": 5}'])
def test_a_merge_with_damaged_provenance_exits_with_2(call, merged, text):
    folder, given = merged
    (folder / "lora_export.json").write_text(text)
    assert call("verify", folder, *given)[0] == 2


def test_an_adapter_that_does_not_fit_exits_with_3(call, merged, base, tmp_path):
    folder, _ = merged
    other = on_disk.peft_folder(tmp_path / "other", keyed({PATH: pair(8, 8)}))
    assert call("verify", folder, "--adapter", other, "--base", base)[0] == 3


def test_weights_that_are_gone_exit_with_2_and_not_with_a_bug(call, merged):
    folder, given = merged
    (folder / "model.safetensors").unlink()
    assert call("verify", folder, *given)[0] == 2


def test_a_config_that_was_changed_after_the_merge_fails(call, merged):
    """The weights alone are not the model: another number of heads computes something else."""
    folder, given = merged
    config = json.loads((folder / "config.json").read_text())
    config["num_attention_heads"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    assert call("verify", folder, *given, "--quiet")[0] == 5


@pytest.mark.parametrize("name", ["adapter_config.json", "other.safetensors", "modeling_x.py"])
def test_a_file_that_a_loader_would_read_beside_the_merge_fails(call, merged, name):
    folder, given = merged
    (folder / name).write_text("{}")
    assert call("verify", folder, *given, "--quiet")[0] in (2, 5)


def test_a_note_of_the_user_beside_the_merge_is_none_of_its_business(call, merged):
    folder, given = merged
    (folder / "NOTES.md").write_text("ours")
    assert call("verify", folder, *given, "--quiet")[0] == 0


def test_the_options_of_the_merge_are_those_of_its_verification(call, adapter, base, tmp_path):
    given = ("--adapter", adapter, "--base", base)
    assert call("merge", *given, "--dtype", "bfloat16", "--quiet")[0] == 0
    assert call("verify", tmp_path / "merged", *given, "--quiet")[0] == 0
    assert call("verify", tmp_path / "merged", *given, "--dtype", "float16", "--quiet")[0] == 5


# ---------------------------------------------------------------- options and companions


@pytest.mark.parametrize("command", ["merge", "inspect", "convert"])
def test_an_alpha_for_a_file_that_says_its_own_is_refused(call, adapter, base, tmp_path, command):
    words = {
        "merge": ("--adapter", adapter, "--base", base),
        "inspect": (adapter,),
        "convert": (adapter, "--out", tmp_path / "out"),
    }
    code, _, err = call(command, *words[command], "--alpha", "3")
    assert code == 2
    assert "drop --alpha" in err


def test_a_model_is_not_taken_for_an_adapter(call, base):
    code, _, err = call("inspect", base)
    assert code == 2
    assert "holds a model" in err


def test_the_tokenizer_beside_the_adapter_is_the_one_that_ships(
    call, adapter, tiny, tmp_path, monkeypatch
):
    folder = tmp_path / "base"
    tiny("llama").save_pretrained(folder)
    for name in ("spm.model", "processor_config.json", "added_tokens.json"):
        (folder / name).write_text("{}")
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    assert call("merge", "--adapter", adapter, "--base", folder, "--quiet")[0] == 0
    merged = tmp_path / "merged"
    assert "the adapter" in (merged / "tokenizer.json").read_text()
    assert (merged / "processor_config.json").is_file()
    assert not (merged / "spm.model").exists()  # of another tokenizer
    assert not (merged / "added_tokens.json").exists()


def test_a_run_does_not_compare_what_was_not_trained(call, adapter, base):
    code, _, err = call("run", "--adapter", adapter, "--base", base, "--tied", "both")
    assert code == 2
    assert "use `lora-export merge`" in err
