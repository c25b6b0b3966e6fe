import numpy as np
import pytest
from hand_made import signature
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export import inputs
from lora_export.errors import InputError
from lora_export.records import Batch, TensorSpec

PADDINGS = ("none", "right", "left", "hole", "all but one")
shapes = given(
    batch=st.integers(1, 9),
    length=st.integers(1, 40),
    padding=st.sampled_from(PADDINGS),
    pad=st.integers(0, 49),
    seed=st.integers(0, 2**32),
)
quick = settings(deadline=None, max_examples=80)


def _made(batch, length, padding, pad=0, seed=0):
    return inputs.made(signature(pad_token_id=pad), batch, length, padding, seed)


# ---------------------------------------------------------------- made to a shape


@quick
@shapes
def test_every_row_has_an_attended_token(batch, length, padding, pad, seed):
    mask = _made(batch, length, padding, pad, seed)["attention_mask"]
    assert mask.any(axis=1).all()


@quick
@shapes
def test_the_pad_id_lies_exactly_where_no_token_is_attended(batch, length, padding, pad, seed):
    arrays = _made(batch, length, padding, pad, seed)
    np.testing.assert_array_equal(arrays["input_ids"] == pad, arrays["attention_mask"] == 0)


@quick
@shapes
def test_ids_are_words_of_the_model(batch, length, padding, pad, seed):
    ids = _made(batch, length, padding, pad, seed)["input_ids"]
    assert ids.min() >= 0
    assert ids.max() < signature().vocab_size


@quick
@shapes
def test_the_arrays_are_those_of_the_signature(batch, length, padding, pad, seed):
    arrays = _made(batch, length, padding, pad, seed)
    assert list(arrays) == ["input_ids", "attention_mask", "token_type_ids"]
    assert {array.shape for array in arrays.values()} == {(batch, length)}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}


@quick
@shapes
def test_the_same_seed_gives_the_same_arrays(batch, length, padding, pad, seed):
    first, second = (_made(batch, length, padding, pad, seed) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_another_seed_gives_other_ids():
    first, second = (_made(4, 16, "right", seed=seed)["input_ids"] for seed in (0, 1))
    assert (first != second).any()


def test_only_the_inputs_of_the_signature_are_made():
    two = signature(inputs=signature().inputs[:2])
    assert list(inputs.made(two, 1, 3, "none", 0)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("padding", "mask"),
    [
        ("none", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        ("right", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        ("left", [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),
        ("hole", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]),
        ("all but one", [[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]),
    ],
)
def test_rows_after_the_first_are_padded_where_it_was_said(padding, mask):
    assert _made(2, 6, padding)["attention_mask"].tolist() == mask


def test_rows_of_a_batch_are_padded_differently():
    lengths = _made(8, 64, "right")["attention_mask"].sum(axis=1)
    assert len(set(lengths.tolist())) == 8


# ---------------------------------------------------------------- the grid


def test_no_shape_of_the_grid_is_the_traced_example():
    assert inputs.EXAMPLE not in inputs.GRID


def test_the_grid_differs_from_the_example_in_batch_length_and_padding_at_once():
    batch, length, padding = inputs.EXAMPLE
    differing = [g for g in inputs.GRID if g[0] != batch and g[1] != length and g[2] != padding]
    assert differing


@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_grid_goes_beyond_the_example_in_each_respect(part):
    assert len({shape[part] for shape in inputs.GRID} - {inputs.EXAMPLE[part]}) > 2


def test_the_grid_pads_in_every_known_way():
    assert {padding for _, _, padding in inputs.GRID} == set(PADDINGS)


def test_the_example_itself_has_padding():
    assert (inputs.made(signature(), *inputs.EXAMPLE, seed=0)["attention_mask"] == 0).any()


def _grid(max_length, seed=0):
    return inputs.grid_batches(signature(max_length=max_length), seed)


@pytest.mark.parametrize("max_length", [1, 2, 16, 64, 200])
def test_no_batch_of_the_grid_is_longer_than_the_model_accepts(max_length):
    assert max(batch.mask.shape[1] for batch in _grid(max_length)) == max_length


@pytest.mark.parametrize("max_length", [1, 2, 16, 64])
def test_every_row_of_the_grid_has_an_attended_token(max_length):
    assert all(batch.mask.any(axis=1).all() for batch in _grid(max_length))


def test_a_batch_of_the_grid_says_what_it_is():
    for batch, (rows, length, padding) in zip(_grid(64), inputs.GRID, strict=False):
        assert batch.source == "grid"
        assert batch.note == f"batch {rows}, length {length or 64}, padding {padding}"
        assert batch.mask.shape == (rows, length or 64)


def test_the_same_seed_gives_the_same_grid():
    for first, second in zip(_grid(64), _grid(64), strict=True):
        np.testing.assert_array_equal(first.arrays["input_ids"], second.arrays["input_ids"])


def test_one_token_is_repeated():
    batch = _grid(64)[-1]
    assert batch.note == "one token repeated, batch 3, length 12, padding right"
    attended = batch.arrays["input_ids"][batch.mask == 1]
    assert len(set(attended.tolist())) == 1
    assert (batch.mask == 0).any()


def test_special_tokens_fill_rows_of_their_own_and_are_never_padding():
    batch = inputs.grid_batches(signature(max_length=64), 0, special=(3, 9))[-1]
    assert batch.note == "special tokens, batch 3, length 12, padding right"
    assert batch.arrays["input_ids"][0].tolist() == [3, 9] * 6
    assert set(batch.arrays["input_ids"][batch.mask == 0].tolist()) == {0}


def test_tokens_of_the_last_type_are_asked_where_there_are_several():
    batch = inputs.grid_batches(signature(max_length=64), 0, types=2)[-1]
    assert batch.note == "two token types, batch 3, length 12, padding right"
    assert batch.arrays["token_type_ids"].tolist() == [[0] * 6 + [1] * 6] * 3
    notes = [b.note for b in inputs.grid_batches(signature(max_length=64), 0, types=1)]
    assert not any("types" in note for note in notes)


def test_without_special_tokens_there_is_no_such_shape():
    assert not any("special" in batch.note for batch in _grid(64))


def test_pictures_are_all_zero_and_far_too_bright():
    pixels = TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8))
    found = inputs.grid_batches(signature(inputs=(pixels,), max_length=0), 0)
    odd = {b.note: b.arrays["pixel_values"] for b in found if b.note.startswith("pictures")}
    assert not odd["pictures all zero"].any()
    assert np.abs(odd["pictures far too bright"]).max() > 30


def test_a_quick_look_takes_the_first_texts_and_leaves_large_shapes_out():
    texts = [Batch("text", f"sentences {i}", _grid(8)[0].arrays) for i in (1, 2)]
    long = _grid(500)
    found = inputs.fewer([*texts, *long])
    assert [b.note for b in found if b.source == "text"] == ["sentences 1"]
    assert {b.note for b in long} - {b.note for b in found} == {
        "batch 2, length 500, padding right", "batch 8, length 64, padding left",
    }  # fmt: skip
    assert [b.note for b in inputs.fewer(_grid(16))] == [b.note for b in _grid(16)]


def test_batches_of_the_grid_have_ids_of_their_own():
    first, second = _grid(64)[:2]
    assert first.arrays["input_ids"][0, 0] != second.arrays["input_ids"][0, 0]


# ---------------------------------------------------------------- sentences from files


def _write(folder, text, name="dev.tsv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("column", ["sentence", "text"])
def test_a_table_gives_sentences_and_labels(tmp_path, column):
    path = _write(tmp_path, f"{column}\tlabel\ngood film\t1\nbad film \t0\n")
    assert inputs.read_texts(path) == (["good film", "bad film"], [1, 0])


def test_the_order_of_the_columns_does_not_matter(tmp_path):
    path = _write(tmp_path, "index\tlabel\tsentence\n7\t1\tgood film\n")
    assert inputs.read_texts(path) == (["good film"], [1])


def test_a_table_without_labels_gives_none(tmp_path):
    assert inputs.read_texts(_write(tmp_path, "sentence\ngood film\n")) == (["good film"], [])


def test_what_is_to_be_learned_needs_labels(tmp_path):
    labelled, bare = (
        _write(tmp_path, "text\tlabel\ngood \t1\n"),
        _write(tmp_path, "text\nx\n", "b.tsv"),
    )
    assert inputs.read_labelled(labelled) == (["good "], [1])  # as it stands there
    with pytest.raises(InputError, match=r"b\.tsv needs a header with a column 'label'"):
        inputs.read_labelled(bare)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
def test_only_a_line_end_ends_a_row(tmp_path, mark):
    path = _write(tmp_path, f"sentence\tlabel\r\ngood{mark}film\t1\r\n")
    assert inputs.read_texts(path) == ([f"good{mark}film"], [1])
    path = _write(tmp_path, f"good{mark}film\r\nbad film", "mine.txt")
    assert inputs.read_texts(path) == ([f"good{mark}film", "bad film"], [])


def test_quotes_in_a_table_are_text(tmp_path):
    path = _write(tmp_path, 'sentence\tlabel\n"good\t1\nso " bad\t0\n')
    assert inputs.read_texts(path) == (['"good', 'so " bad'], [1, 0])


def test_a_folder_is_read_as_its_dev_set(tmp_path):
    _write(tmp_path, "sentence\tlabel\ngood film\t1\n")
    _write(tmp_path, "sentence\tlabel\nanother\t0\n", "train.tsv")
    assert inputs.read_texts(tmp_path) == (["good film"], [1])


def test_any_other_file_has_a_sentence_a_line(tmp_path):
    path = _write(tmp_path, "good film\n  a\ttab \n", "mine.txt")
    assert inputs.read_texts(path) == (["good film", "a\ttab"], [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("dev.tsv", "", "needs a header with a column 'sentence' or 'text'"),
        ("dev.tsv", "good film\t1\nbad film\t0\n", "needs a header"),
        ("dev.tsv", "phrase\tlabel\ngood film\t1\n", "needs a header"),
        ("dev.tsv", "sentence\tlabel\ngood film\tpositive\n", "that of row 1 is positive"),
        ("dev.tsv", "sentence\tlabel\ngood film\t0.5\n", "labels are class indices"),
        ("dev.tsv", "sentence\tlabel\ngood\t1\nbad\n", "indices; that of row 2 is none"),
        ("dev.tsv", "label\tsentence\n1\tgood\n1\n", "row 2 has no sentence"),
        ("dev.tsv", "sentence\tlabel\n\t1\n", "holds no sentences"),
        ("a.txt", "", "holds no sentences"),
        ("a.txt", "good film\n\nbad film\n", "sentence 2 of 3 is empty"),
    ],
)
def test_a_file_that_holds_no_sentences_is_refused(tmp_path, name, content, said):
    path = _write(tmp_path, content, name)
    with pytest.raises(InputError, match=f"{name}.*{said}"):
        inputs.read_texts(path)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*a\.txt"):
        inputs.read_texts(_write(tmp_path, b"caf\xe9\n", "a.txt"))


def test_a_field_longer_than_csv_can_read_is_refused(tmp_path):
    path = _write(tmp_path, "sentence\n" + 200_000 * "x" + "\n")
    with pytest.raises(InputError, match=r"dev\.tsv"):
        inputs.read_texts(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing\.tsv"):
        inputs.read_texts(tmp_path / "nothing.tsv")


def test_a_folder_without_a_dev_set_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*dev\.tsv"):
        inputs.read_texts(tmp_path)


def test_the_shipped_sentences_are_many_and_no_two_are_the_same():
    texts, labels = inputs.read_texts(None)
    assert len(texts) > inputs.TEXT_BATCH
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() for text in texts)
    assert labels == []


def test_the_shipped_sentences_are_of_different_length():
    assert len({len(text.split()) for text in inputs.read_texts(None)[0]}) > 5


# ---------------------------------------------------------------- sentences in batches


class Tokens:
    """A tokenizer that gives every word its length as an id, and remembers how it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts, **how):
        self.asked.append(how)
        ids = [[len(word) for word in text.split()][: how["max_length"]] for text in texts]
        longest = max(map(len, ids))
        padded = [row + [0] * (longest - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        return {
            "attention_mask": np.array(mask, np.int32),
            "input_ids": np.array(padded, np.int32),
            "token_type_ids": np.zeros((len(ids), longest), np.int32),
        }


def _texts(count):
    return [f"sentence number {'very ' * (i % 3)}{i}" for i in range(count)]


def test_sentences_come_in_batches_in_the_given_order():
    texts = _texts(35)
    found = inputs.text_batches(Tokens(), signature(), texts, [])
    assert [len(batch.texts) for batch in found] == [16, 16, 3]
    assert [text for batch in found for text in batch.texts] == texts
    assert [batch.note for batch in found] == [
        "sentences 1 to 16", "sentences 17 to 32", "sentences 33 to 35",
    ]  # fmt: skip
    assert {batch.source for batch in found} == {"text"}


def test_labels_stay_with_their_sentences():
    found = inputs.text_batches(Tokens(), signature(), _texts(20), list(range(20)))
    assert [batch.labels for batch in found] == [tuple(range(16)), (16, 17, 18, 19)]


def test_sentences_without_labels_have_none():
    (batch,) = inputs.text_batches(Tokens(), signature(), _texts(2), [])
    assert batch.labels == ()


def test_tokens_become_the_arrays_of_the_signature():
    (batch,) = inputs.text_batches(Tokens(), signature(), ["a bcd", "ef"], [])
    assert list(batch.arrays) == ["input_ids", "attention_mask", "token_type_ids"]
    assert batch.arrays["input_ids"].tolist() == [[1, 3], [2, 0]]
    assert batch.mask.tolist() == [[1, 1], [1, 0]]
    assert {array.dtype for array in batch.arrays.values()} == {np.dtype(np.int64)}


def test_long_sentences_are_cut_to_what_the_model_accepts():
    tokens = Tokens()
    inputs.text_batches(tokens, signature(max_length=5), _texts(2), [])
    assert (tokens.asked[0]["truncation"], tokens.asked[0]["max_length"]) == (True, 5)


def test_a_sentence_alone_needs_no_pad_token():
    tokens = Tokens()
    inputs.text_batches(tokens, signature(), _texts(17), [])
    assert [how["padding"] for how in tokens.asked] == [True, False]
