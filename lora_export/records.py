"""The frozen values that travel between stages. Numpy at most; nothing here opens a file.

Shapes are written in plain letters: `in`, `out`, `rank`, `batch`, `sequence`, `classes`.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import CheckFailed, InputError, listed

Array = NDArray[Any]
LARGEST = 1e30  # of a rank, an alpha or a scale: anything above is nonsense


# ---------------------------------------------------------------- the adapter


# What kind of tensor a low-rank pair updates.
LINEAR = "linear"  # nn.Linear (out, in), and HF's Conv1D (in, out)
EMBEDDING = "embedding"  # (vocab, dim)
CONV = "conv"  # (out, in, *kernel)
EXPERTS = "experts"  # a parameter of fused experts, (experts, out, in) or (experts, in, out)


@dataclass(frozen=True)
class Factors:
    """The low-rank pair of one module; its update is `scale * b @ diag(diagonal) @ a`.

    Arrays keep the dtype of the file. An embedding is the map from vocab (in) to dim (out).
    """

    a: Array  # (rank, in); conv (rank, in, *kernel); experts (experts, rank, in)
    b: Array  # (out, rank); conv (out, rank, 1, ...); experts (experts, out, rank)
    alpha: float
    scale: float
    kind: str = LINEAR
    diagonal: Array | None = None  # (rank,): KaSA and AdaLoRA
    magnitude: Array | None = None  # (out,): DoRA
    bias: Array | None = None  # (out,): added to the layer's bias, times scale

    @property
    def rank(self) -> int:
        """The rank, taken from the tensor."""
        return int(self.a.shape[1 if self.kind == EXPERTS else 0])

    @property
    def is_zero(self) -> bool:
        """Whether the update is zero everywhere, as it is before any training."""
        if self.magnitude is not None or (self.bias is not None and self.bias.any()):
            return False
        parts = [self.a, self.b] + ([] if self.diagonal is None else [self.diagonal])
        return self.scale == 0 or not all(part.any() for part in parts)

    @property
    def is_plain(self) -> bool:
        """Whether the pair is all there is, on a linear layer."""
        extras = (self.diagonal, self.magnitude, self.bias)
        return self.kind == LINEAR and all(extra is None for extra in extras)

    def matrices(self) -> tuple[Array, Array]:
        """Return A (experts, rank, in) and B (experts, out, rank); one expert where there are none.

        The kernel of a convolution is part of `in`.
        """
        if self.kind == EXPERTS:
            return self.a, self.b
        return self.a.reshape(1, self.rank, -1), self.b.reshape(1, -1, self.rank)


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that were trained: they replace those of the base."""

    indices: tuple[int, ...]
    values: Array  # (rows, dim)


def tensor_of(path: str, kind: str) -> str:
    """Return the name of the tensor that an update of `kind` at `path` changes."""
    return path if kind == EXPERTS else f"{path}.weight"


@dataclass(frozen=True)
class Fingerprint:
    """A digest of the base tensors that an adapter touches, as they were when it was trained."""

    sha256: str
    tensors: int
    dtype: str | None  # safetensors' name (F32, BF16, ...) when all tensors share it


@dataclass(frozen=True)
class BaseRef:
    """What an adapter says about the base model that it was trained on."""

    id: str | None = None
    revision: str | None = None
    architecture: str | None = None  # transformers class name of the model with its head
    fingerprint: Fingerprint | None = None
    # Names and shapes of all tensors of the model that the adapter was trained in
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def public_id(self) -> str | None:
        """The id as it may stand in what we write: of a path, only the last component."""
        is_path = self.id is not None and (self.id[:1] in "/.~" or self.id.count("/") > 1)
        return self.id.rstrip("/").rsplit("/", 1)[-1] if self.id and is_path else self.id


@dataclass(frozen=True)
class Promises:
    """What an adapter's config says was trained, to be held against what its file holds."""

    adapted: tuple[str, ...] = ()  # module paths, or ends of paths
    saved: tuple[str, ...] = ()  # modules stored whole: paths, or ends of paths


@dataclass(frozen=True)
class Adapter:
    """One adapter, whatever file format it came from."""

    modules: Mapping[str, Factors]  # by module path in the model; experts by tensor name
    replaced: Mapping[str, Array]  # by tensor name: trained heads, biases; stored whole
    variant: str  # names of `variants/`, joined by "+"
    dropout: float = 0.0
    task_type: str | None = None  # PEFT's name: SEQ_CLS, CAUSAL_LM, ...
    base: BaseRef = field(default_factory=BaseRef)
    promises: Promises = field(default_factory=Promises)
    labels: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    format: str = "memory"
    sha256: str | None = None  # of the file, or over the files, that it was read from
    notes: tuple[str, ...] = ()
    rows: Mapping[str, Rows] = field(default_factory=dict)  # by module path
    ignored: Mapping[str, str] = field(default_factory=dict)  # tensor in the file -> reason
    fields: Mapping[str, Any] = field(default_factory=dict)  # of PEFT's config, kept as they are
    flat_names: bool = False  # dots of module paths became underscores (kohya)
    # Modules of which several parameters are updated, and these in the order that was assumed.
    nested: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What a caller knows about an adapter file that the file does not say."""

    alpha: float | None = None
    pattern_order: str | None = None  # of several matching patterns, "first" or "last" wins
    expert_b: str | None = None  # columns of fused experts' lora_B: "rank-major", "expert-major"
    registered: tuple[str, ...] = ()  # parameters of fused experts, in the model's order

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 < self.alpha < LARGEST:
            raise InputError(f"alpha is {self.alpha!r}; expected a number above 0")


# ---------------------------------------------------------------- the artifact


# Of keys and values that go in and come out, in front of layer and part; as optimum names them.
PAST, PRESENT = "past_key_values", "present"
# What an artifact with the tokenizer inside takes, and what a classifier of texts then gives.
TEXT, LABEL, PROBABILITIES = "text", "label", "probabilities"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")  # what a tokenizer makes


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and axes of one input or output; a string axis is dynamic."""

    name: str
    dtype: str  # numpy's name, int64 or float32; or string
    axes: tuple[str | int, ...]

    @property
    def argument(self) -> str:
        """The name as an argument of a Python function: without dots."""
        return self.name.replace(".", "_")


@dataclass(frozen=True)
class Signature:
    """The one truth about a model's inputs and outputs that every exporter and runner reads.

    The dynamic axes: `batch`, `choices`, `sequence` (new tokens), `past` (tokens in the cache),
    `total` (their sum, which the attention mask covers); and of a decoder beside an encoder,
    `target`, `target_past` and `target_total`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_length: int  # longest sequence that the model accepts; 0 where it takes none
    vocab_size: int
    pad_token_id: int
    start_token_id: int = 0  # what the decoder of an encoder-decoder begins with
    labels: tuple[str, ...] = ()  # where the logits choose one class for each text

    @property
    def of_text(self) -> "Signature":
        """The inputs and outputs of the same model with its tokenizer inside."""
        decided = (
            TensorSpec(LABEL, "string", ("batch",)),
            TensorSpec(PROBABILITIES, "float32", ("batch", len(self.labels))),
        )
        return replace(
            self,
            inputs=(TensorSpec(TEXT, "string", ("batch",)),),
            outputs=(*(decided if self.labels else ()), *self.outputs),
        )

    def sizes(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """Return the length of every dynamic axis, as the input `arrays` have it."""
        found = {
            axis: size
            for spec in self.inputs
            if spec.name in arrays
            for axis, size in zip(spec.axes, arrays[spec.name].shape, strict=False)
            if isinstance(axis, str)
        }
        if "target" in found:
            found["target_total"] = found["target"] + found.get("target_past", 0)
        return found

    def attended(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return for each axis that the attention mask covers where a token counts.

        The arrays are boolean, (batch, length) or (batch, choices, length).
        """
        if "attention_mask" not in arrays:
            return {}
        mask = arrays["attention_mask"].astype(bool)
        sizes = self.sizes(arrays)
        if "total" in sizes:
            return {"total": mask, "sequence": mask[:, sizes["past"] :]}
        return {"sequence": mask}

    @property
    def has_target(self) -> bool:
        """Whether a decoder's tokens go in beside those of an encoder."""
        return any("target" in spec.axes for spec in self.inputs)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values of earlier tokens go in and come out."""
        return any("past" in spec.axes for spec in self.inputs)


@dataclass(frozen=True)
class FileDigest:
    """One file of an output: its name relative to the output, size and digest."""

    name: str
    size_bytes: int
    digest: str  # the algorithm and the digest in hexadecimal: sha256:..., see storage.digest


@dataclass(frozen=True)
class Artifact:
    """An exported model: its format, every file that it consists of, and what was found inside."""

    format: str
    files: tuple[FileDigest, ...]
    inputs: tuple[TensorSpec, ...]  # as the written file declares them
    outputs: tuple[TensorSpec, ...]
    facts: Mapping[str, Any]  # opset, dtypes, versions: what the exporter read back
    lora_names: tuple[str, ...]  # operators or tensors that still carry LoRA
    leaked_paths: tuple[str, ...]  # paths of the exporting machine found inside the files
    beside: tuple[FileDigest, ...] = ()  # the tokenizer, or what prepares pictures
    precision: str = "fp32"  # of its weights: fp32, fp16, bf16, int8
    operators: Mapping[str, int] = field(default_factory=dict)  # how often each is in the graph

    @property
    def all_files(self) -> tuple[FileDigest, ...]:
        """Every file that goes with it."""
        return (*self.files, *self.beside)

    @property
    def takes_text(self) -> bool:
        """Whether the tokenizer is inside."""
        return any(spec.name == TEXT for spec in self.inputs)

    @property
    def is_reduced(self) -> bool:
        """Whether it is in less than single precision, and judged by its decisions."""
        return self.precision != "fp32"


# ---------------------------------------------------------------- what was observed


@dataclass(frozen=True)
class Form:
    """The form that an artifact is asked to have. Every exporter says which it can give."""

    precision: str = "fp32"  # of its weights
    static: bool = False  # int8: activations by ranges found beforehand, not anew in every call
    optimize: bool = True  # rewrite the graph for speed, at equal precision
    external_data: bool = False  # the weights in a file of their own
    target: str = "native"  # the processors that it is for
    text: bool = False  # the tokenizer inside: text goes in

    @property
    def asked(self) -> dict[str, Any]:
        """What differs from the usual, the precision left out."""
        usual = Form(self.precision)
        return {k: v for k, v in vars(self).items() if v != getattr(usual, k)}


PLAIN = Form()


@dataclass(frozen=True)
class Batch:
    """Named input arrays for one call, and where they come from."""

    source: str  # "text" or "image", or "grid": shapes made to find faults
    note: str
    arrays: Mapping[str, Array]
    texts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def mask(self) -> Array:
        """The attention mask, (batch, sequence), one where a token counts."""
        return self.arrays["attention_mask"]


@dataclass(frozen=True)
class Reply:
    """What an artifact with the tokenizer inside made of some texts."""

    texts: tuple[str, ...]
    expected: Mapping[str, Array]  # token ids and mask, as the tokenizer itself gives them
    found: Mapping[str, Array]  # as they are inside the artifact
    labels: tuple[str, ...] = ()  # what came out, where it was asked for
    answers: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Distance:
    """How far two recordings lie apart."""

    largest: float  # largest absolute deviation of an element
    compared: int  # elements compared; padded positions are left out
    defect: str = ""  # why the recordings cannot be compared at all
    batch: int = 0  # index of the batch with the largest deviation


@dataclass(frozen=True)
class Recording:
    """What one runner answered: named output arrays, one mapping per batch."""

    runner: str
    precision: str
    outputs: tuple[Mapping[str, Array], ...]
    errors: tuple[str, ...] = ()  # what it raised, for each batch; none where it answered them all


@dataclass(frozen=True)
class Timing:
    """Interleaved wall-clock samples of one batch shape, in milliseconds, by runner.

    Sample i of every runner was taken in round i, so samples pair up by position.
    """

    batch: int
    sequence: int
    threads: int
    samples_ms: Mapping[str, tuple[float, ...]]
    past: int = 0  # tokens in the cache


@dataclass(frozen=True)
class WeightAudit:
    """One merged tensor against the float64 value recomputed from the files.

    An element is misrounded when it is not a nearest representable neighbour of that value.
    """

    tensor: str
    elements: int  # that were derived again: all, or a sample of a large tensor
    of: int  # elements of the tensor
    misrounded: int
    largest_ulp: float
    unmoved: int  # elements whose update exceeds half an ulp, and which equal the base all the same
    lost_share: float  # ||stored - exact|| / ||update||: share of the update lost in rounding
    applied: float = 1.0  # <stored - base, update> / ||update||^2: 0 not at all, 2 twice
    # ||stored - base - applied * update|| / ||stored - base||: share that is no multiple of it
    strange: float = 0.0


@dataclass(frozen=True)
class Placement:
    """One tensor of the merged checkpoint, and where an artifact has it."""

    artifact: str  # its format
    tensor: str
    found: tuple[str, ...]  # names inside the artifact; where it is not there, the most similar
    how: str  # "as it is", "transposed", "rows 0 to 384", ...; "missing"; see `matching`
    elements: int
    differing: int  # elements whose bits differ
    largest: float  # absolute difference of an element


@dataclass(frozen=True)
class GraphAnswer:
    """What an artifact's own graph gives for one batch when it is evaluated in float64."""

    artifact: str
    batch: int  # index into the evidence's batches
    expected: Mapping[str, Array]  # of the merged model in float64
    found: Mapping[str, Array]
    error: str = ""  # why the graph could not be evaluated
    rounded: Mapping[str, Array] = field(default_factory=dict)  # of the merged model in float32


@dataclass(frozen=True)
class ModuleOutput:
    """The output of one module, in the order in which modules run, and what an artifact has of it.

    Deviations are largest absolute values, over the positions that are attended to.
    """

    artifact: str
    module: str
    value: str  # name inside the artifact of the value nearest to it; "" where none has its shape
    error: float  # deviation of that value from the reference
    size: float  # largest absolute value of the reference
    limit: float  # of `error`, up to which the two are the same
    kind: str = ""  # the class of the module; "output" of an output of the whole model
    # Whether it differs through no fault of its own: its input does as well; or what is computed
    # from it agrees, so that a fusion left it out; or no output is computed from it.
    excused: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the artifact has the module's output."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Alone:
    """What a runner answers to one row of a batch, without the other rows and their padding."""

    runner: str
    batch: int
    row: int
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Written:
    """Text that a runner wrote, always taking the likeliest token."""

    runner: str
    cached: bool  # whether keys and values of earlier tokens were handed on
    tokens: Array  # int64, (batch, new tokens)
    # The least change of a logit that would have chosen another token: half the distance of the two
    # largest; float64, (batch, new tokens)
    margins: Array


@dataclass(frozen=True)
class Repeat:
    """A second export of the same model, held against the first."""

    artifact: str
    first: tuple[FileDigest, ...]
    second: tuple[FileDigest, ...]
    differing: tuple[str, ...]  # names inside that differ: operators with their counts, tensors
    operators: Mapping[str, int]  # of the first
    operators_again: Mapping[str, int]


@dataclass(frozen=True)
class Claim:
    """What a file says of itself, and what is so."""

    subject: str  # merged, or an artifact's format
    name: str  # labels, base, adapter, tokenizer.json, ...
    expected: str
    found: str


@dataclass(frozen=True)
class Fusion:
    """How often an artifact, as its runtime runs it, has something as one operation."""

    artifact: str
    what: str  # "LayerNorm", "linear layers in eight bits", ...
    expected: int
    found: int
    note: str = ""  # which operators were counted


@dataclass(frozen=True)
class Account:
    """Where every tensor on both sides went. Each name appears in exactly one group of its side."""

    adapter_merged: tuple[str, ...]
    adapter_placed: tuple[str, ...]
    adapter_left: tuple[str, ...]  # nothing was done with these: a fault
    base_changed: tuple[str, ...]
    base_identical: tuple[str, ...]  # proved on the bytes that were written, or a sample of them
    base_dropped: Mapping[str, str]  # name -> reason
    base_damaged: tuple[str, ...]  # should be identical and is not: a fault
    unexplained: tuple[str, ...]  # written but in no plan: a fault
    is_sample: bool = False  # whether only some bytes of every copied tensor were compared


@dataclass(frozen=True)
class Modules:
    """Module paths and class names of a model."""

    expected: Mapping[str, str]  # of the architecture, built from its config without weights
    found: Mapping[str, str]  # of the merged model, loaded from disk
    lora_names: tuple[str, ...]  # tensors or modules that still carry LoRA
    claim: str = "the module tree is the architecture's"  # what it means that the two are equal


def lora_names(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return the `names` that speak of LoRA, where what is `known` of the model does not."""
    return tuple(sorted(name for name in {*names} - {*known} if "lora" in name.lower()))


@dataclass(frozen=True)
class Policy:
    """The limits of the checks that a caller may set."""

    multiple: float = 8.0  # tolerance of outputs, in noise floors; see `compare`
    tolerance: float | None = None  # absolute, in place of the derived one
    allowed_loss: float = 0.005  # of a task metric
    # Latency in units of the unmerged model's. Merging is meant to save time, never to cost it; a
    # tenth is what shared machines can tell apart.
    slowest: float = 1.10

    def __post_init__(self) -> None:
        given = (self.multiple, self.slowest, 1.0 if self.tolerance is None else self.tolerance)
        if not all(0 < value < np.inf for value in given) or not 0 <= self.allowed_loss < 1:
            raise InputError(f"{self}: limits are numbers above 0, the allowed loss below 1")


@dataclass(frozen=True)
class Evidence:
    """Everything the checks look at. Saved and loaded again, it is judged the same."""

    account: Account | None = None
    weights: tuple[WeightAudit, ...] = ()
    modules: Modules | None = None
    signature: Signature | None = None
    artifacts: tuple[Artifact, ...] = ()
    batches: tuple[Batch, ...] = ()
    recordings: Mapping[str, Recording] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()
    replies: tuple[Reply, ...] = ()  # of an artifact that takes text
    floor: str = "unmerged"  # the recording whose distance from the reference is the noise floor
    files: tuple[FileDigest, ...] = ()  # of the outputs, as they were when recorded
    files_now: tuple[FileDigest, ...] = ()  # of the same files, read again when judged
    measured: tuple["Measurement", ...] = ()  # what the stages cost
    runtimes: Mapping[str, Any] = field(default_factory=dict)  # how each was set, by its name
    policy: Policy = field(default_factory=Policy)
    placements: tuple[Placement, ...] = ()
    graphs: tuple[GraphAnswer, ...] = ()
    modules_compared: tuple[ModuleOutput, ...] = ()  # in the order in which they run
    alone: tuple[Alone, ...] = ()
    written: tuple[Written, ...] = ()
    repeats: tuple[Repeat, ...] = ()
    claims: tuple[Claim, ...] = ()
    fusions: tuple[Fusion, ...] = ()


# Names of the recordings that every run makes; the others are named after their artifact's format.
REFERENCE = "reference"  # the unmerged model, evaluated in float64
UNMERGED = "unmerged"  # the unmerged model in its own precision: sets the noise floor
IDLE = "idle"  # the unmerged model with its LoRA updates switched off
MERGED = "merged"  # the merged model, loaded from disk


# ---------------------------------------------------------------- what is concluded


class Status(enum.StrEnum):
    """The outcome of one check. Only `PASS` is a pass."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Verdict:
    """One claim, judged."""

    check: str
    subject: str
    status: Status
    measured: float | None
    limit: float | None
    unit: str
    compared: int  # how many things were compared; a pass over nothing does not exist
    note: str = ""
    where: tuple[str, ...] = ()  # what is at fault, by name: tensors, modules, files, texts

    def __post_init__(self) -> None:
        if self.status is Status.PASS and self.compared <= 0:
            raise AssertionError(f"{self.check}: a pass needs something that was compared")

    @property
    def passed(self) -> bool:
        """Whether the status is `PASS`."""
        return self.status is Status.PASS

    def __bool__(self) -> NoReturn:
        raise TypeError("a verdict is neither true nor false; ask for .passed")


@dataclass(frozen=True)
class Measurement:
    """A number without a limit."""

    name: str
    subject: str
    value: float
    unit: str
    samples: int


@dataclass(frozen=True)
class Certificate:
    """Verdicts, measurements and the identity of everything that went in and came out."""

    command: str
    verdicts: tuple[Verdict, ...]
    measurements: tuple[Measurement, ...]
    inputs: tuple[FileDigest, ...]
    outputs: tuple[FileDigest, ...]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    evidence: tuple[FileDigest, ...] = ()  # the files that the verdicts were drawn from

    @property
    def ok(self) -> bool:
        """Whether there are verdicts and every one of them is a pass."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def require(self) -> None:
        """Raise `CheckFailed`, with the verdicts that are no pass, unless all of them are."""
        if not self.ok:
            bad = [f"{v.check} of {v.subject}: {v.status}" for v in self.verdicts if not v.passed]
            raise CheckFailed(listed("not proven", bad or ["there are no verdicts"]))


def all_finite(array: Array) -> bool:
    """Return whether every element of `array` is finite."""
    return bool(np.isfinite(array).all())


def is_float(array: Array) -> bool:
    """Return whether `array` holds floating-point numbers; numpy does not count bfloat16."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def widened(array: Array) -> Array:
    """Return half precision as float32, which is exact; anything else as it is."""
    narrow = is_float(array) and array.dtype.itemsize == 2
    return array.astype(np.float32) if narrow else array
