"""`lora-export diagnose`: exit code, table, sentence, JSON and plot."""

import json
import sys

import families
import onnx
import onnx_made
import pytest
import transformers

MODULE = "bert.encoder.layer.1.intermediate.intermediate_act_fn"


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_base):
    """A folder with a small model, its tokenizer, and beside it the ONNX file of that model."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    families.build("bert").save_pretrained(folder)
    known = transformers.AutoTokenizer.from_pretrained(tiny_base).get_vocab()
    transformers.BertTokenizerFast(
        vocab={word: index for word, index in known.items() if index < families.VOCABULARY},
        model_max_length=64,
    ).save_pretrained(folder)
    onnx_made.exported("bert", folder.parent / "model.onnx")
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("A good film.\nA bad film.\n")
    return path


@pytest.fixture
def faulty(merged, tmp_path):
    """The file with one activation approximated."""

    def approximated(graph):
        (kind,) = onnx_made.nodes(graph, "Gelu")[1].attribute
        kind.s = b"tanh"

    path = tmp_path / "faulty.onnx"
    path.write_bytes(merged.with_name("model.onnx").read_bytes())
    onnx_made.edited(path, approximated)
    return path


def test_a_right_file_parts_nowhere_and_exits_with_0(call, merged, data):
    code, out, _ = call("diagnose", merged.with_name("model.onnx"), "--model", merged,
                        "--data", data)  # fmt: skip
    assert code == 0
    assert out.splitlines()[-1].startswith("nothing parts: ")


def test_a_fault_exits_with_5_and_the_last_line_names_the_module(call, merged, data, faulty):
    code, out, _ = call("diagnose", faulty, "--model", merged, "--data", data)
    assert code == 5
    assert out.splitlines()[-1].startswith(f"parts at {MODULE} (GELUActivation): ")
    (row,) = [line for line in out.splitlines() if line.rstrip().endswith(" parts")]
    assert MODULE in row
    assert "bert.encoder.layer.1.intermediate.dense" in out  # what lies before it is shown


def test_json_is_one_object_with_every_module(call, merged, data, faulty):
    code, out, _ = call("diagnose", faulty, "--model", merged, "--data", data, "--json")
    found = json.loads(out)
    assert code == 5
    assert (found["schema"], found["ok"], found["module"]["module"]) == (1, False, MODULE)
    assert {v["check"]: v["status"] for v in found["verdicts"]}["graph"] == "fail"
    assert found["outputs"][0]["module"] == "bert.embeddings.word_embeddings"
    assert found["outputs"][-1]["kind"] == "output"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_error_by_module_is_drawn(call, merged, data, faulty, tmp_path, suffix):
    plot = tmp_path / f"error{suffix}"
    code, _, _ = call("diagnose", faulty, "--model", merged, "--data", data, "--plot", plot)
    assert code == 5
    start = plot.read_bytes()[:100]
    assert start.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert suffix == ".png" or MODULE in plot.read_text()


def test_a_right_file_is_drawn_as_well(call, merged, data, tmp_path):
    plot = tmp_path / "error.svg"
    code, _, _ = call("diagnose", merged.with_name("model.onnx"), "--model", merged,
                      "--data", data, "--plot", plot)  # fmt: skip
    assert code == 0
    assert plot.is_file()


def test_a_plot_of_another_kind_is_refused_before_the_work(call, merged, tmp_path):
    code, _, err = call("diagnose", merged.with_name("model.onnx"), "--plot", tmp_path / "a.gif")
    assert code == 2
    assert "a.gif is no .png or .svg file" in err


def test_where_matplotlib_is_missing_the_extra_is_named(call, merged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = call("diagnose", merged.with_name("model.onnx"), "--plot", tmp_path / "a.png")
    assert code == 2
    assert "pip install 'lora-export[report]'" in err


def test_what_is_no_input_exits_with_2(call, merged, tmp_path):
    assert call("diagnose", tmp_path / "none.onnx")[0] == 2
    (tmp_path / "model.bin").write_bytes(b"")
    code, _, err = call("diagnose", tmp_path / "model.bin")
    assert code == 2
    assert "model.bin ends in none of .aoti.pt2, .onnx" in err
    assert call("diagnose", merged.with_name("model.onnx"), "--model", tmp_path / "no")[0] == 2


def test_an_artifact_in_eight_bits_has_no_limit(call, merged, tmp_path):
    model = onnx.load(merged.with_name("model.onnx"))
    model.metadata_props.add(key="lora_export.precision", value='"int8"')
    onnx.save(model, tmp_path / "model.onnx")
    code, _, err = call("diagnose", tmp_path / "model.onnx", "--model", merged)
    assert code == 2
    assert "rounds on purpose" in err


def test_a_file_that_cannot_be_opened_exits_with_4(call, merged, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    assert call("diagnose", tmp_path / "model.onnx", "--model", merged)[0] == 4
