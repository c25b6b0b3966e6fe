"""The graph of a tokenizer: from text to token ids, in operators of onnxruntime-extensions.

Two kinds are written: BERT's WordPiece, and byte-level BPE as GPT-2 and RoBERTa have it. Of
WordPiece, onnxruntime-extensions has the greedy search for pieces alone. Its own lower-casing,
accents and control characters differ from Hugging Face's. So what the tokenizer does to each code
point is asked of the tokenizer, and stored in the file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from lora_export import inputs
from lora_export.errors import InputError, listed
from lora_export.exporters._onnx_graph import Model
from lora_export.records import TEXT, Signature

DOMAIN = "ai.onnx.contrib"
_BLOCK = 256  # code points that are looked at together first
# BERT's pre-tokenizer sets every ASCII punctuation mark apart, so that no word but "!" holds one:
# what begins with it in the graph can be no word of a text.
_MARK = "!"
# What Hugging Face takes away beside an added token: Unicode's White_Space.
_SPACE = r"[\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]"
OPSETS = f'["" : 20, "ai.onnx.ml" : 4, "{DOMAIN}" : 1]'

# In: `text`. Out: `flat`, the ids of all texts in a row; `text_rows`, where those of each begin.
# WordpieceTokenizer leaves what it found of a word before it gave up; so it is asked twice.
# The shapes at its head are for onnx's shape inference, which crashes where LabelEncoder has none.
_WORDPIECE = """
<string[pieces] kept_pieces, string[parts] parts>
{
    pieces, piece_begins, piece_ends, rows =
        ai.onnx.contrib.StringRegexSplitWithOffsets(text, pattern, pattern)
    spaced = ai.onnx.contrib.StringRegexReplace(pieces, apart, with_spaces)
    kept_pieces = ai.onnx.contrib.StringRegexReplace(spaced, removed, nothing)
    images = ai.onnx.ml.LabelEncoder(kept_pieces)
    is_unchanged = Equal(images, mark)
    written = Where(is_unchanged, kept_pieces, images)
    row_begins = Slice(rows, zero, minus_one)
    row_ends = Slice(rows, one, end)
    row_counts = Sub(row_ends, row_begins)
    longest = ReduceMax<keepdims = 0>(row_counts)
    row_width = Max(longest, one_alone)
    row_columns = Range(zero_alone, row_width, one_alone)
    row_begins_down = Unsqueeze(row_begins, one)
    row_ends_down = Unsqueeze(row_ends, one)
    row_places = Add(row_begins_down, row_columns)
    in_row = Less(row_places, row_ends_down)
    piece_count = Shape(pieces)
    piece_index = Where(in_row, row_places, piece_count)
    pieces_and_none = Concat<axis = 0>(written, nothing)
    grid = Gather(pieces_and_none, piece_index)
    lines = ai.onnx.contrib.StringJoin(grid, nothing, one)
    words, word_begins, word_ends, word_rows =
        ai.onnx.contrib.StringRegexSplitWithOffsets(lines, space, nothing)
    tried, tried_rows, tried_begins, tried_ends =
        ai.onnx.contrib.WordpieceTokenizer(words, no_rows)
    tried_last = Sub(tried_ends, one)
    last_piece = Gather(tried, tried_last)
    is_unknown = Equal(last_piece, unknown)
    known_words = Where(is_unknown, unknown, words)
    parts, part_rows, part_begins, part_ends =
        ai.onnx.contrib.WordpieceTokenizer(known_words, no_rows)
    flat = ai.onnx.ml.LabelEncoder(parts)
    text_rows = Gather(part_rows, word_rows)
"""
# GPT2Tokenizer knows added tokens, but loses letters after what only begins like one: "<3".
_BPE = """
<string[pieces] pieces>
{
    trimmed = ai.onnx.contrib.StringRegexReplace(text, swallowing, token_alone)
    pieces, piece_begins, piece_ends, rows =
        ai.onnx.contrib.StringRegexSplitWithOffsets(trimmed, pattern, pattern)
    added = ai.onnx.ml.LabelEncoder(pieces)
    added_id = Unsqueeze(added, one)
    is_added = GreaterOrEqual(added_id, zero)
    bare_ids, bare_mask = ai.onnx.contrib.GPT2Tokenizer(pieces)
    wide_ids = Pad(bare_ids, one_column)
    wide_mask = Pad(bare_mask, one_column)
    wide_shape = Shape(wide_mask)
    piece_width = Gather(wide_shape, one_alone)
    piece_columns = Range(zero_alone, piece_width, one_alone)
    is_first = Less(piece_columns, one_alone)
    first = Cast<to = 7>(is_first)
    piece_ids = Where(is_added, added_id, wide_ids)
    piece_mask = Where(is_added, first, wide_mask)
    all_piece_ids = Reshape(piece_ids, minus_one)
    whole_mask = Reshape(piece_mask, minus_one)
    are_tokens = Cast<to = 9>(whole_mask)
    flat = Compress(all_piece_ids, are_tokens)
    piece_counts = ReduceSum<keepdims = 0>(piece_mask, one)
    piece_sums = CumSum(piece_counts, zero_alone)
    piece_rows = Concat<axis = 0>(zero, piece_sums)
    text_rows = Gather(piece_rows, rows)
"""
# Every place of the output is an index into all ids, followed by what is put around them: those
# before, those after, the padding. `before` and `around` count them, `most` is left for the text.
_AROUND = """
    text_begins = Slice(text_rows, zero, minus_one)
    text_ends = Slice(text_rows, one, end)
    counts = Sub(text_ends, text_begins)
    begins = Unsqueeze(text_begins, one)
    fitting = Min(counts, most)
    kept = Unsqueeze(fitting, one)
    ends = Add(kept, before)
    lengths = Add(kept, around)
    width = ReduceMax<keepdims = 0>(lengths)
    columns = Range(zero_alone, width, one_alone)
    count = Shape(flat)
    is_before = Less(columns, before)
    behind = Sub(columns, kept)
    behind_or_padding = Min(behind, around)
    place_around = Where(is_before, columns, behind_or_padding)
    index_around = Add(place_around, count)
    place = Sub(columns, before)
    index_inside = Add(place, begins)
    has_begun = GreaterOrEqual(columns, before)
    has_not_ended = Less(columns, ends)
    is_inside = And(has_begun, has_not_ended)
    index = Where(is_inside, index_inside, index_around)
    all_ids = Concat<axis = 0>(flat, specials)
    input_ids = Gather(all_ids, index)
    is_attended = Less(columns, lengths)
    attention_mask = Cast<to = 7>(is_attended)
    token_type_ids = Mul(attention_mask, zero)
"""
_CONSTANTS: dict[str, Any] = {
    "zero": [0],
    "one": [1],
    "minus_one": [-1],
    "end": [2**63 - 1],
    "zero_alone": 0,
    "one_alone": 1,
    "no_rows": [],
}


def tokenizer(tokens: Any, signature: Signature) -> Model:
    """Return the graph from `text` to token ids, mask and what else `signature` takes.

    Raises:
        InputError: a kind of tokenizer that has no such graph.
    """
    backend = getattr(tokens, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{type(tokens).__name__} has no tokenizer.json to make a graph of")
    said = json.loads(backend.to_str())
    _refuse_settings(tokens, said)
    kind = said["model"]["type"]
    write: Any = {"WordPiece": _wordpiece, "BPE": _bpe}.get(kind)
    if write is None:
        raise InputError(
            f"the tokenizer is a {kind} model; a graph is made of WordPiece and byte-level BPE only"
        )
    body, constants, attributes = write(backend, said)
    before, after = _specials(tokens)
    around = len(before) + len(after)
    constants |= {
        "specials": [*before, *after, int(tokens.pad_token_id)],
        "before": [len(before)],
        "around": [around],
        "most": [signature.max_length - around],
    }
    outputs = ", ".join(f"int64[batch, sequence] {spec.name}" for spec in signature.inputs)
    return stated(
        f"<ir_version: 10, opset_import: {OPSETS}>\n"
        f"tokenizer (string[batch] {TEXT}) => ({outputs}){body}{_AROUND}}}",
        constants,
        attributes,
    )


def stated(
    text: str, constants: Mapping[str, Any], attributes: Mapping[str, Mapping[str, Any]]
) -> Model:
    """Return the graph that `text` states, with constants by name, and attributes by output.

    Constants are nodes: the weights of the file are its only initializers.
    """
    known = {**_CONSTANTS, **constants}
    head, body = text.split("{", 1)
    lines = "".join(f"\n    {name} = Constant()" for name in known)
    model: Model = ir.from_onnx_text(f"{head}{{{lines}{body}")
    for node in model.graph:
        name = node.outputs[0].name
        more = {_kind(known[name]): known[name]} if name in known else attributes.get(name, {})
        for key, value in more.items():
            empty = isinstance(value, list) and not value
            made = ir.AttrInt64s(key, ()) if empty else ir.convenience.convert_attribute(key, value)
            node.attributes.add(made)
    return model


def _kind(value: Any) -> str:
    """Return the name of the attribute that holds a constant such as `value`."""
    if isinstance(value, int):
        return "value_int"
    return "value_strings" if value and isinstance(value[0], str) else "value_ints"


def _refuse_settings(tokens: Any, said: Mapping[str, Any]) -> None:
    """Raise where the tokenizer is set to something that the graph does not do."""
    faults = [
        f"{name} is {getattr(tokens, name)!r}"
        for name in ("padding_side", "truncation_side")
        if getattr(tokens, name) != "right"
    ]
    faults += [
        f"{token['content']!r} is found as a whole word only"
        for token in said["added_tokens"]
        if token["single_word"]
    ]
    if faults:
        raise InputError(listed("the tokenizer does what a graph does not", faults))


def _specials(tokens: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and behind a text."""
    (sentence, *_), _ = inputs.read_texts(None)
    whole, bare = (
        tokens(sentence, add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise InputError("the tokenizer puts special tokens between those of a text")


def _wordpiece(backend: Any, said: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Return body, constants and attributes of the graph of BERT's tokenizer."""
    model, normalizer, splitter = (said[k] for k in ("model", "normalizer", "pre_tokenizer"))
    added = [token["content"] for token in said["added_tokens"]]
    late = [t["content"] for t in said["added_tokens"] if t["normalized"]]
    if (normalizer or {}).get("type", "BertNormalizer") != "BertNormalizer" or late:
        kind = (normalizer or {}).get("type")
        raise InputError(
            listed(f"tokens are looked for after {kind}", late)
            if late
            else f"the tokenizer normalises by {kind}; a graph is made of BertNormalizer only"
        )
    if (splitter or {}).get("type") != "BertPreTokenizer":
        raise InputError(
            f"the tokenizer splits words by {(splitter or {}).get('type')}; with WordPiece, a "
            "graph is made of BertPreTokenizer only"
        )
    images = _images(_Words(backend))
    # The operators compile expressions in every call: short ones, for what comes in long runs.
    apart = _long_runs(c for c, image in images.items() if image == f" {c} ")
    removed = _long_runs(c for c, image in images.items() if not image)
    in_runs = {chr(code) for run in (*apart, *removed) for code in run}
    others = {c: image for c, image in images.items() if c not in in_runs}
    others |= {token: f" {_MARK}{token} " for token in added}
    ids = {**model["vocab"], **{f"{_MARK}{t['content']}": t["id"] for t in said["added_tokens"]}}
    # A run of letters that stay as they are is one piece, where no added token begins in it.
    taken = {*images, *(token[0] for token in added)}
    plain = _in(_runs(chr(code) for code in range(1, 128) if chr(code) not in taken))
    constants = {
        "pattern": [
            f"({''.join(f'{_literal(t)}|' for t in _longest_first(added))}{plain}+|(?s:.))"
        ],
        "apart": [f"^({_in(apart)})$"],
        "with_spaces": [r" \1 "],
        "removed": [f"^{_in(removed)}$"],
        "nothing": [""],
        "space": ["( +)"],
        "unknown": [model["unk_token"]],
        "mark": [_MARK],
    }
    pieces = {
        "vocab": json.dumps(ids),
        "suffix_indicator": model["continuing_subword_prefix"],
        "unknown_token": model["unk_token"],
        "max_input_chars_per_word": model["max_input_chars_per_word"],
    }
    attributes = {
        "images": {
            "keys_strings": list(others),
            "values_strings": list(others.values()),
            "default_string": _MARK,
        },
        "tried": pieces,
        "parts": pieces,
        "flat": {
            "keys_strings": list(ids),
            "values_int64s": list(ids.values()),
            "default_int64": ids[model["unk_token"]],
        },
    }
    return _WORDPIECE, constants, attributes


class _Words:
    """What BERT's normaliser and pre-tokenizer make of a few characters inside a word."""

    def __init__(self, backend: Any) -> None:
        self.normalizer, self.splitter = backend.normalizer, backend.pre_tokenizer

    def __call__(self, characters: str) -> str:
        """Return what becomes of `characters`: a space stands where a word ends."""
        text = f"a{characters}a"
        if self.normalizer is not None:
            text = self.normalizer.normalize_str(text)
        return " ".join(word for word, _ in self.splitter.pre_tokenize_str(text))[1:-1]


def _images(words: _Words) -> dict[str, str]:
    """Return what `words` makes of every code point that does not stay as it is.

    No code point of BERT's changes what becomes of its neighbour. NUL, at which onnxruntime ends
    a text, and surrogates are left out.
    """
    found: dict[str, str] = {}
    for start in range(0, 0x110000, _BLOCK):
        block = [chr(c) for c in range(start or 1, start + _BLOCK) if not 0xD800 <= c <= 0xDFFF]
        image = words("".join(block))
        if image != "".join(block):  # most are: private, or not assigned
            found |= {c: words(c) for c in block} if image else dict.fromkeys(block, "")
    return {c: image for c, image in found.items() if c != image}


def _bpe(backend: Any, said: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Return body, constants and attributes of the graph of a byte-level BPE tokenizer."""
    model, splitter = said["model"], said["pre_tokenizer"] or {}
    usual = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    asked = {name: splitter.get(name) for name in usual}
    off = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    others = [name for name in (*off, "ignore_merges") if model.get(name)]
    if said["normalizer"]:
        others.append("normalizer")
    if asked != usual or others:
        faults = [*others, *(f"{k} {v!r}" for k, v in asked.items() if v != usual[k])]
        raise InputError(
            listed("a graph is made of BPE as GPT-2 has it only; this tokenizer has", faults)
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    added = said["added_tokens"]
    swallowing, alone = _trimming(added)
    ids = {token["content"]: token["id"] for token in added} or {"": -1}
    attributes = {
        "bare_ids": {
            "vocab": json.dumps(model["vocab"]),
            "merges": "\n".join(merges),
        },
        "added": {
            "keys_strings": list(ids),
            "values_int64s": list(ids.values()),
            "default_int64": -1,
        },
    }
    constants = {
        "swallowing": [swallowing],
        "token_alone": [alone],
        "pattern": [f"({'|'.join(map(_literal, _longest_first(ids)))})" if added else _in(())],
        "one_column": [0, 0, 0, 1],
    }
    return _BPE, constants, attributes


def _trimming(added: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the expression that finds tokens with the white space they swallow; what stays."""
    sides = {(bool(t["lstrip"]), bool(t["rstrip"])) for t in added}
    parts, groups = [], []
    for number, (left, right) in enumerate(sorted(sides - {(False, False)}), 1):
        names = [t["content"] for t in added if (t["lstrip"], t["rstrip"]) == (left, right)]
        found = "|".join(_literal(name) for name in _longest_first(names))
        parts.append(
            f"{_SPACE + '*' * left if left else ''}({found}){_SPACE + '*' if right else ''}"
        )
        groups.append(f"\\{number}")
    return "|".join(parts) or _in(()), "".join(groups)


def _longest_first(tokens: Iterable[str]) -> list[str]:
    return sorted(tokens, key=len, reverse=True)


def _literal(text: str) -> str:
    return "".join(f"\\x{{{ord(c):X}}}" for c in text)


def _in(runs: Iterable[range]) -> str:
    """Return the RE2 expression for a character in `runs`; it never fits where there are none."""
    found = "".join(f"\\x{{{run[0]:X}}}-\\x{{{run[-1]:X}}}" for run in runs)
    return f"[{found}]" if found else r"[^\x{0}-\x{10FFFF}]"


def _long_runs(characters: Iterable[str]) -> list[range]:
    return [run for run in _runs(characters) if len(run) >= _BLOCK]


def _runs(characters: Iterable[str]) -> list[range]:
    """Return the code points of `characters` as ranges."""
    found: list[range] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1].stop == code:
            found[-1] = range(found[-1].start, code + 1)
        else:
            found.append(range(code, code + 1))
    return found
