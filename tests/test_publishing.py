from pathlib import Path

import pytest

from lora_export import publishing
from lora_export.errors import InputError


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_staged_file_appears_at_the_end(tmp_path):
    with publishing.staged(tmp_path / "out.bin") as file:
        file.write_text("new")
        assert not (tmp_path / "out.bin").exists()
    assert (tmp_path / "out.bin").read_text() == "new"
    assert _names(tmp_path) == ["out.bin"]


def test_a_staged_directory_replaces_the_old_one_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with publishing.staged(tmp_path / "out", overwrite=True) as folder:
        folder.mkdir()
        (folder / "new").write_text("new")
    assert _names(tmp_path / "out") == ["new"]
    assert _names(tmp_path) == ["out"]


def test_files_beside_the_staged_one_are_published_too(tmp_path):
    with publishing.staged(tmp_path / "m.onnx") as file:
        file.write_text("graph")
        file.with_name("m.onnx.data").write_text("data")
    assert _names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_a_failing_block_leaves_what_was_there(tmp_path):
    (tmp_path / "out.bin").write_text("old")

    def fail():
        with publishing.staged(tmp_path / "out.bin", overwrite=True) as file:
            file.write_text("new")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError, match="division"):
        fail()
    assert (tmp_path / "out.bin").read_text() == "old"
    assert _names(tmp_path) == ["out.bin"]


def test_a_failing_block_leaves_no_folder_that_it_made(tmp_path):
    with (
        pytest.raises(ZeroDivisionError, match="division"),
        publishing.staged(tmp_path / "a" / "b" / "out"),
    ):
        _ = 1 / 0
    assert _names(tmp_path) == []


def test_a_failed_publish_puts_the_old_directory_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename, calls = Path.rename, []

    def second_fails(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    monkeypatch.setattr(publishing, "_exchange", lambda one, other: False)  # as on some disks
    with (
        pytest.raises(InputError, match="No space left"),
        publishing.staged(tmp_path / "out", overwrite=True) as folder,
    ):
        folder.mkdir()
    assert _names(tmp_path / "out") == ["old"]


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").write_text("old")
    with (
        pytest.raises(InputError, match="exists; choose another name, or pass --overwrite"),
        publishing.staged(tmp_path / "out"),
    ):
        pytest.fail("the block ran")


def test_an_existing_file_beside_the_output_is_not_replaced(tmp_path):
    (tmp_path / "m.data").write_text("old")

    def publish():
        with publishing.staged(tmp_path / "m") as file:
            file.write_text("graph")
            file.with_name("m.data").write_text("new")

    with pytest.raises(InputError, match=r"m\.data exists"):
        publish()
    assert (tmp_path / "m.data").read_text() == "old"
    assert _names(tmp_path) == ["m.data"]


def test_a_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists"):
        publishing.refuse_existing(tmp_path / "out", overwrite=False)


def test_writing_over_a_link_changes_what_the_name_shows(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "store" / "real")
    with publishing.staged(tmp_path / "link", overwrite=True) as file:
        file.write_text("new")
    assert (tmp_path / "link").read_text() == "new"


def test_an_output_below_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot write"),
        publishing.staged(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block ran")


def test_overwriting_a_graph_takes_its_old_data_file_along(tmp_path):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    with publishing.staged(tmp_path / "m.onnx", overwrite=True) as file:
        file.write_text("new")
    assert _names(tmp_path) == ["m.onnx"]


def test_a_failed_publish_of_two_files_puts_both_back(tmp_path, monkeypatch):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    rename, calls = Path.rename, []

    def fourth_fails(self, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fourth_fails)

    def publish():
        with publishing.staged(tmp_path / "m.onnx", overwrite=True) as file:
            file.write_text("new graph")
            file.with_name("m.onnx.data").write_text("new data")

    with pytest.raises(InputError, match="No space left"):
        publish()
    assert {file.read_text() for file in tmp_path.iterdir()} == {"old"}
    assert _names(tmp_path) == ["m.onnx", "m.onnx.data"]


def check(out, *inputs, directory=True):
    publishing.check_output(out, overwrite=True, directory=directory, inputs=inputs)


def test_a_directory_that_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "project" / "src").mkdir(parents=True)
    with pytest.raises(InputError, match="was not written by lora-export"):
        check(tmp_path / "project")


def test_an_earlier_output_is_replaced(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "lora_export.json").write_text("{}")
    check(tmp_path / "merged")


def test_an_output_that_holds_an_input_is_not_replaced(tmp_path):
    (tmp_path / "merged").mkdir()
    for name in ("lora_export.json", "a.safetensors"):
        (tmp_path / "merged" / name).write_text("{}")
    with pytest.raises(InputError, match=r"holds the input a\.safetensors"):
        check(tmp_path / "merged", tmp_path / "merged" / "a.safetensors")
    with pytest.raises(InputError, match="holds the input merged"):
        check(tmp_path / "merged", tmp_path / "merged")


def test_a_directory_is_not_replaced_by_a_file_nor_a_file_by_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a directory; remove it first"):
        check(tmp_path, directory=False)
    with pytest.raises(InputError, match="is a file; remove it first"):
        check(tmp_path / "file")


@pytest.mark.parametrize("out", [".", "..", "a/..", ""])
def test_an_output_needs_a_name_of_its_own(out):
    with pytest.raises(InputError, match="needs a name of its own"):
        check(Path(out))


def test_a_name_that_is_too_long_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="name too long"):
        check(tmp_path / ("x" * 300))
