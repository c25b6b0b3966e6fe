"""A model as a function of named tensors: which it takes, which it gives, with which axes.

All of it is found on the model itself, by its `forward`, its config and by running it, so that an
architecture needs no code here. There are four kinds of function: the plain forward, the pooled
embedding of sentence-transformers, a decoder with its cache, and an encoder-decoder with its cache.
"""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_export import inputs, models, storage
from lora_export.companions import SENTENCE_MODULES, is_headless
from lora_export.errors import InputError, first_line
from lora_export.records import PAST, PRESENT, Signature, TensorSpec

LONGEST = 512  # of a model whose positions have no end, and whose tokenizer names none
# Sizes of the axes in the two runs that tell which axis of an output is which.
_FIRST = {"batch": 2, "length": 5, "past": 6, "target": 7, "target_past": 8}
_SECOND = {"batch": 3, "length": 9, "past": 10, "target": 11, "target_past": 12}


class Tensors(nn.Module):
    """A model as a function of tensors: named inputs in order, the named outputs back."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...], pooling: str) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.pooling = pooling

    def call(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Return everything that the model answers for `given`, by name."""
        return dict(self.model(**given, return_dict=True).items())

    def everything(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Return what `call` does, computed in the model's own precision."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        with _InDouble() if dtype is torch.float64 else contextlib.nullcontext():
            return self.call(
                {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
            )

    def chosen(self, given: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for `given`: a tensor where there is one, else a tuple."""
        found = self.everything(given)
        # Half precision is handed over as float32, which is exact.
        values = tuple(
            v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
            for v in (found[name] for name in self.outputs)
        )
        return values[0] if len(values) == 1 else values


class _InDouble(TorchFunctionMode):
    """Keeps a model in float64 there: many compute norms, angles and softmax in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with float64 where float32 is asked for."""
        if func is Tensor.float:
            func = Tensor.double
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = kwargs or {}
        more = {n: torch.float64 if a is torch.float32 else a for n, a in named.items()}
        return func(*wide, **more)


class Pooled(Tensors):
    """An encoder whose answer is one vector per text, as sentence-transformers computes it."""

    def call(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Return the states of all tokens, and the vector that their pooling gives."""
        states = self.model(**given, return_dict=True).last_hidden_state
        pool: Any = _POOLINGS[self.pooling.removesuffix("+normalize")]
        pooled = pool(states, given["attention_mask"])
        if self.pooling.endswith("+normalize"):
            pooled = nn.functional.normalize(pooled, dim=-1)
        return {"last_hidden_state": states, "sentence_embedding": pooled}


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _last(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(states.shape[1], device=states.device)
    last = (places * mask).argmax(-1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


_POOLINGS = {
    "mean": _mean,
    "cls": lambda states, _: states[:, 0],
    "lasttoken": _last,
    "max": lambda states, mask: (
        states.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(states.dtype).min).max(1).values
    ),
}


class Cached(Tensors):
    """A decoder: keys and values of earlier tokens go in, those of all tokens come out.

    Positions follow the attention mask, as in transformers' `generate`, so that padding on the
    left is right.
    """

    def call(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Return the logits of the new tokens, and the cache with them."""
        mask, cache = given["attention_mask"], _cache(_pairs(given, ""))
        more = {}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
            more["position_ids"] = places[:, cache.get_seq_length() :]
        found = self.model(
            input_ids=given["input_ids"],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **more,
        )
        return {"logits": found.logits} | _present(cache, "")


class EncoderDecoder(Tensors):
    """An encoder and a decoder in one: source tokens, or what was computed of them, go in.

    A step of generation passes a source of no tokens, and the keys and values of the encoder that
    the first call gave: then nothing of the encoder is computed again.
    """

    def call(self, given: dict[str, Tensor]) -> dict[str, Any]:
        """Return the logits of the new target tokens, and both caches with what is new."""
        model: Any = self.model
        mask, ids = given["attention_mask"], given["decoder_input_ids"]
        source, target = _pairs(given, ".encoder"), _pairs(given, ".decoder")
        new = mask[:, source[0][0].shape[-2] :]
        fresh = _encoder_decoder_cache([], [])
        with _ViewsOfNothing():
            states = model.get_encoder()(
                input_ids=given["input_ids"], attention_mask=new, return_dict=True
            ).last_hidden_state
            # What this computes beside the keys and values of the new source is dropped on export.
            model.get_decoder()(
                input_ids=ids[:, :1],
                encoder_hidden_states=states,
                encoder_attention_mask=new,
                past_key_values=fresh,
                use_cache=True,
            )
        known = [
            (torch.cat([k, layer.keys], dim=-2), torch.cat([v, layer.values], dim=-2))
            for (k, v), layer in zip(source, fresh.cross_attention_cache.layers, strict=True)
        ]
        cache = _encoder_decoder_cache(target, known)
        # The decoder reads the keys and values; of the states it needs nothing but the shape.
        shape_only = states.new_zeros(1, 1, 1).expand(mask.shape[0], mask.shape[1], states.shape[2])
        found = model(
            encoder_outputs=(shape_only,),
            attention_mask=mask,
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return (
            {"logits": found.logits}
            | _present(cache.cross_attention_cache, ".encoder")
            | _present(cache.self_attention_cache, ".decoder")
        )


# Of each kind: what its caches have in their names, the axis of their tokens, and their place in
# transformers' cache.
_CACHES: dict[type[Tensors], tuple[tuple[str, str, str], ...]] = {
    Cached: (("", "past", ""),),
    EncoderDecoder: (
        (".encoder", "past", "cross_attention_cache"),
        (".decoder", "target_past", "self_attention_cache"),
    ),
}


class _ViewsOfNothing(TorchFunctionMode):
    """Says how long the axis is that a view leaves open by -1, which a tensor of no tokens needs.

    It follows from the axes that differ: of (B, 0, 32) as (B, 0, -1, 8) from 32 and 8.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; a view of open size with that size in it."""
        if func in (Tensor.view, Tensor.reshape, torch.reshape) and not kwargs:
            source, *sizes = args
            sizes = list(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
            if any(isinstance(size, int) and size == -1 for size in sizes):
                return func(source, _without_open_axis(list(source.shape), sizes))
        return func(*args, **(kwargs or {}))


def _without_open_axis(source: list[Any], sizes: list[Any]) -> list[Any]:
    place = next(i for i, size in enumerate(sizes) if isinstance(size, int) and size == -1)
    rest, known = list(source), []
    for size in (*sizes[:place], *sizes[place + 1 :]):
        same = next((i for i, other in enumerate(rest) if _is_same(size, other)), None)
        if same is None:
            known.append(size)
        else:
            del rest[same]
    return [*sizes[:place], math.prod(rest) // math.prod(known), *sizes[place + 1 :]]


def _is_same(size: Any, other: Any) -> bool:
    """Whether two sizes are equal, without a word to the tracer of what they are."""
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(size.node.expr == other.node.expr)
    symbols = isinstance(size, torch.SymInt) or isinstance(other, torch.SymInt)
    return not symbols and bool(size == other)


@dataclass(frozen=True)
class Interface:
    """How a model is called."""

    signature: Signature
    kind: type[Tensors] = Tensors
    pooling: str = ""

    def bind(self, model: nn.Module) -> nn.Module:
        """Return `model` as a module whose `forward` takes tensors of just these names.

        Tracers read the names of a model's inputs from the signature of `forward`, so it is made
        to say them.
        """
        names = tuple(spec.name for spec in self.signature.inputs)
        arguments = tuple(spec.argument for spec in self.signature.inputs)

        def forward(self: Tensors, *args: Tensor, **named: Tensor) -> Any:
            given = dict(zip(arguments, args, strict=False)) | named
            return self.chosen(
                {n: given[a] for n, a in zip(names, arguments, strict=True) if a in given}
            )

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in ("self", *arguments)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        outputs = tuple(spec.name for spec in self.signature.outputs)
        made: Any = type("Tensors", (self.kind,), {"forward": forward})
        found: nn.Module = made(model, outputs, self.pooling).eval()
        return found


def interface_of(
    model: nn.Module, tokens: Any | None, *, cache: bool = True, folder: Path | None = None
) -> Interface:
    """Return how `model` is called, found by looking at it and by running it at two shapes.

    Args:
        model: A model of transformers'.
        tokens: Its tokenizer; None for a model of pictures.
        cache: Whether a model that generates gives and takes its cache.
        folder: Where the model lies: what says how a sentence-transformer pools.

    Raises:
        InputError: what the model takes is neither token ids nor pixels, the tokenizer is not the
            model's, or its cache is something else than keys and values.
    """
    config: Any = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is state; those who want it ask for it in the call
    kind, pooling = Tensors, ""
    if models.takes_pictures(model):
        signature = _of_pictures(model)
    elif tokens is not None and model.main_input_name == "input_ids":
        signature = _of_texts(model, tokens)
        if cache and _writes(model):
            kind = EncoderDecoder if config.is_encoder_decoder else Cached
            signature = _with_caches(model, signature, _CACHES[kind])
        elif folder and is_headless(type(model).__name__) and (pooling := pooling_of(folder)):
            kind = Pooled
    else:
        raise InputError(
            f"{type(model).__name__} takes {model.main_input_name}; only models that take token "
            "ids or pixel values are exported"
        )
    signature = replace(signature, labels=_labels(model))
    blank = Interface(signature, kind, pooling)
    return replace(blank, signature=replace(signature, outputs=_outputs(blank, model)))


def _of_pictures(model: nn.Module) -> Signature:
    config: Any = model.config
    height, width = _pair(config.image_size)
    axes = ("batch", config.num_channels, height, width)
    return Signature((TensorSpec("pixel_values", "float32", axes),), (), 0, 0, 0)


def _of_texts(model: nn.Module, tokens: Any) -> Signature:
    config: Any = model.config
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in tokens.model_input_names if name in accepted]
    if "input_ids" not in names or "attention_mask" not in names:
        raise InputError(f"{name} does not take input_ids and attention_mask")
    if len(tokens) > config.vocab_size:
        raise InputError(
            f"the tokenizer knows {len(tokens)} tokens, the model {config.vocab_size}: they do not "
            "belong together, or the embeddings were not resized"
        )
    _set_padding(tokens, config, name)
    axes: tuple[str, ...] = ("batch", "sequence")
    if name.endswith("ForMultipleChoice"):
        axes = ("batch", "choices", "sequence")
    specs = [TensorSpec(name, "int64", axes) for name in names]
    if config.is_encoder_decoder and (is_headless(name) or _writes(model)):
        specs += [TensorSpec("decoder_input_ids", "int64", ("batch", "target"))]
    start = getattr(config, "decoder_start_token_id", None)
    return Signature(
        tuple(specs),
        (),
        _max_length(model, tokens),
        config.vocab_size,
        int(tokens.pad_token_id),
        start or 0,
    )


def _labels(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes where `model` chooses one of several for a whole text."""
    config: Any = model.config
    if (
        models.takes_pictures(model)
        or not type(model).__name__.endswith("ForSequenceClassification")
        or config.problem_type not in (None, "single_label_classification")
        or len(config.id2label) < 2
    ):
        return ()
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def _writes(model: nn.Module) -> bool:
    """Whether `model` writes text."""
    return bool(getattr(model, "can_generate", lambda: False)())


def _with_caches(
    model: nn.Module, signature: Signature, caches: Sequence[tuple[str, str, str]]
) -> Signature:
    """Return the signature of a model that writes, with keys and values in it."""
    found = _run(model, inputs.made(signature, 2, 3, "none", 0), use_cache=True)
    held = getattr(found, "past_key_values", None)
    specs = [
        replace(spec, axes=("batch", "total")) if spec.name == "attention_mask" else spec
        for spec in signature.inputs
        if spec.name in ("input_ids", "attention_mask", "decoder_input_ids")
    ]
    for of, axis, place in caches:
        layers = _layers(model, getattr(held, place, None) if place else held)
        specs += _cache_specs(layers, of, axis)
    return replace(signature, inputs=tuple(specs))


def _layers(model: nn.Module, cache: Any) -> list[tuple[Tensor, Tensor]]:
    layers = getattr(cache, "layers", None) or []
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    tensors = [(k, v) for k, v in found if isinstance(k, Tensor) and isinstance(v, Tensor)]
    if not tensors or len(tensors) < len(found) or any(t.ndim != 4 for p in tensors for t in p):
        raise InputError(
            f"the cache of {type(model).__name__} is {type(cache).__name__} of "
            f"{', '.join(sorted({type(x).__name__ for x in layers})) or 'nothing'}, and not keys "
            "and values of every layer; export it without: --no-cache"
        )
    return tensors


def _cache_specs(
    layers: Sequence[tuple[Tensor, Tensor]], of: str, axis: str
) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            f"{PAST}.{number}{of}.{what}",
            "float32",
            ("batch", value.shape[1], axis, value.shape[3]),
        )
        for number, pair in enumerate(layers)
        for what, value in zip(("key", "value"), pair, strict=True)
    )


def _pairs(given: Mapping[str, Tensor], of: str) -> list[tuple[Tensor, Tensor]]:
    keys = [n for n in given if n.startswith(f"{PAST}.") and n.endswith(f"{of}.key")]
    return [(given[name], given[f"{name.removesuffix('.key')}.value"]) for name in keys]


def _cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Return a cache of transformers' that holds `pairs` of keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        """A layer whose length is its shape's; theirs asks first whether it is empty."""

        def get_seq_length(self) -> Any:
            keys: Any = self.keys
            return keys.shape[-2]  # a number; in a trace a symbol

    cache = DynamicCache()
    for keys, values in pairs:
        layer: Any = Layer()  # type: ignore[no-untyped-call]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _encoder_decoder_cache(
    target: Sequence[tuple[Tensor, Tensor]], source: Sequence[tuple[Tensor, Tensor]]
) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if source:
        # Its constructor would ask whether the layers are empty, and freeze the answer in a trace.
        cache.self_attention_cache, cache.cross_attention_cache = _cache(target), _cache(source)
        cache.is_updated = dict.fromkeys(range(len(source)), True)
    return cache


def _present(cache: Any, of: str) -> dict[str, Tensor]:
    return {
        f"{PRESENT}.{number}{of}.{what}": value
        for number, layer in enumerate(cache.layers)
        for what, value in (("key", layer.keys), ("value", layer.values))
    }


@torch.inference_mode()
def _run(model: nn.Module, arrays: Mapping[str, Any], **more: Any) -> Any:
    """Return what `model` answers, by transformers' own names."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with _named(model, arrays):
        return model(**tensors, return_dict=True, **more)


@torch.inference_mode()
def _outputs(blank: Interface, model: nn.Module) -> tuple[TensorSpec, ...]:
    """Return what comes out: an axis that follows one of the inputs in two runs is dynamic."""
    module: Any = blank.bind(model)
    runs = []
    for shape in (_FIRST, _SECOND):
        batch, length, *_ = shape.values()
        more = {name: shape[name] for name in ("past", "target", "target_past")}
        arrays = inputs.made(blank.signature, batch, length, "none", 0, **more)
        with _named(model, arrays):
            found = module.everything({n: torch.from_numpy(a) for n, a in arrays.items()})
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        runs.append((blank.signature.sizes(arrays), tensors))
    (first, small), (second, large) = runs
    axes = {(size, second[name]): name for name, size in first.items()}
    specs = []
    for name, value in small.items():
        pairs = zip(value.shape, large[name].shape, strict=True)
        wide = torch.promote_types(value.dtype, torch.float32)  # how half precision is handed over
        found_axes = tuple(axes.get((a, b), a) for a, b in pairs)
        specs.append(TensorSpec(name, str(wide).removeprefix("torch."), found_axes))
    return tuple(specs)


@contextlib.contextmanager
def _named(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Turn whatever `model` raises into an `InputError` that names it and its inputs."""
    try:
        yield
    except Exception as error:  # models raise as it comes
        raise InputError(
            f"{type(model).__name__} does not run on {', '.join(names)}: {first_line(error)}"
        ) from error


def pooling_of(folder: Path) -> str:
    """Return how the sentence-transformer in `folder` pools: "mean", "cls+normalize"; "" for none.

    Raises:
        InputError: it consists of more than a transformer, one known pooling and normalising.
    """
    if not (folder / SENTENCE_MODULES).is_file():
        return ""
    modules = storage.read_json_list(folder / SENTENCE_MODULES)
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{folder} is a sentence-transformer of {', '.join(kinds)}; only Transformer, Pooling "
            "and Normalize are exported"
        )
    config = storage.read_json(folder / str(modules[1].get("path", "")) / "config.json")
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    named = config.get("pooling_mode")
    modes = [str(named)] if named else [n.removeprefix("pooling_mode_") for n in on]
    short = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes]
    if len(short) != 1 or short[0] not in _POOLINGS:
        raise InputError(f"{folder} pools by {', '.join(modes)}; known: {', '.join(_POOLINGS)}")
    return short[0] + ("+normalize" if "Normalize" in kinds else "")


def _set_padding(tokens: Any, config: Any, architecture: str) -> None:
    """Give the tokenizer a padding token, where the model does not care which one.

    A decoder with a classification head finds the last token that is not padding, so there the
    config has to say which token that is; elsewhere the mask hides it.
    """
    known = getattr(config, "pad_token_id", None)
    if known is None and architecture.endswith("ForSequenceClassification"):
        raise InputError(
            f"neither the config nor the tokenizer of {architecture} names a padding token; add "
            "pad_token_id, as it was in training, to config.json"
        )
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.convert_ids_to_tokens(known) if known else tokens.eos_token
    if tokens.pad_token_id is None:
        raise InputError("the tokenizer has neither a padding nor an end token")


def _max_length(model: nn.Module, tokens: Any) -> int:
    """Return the longest sequence that positions and tokenizer allow."""
    config: Any = model.config
    positions = int(getattr(config, "max_position_embeddings", 0) or LONGEST)
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's family counts positions from padding_idx + 1.
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
    return min(positions, int(tokens.model_max_length))


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
