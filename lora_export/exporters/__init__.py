"""Artifact formats, one file each. The file's name is the name for `export --format`.

To add a format, add one file here with:

    SUFFIX = ".onnx"                        of the file it writes
    PRECISIONS = ("fp32", "int8")           that it can write
    OPTIONS = {"static": ("int8",)}         optional: other fields of `Form` that it heeds, and in
                                            which precisions they change something
    export(request: Request)                write `request.path` (and files beside it); raises
                                            `ExportFailed`
    inspect(path) -> Contents               what the written file says about itself
    tensors(path) -> Iterable               name and array of every constant tensor inside, one by
                                            one and in the same order each time; bfloat16 is that of
                                            ml_dtypes
    open_runner                             from the runner of the same name, in `runners/`
    files(path) -> Iterable[Path]           optional: the files it consists of, `path` first; else
                                            `path` and `path.*`
    running(path) -> Mapping[str, int]      optional: how often each operator is in the graph as its
                                            runtime runs it
    in_double(path) -> InDouble             optional: its graph, evaluated in float64; raises
                                            `ExportFailed`
    levels(path, threads)                   optional: names and runners of what its runtime makes of
                                            the graph, from the plainest on
    require()                               optional: raises where what writes or runs it is not
                                            there on this machine

Everything else (staging, digests, parity, latency, verdicts) follows from these.
"""

import contextlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from lora_export import environment, registry, storage
from lora_export.errors import InputError, LoraExportError
from lora_export.records import PLAIN, Array, Artifact, Form, Signature, TensorSpec

if TYPE_CHECKING:
    from torch import nn

MADE_WITH = "lora_export.made_with"  # metadata: versions
FORM = "lora_export.form"  # metadata: what was asked for beside the precision
CALIBRATION = "calibration"  # in it: that sentences were given which are not those of the package
_PIECE = 2**24  # bytes of an artifact that are looked through at a time


@dataclass(frozen=True)
class Request:
    """What an exporter is asked to write.

    Attributes:
        model: Takes tensors in the order of `signature.inputs` and returns a tensor, or a tuple of
            them, in the order of `signature.outputs`; its weights are the checkpoint's, in the
            checkpoint's dtype: `models.in_precision` or `weightless.hollow` is the exporter's part.
        signature: The inputs and outputs.
        example: Arrays for one call: two rows or more, an odd length, one row padded.
        about: Text to store in the file: labels and provenance.
        path: File to write.
        form: Precision, and what else can be chosen.
        calibration: Inputs of real texts or pictures, to choose by what to keep in full precision.
        tokens: The tokenizer; None for a model of pictures.
        say: To be called with each stage of a long export as it begins.
    """

    model: "nn.Module"
    signature: Signature
    example: Mapping[str, Array]
    about: Mapping[str, str]
    path: Path
    form: Form = PLAIN
    calibration: Sequence[Mapping[str, Array]] = ()
    tokens: Any = None
    say: Callable[[str], None] = lambda stage: None


@dataclass(frozen=True)
class Contents:
    """What a written artifact says about itself."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    names: tuple[str, ...]  # of operators, modules and tensors inside
    facts: Mapping[str, Any]  # opset, versions
    operators: Mapping[str, int] = field(default_factory=dict)  # how often each is in the graph


class InDouble(Protocol):
    """The graph of an artifact in float64: what it means, without what a runtime rounds.

    Both raise `ExportFailed` where the graph cannot be evaluated.
    """

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs; what the graph does not take is left out."""
        ...

    def values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every float that the graph computes, by its name inside."""
        ...


def names() -> tuple[str, ...]:
    """Return the known artifact formats: the files of this folder."""
    return registry.names(__name__)


def load(name: str) -> registry.Entry:
    """Return the module of the format `name`; raises `InputError` for an unknown one."""
    return registry.load(__name__, name)


def refuse_unknown(name: str, form: Form) -> None:
    """Raise `InputError` where the format `name` cannot have the form."""
    exporter = load(name)
    if form.precision not in exporter.PRECISIONS:
        known = ", ".join(exporter.PRECISIONS)
        raise InputError(f"{name} is written in {known}, not {form.precision}")
    if form.target not in environment.TARGETS:
        raise InputError(f"{form.target!r} is none of {', '.join(environment.TARGETS)}")
    heeded = getattr(exporter, "OPTIONS", {})
    for option, value in form.asked.items():
        if form.precision not in heeded.get(option, ()):
            flag = "--" + ("no-" if value is False else "") + option.replace("_", "-")
            if option not in heeded:
                raise InputError(f"{name} has no {flag}")
            raise InputError(f"{flag} changes nothing for {name} in {form.precision}")


def artifacts_in(folder: Path) -> tuple[Path, ...]:
    """Return the files in `folder` that are named as an exporter names them."""
    if not folder.is_dir():
        return ()
    return tuple(file for file in sorted(folder.iterdir()) if file.is_file() and _known(file))


def by_format(paths: Iterable[Path]) -> dict[str, Path]:
    """Return each of `paths` under its format, which its suffix tells.

    Raises:
        InputError: there is none, no such file, an unknown suffix, or two of one format.
    """
    found: dict[str, Path] = {}
    for path in paths:
        name = format_of(path)
        if not path.is_file():
            raise InputError(f"no artifact at {path}")
        if name in found:
            raise InputError(f"{found[name]} and {path} are both {name}; check them one at a time")
        found[name] = path
    if not found:
        raise InputError("there is no artifact to check; pass --artifact")
    return found


def format_of(path: Path) -> str:
    """Return the format whose suffix `path` has; raises `InputError` where it has none of them."""
    if not (known := _known(path)):
        suffixes = ", ".join(load(name).SUFFIX for name in names())
        raise InputError(f"{path.name} ends in none of {suffixes}")
    return known


def _known(path: Path) -> str:
    """Return the format with the longest suffix that `path` has; "" where there is none."""
    fitting = [name for name in names() if path.name.endswith(load(name).SUFFIX)]
    return max(fitting, key=lambda name: len(load(name).SUFFIX), default="")


def form_of(artifact: Artifact) -> Form | None:
    """Return the form that `artifact` says it was asked for; None where it cannot be made again."""
    said = artifact.facts.get("metadata", {})
    if said.get(MADE_WITH) != json.dumps(environment.writers(), sort_keys=True):
        return None  # by other versions, or by others
    try:
        more = json.loads(said.get(FORM, "{}"))
        return None if more.pop(CALIBRATION, False) else Form(artifact.precision, **more)
    except (ValueError, TypeError, AttributeError):  # of a version that knows other forms
        return None


def lacking(name: str) -> str:
    """Return what the format `name` lacks on this machine; nothing where all of it is there."""
    try:
        getattr(load(name), "require", bool)()
    except LoraExportError as error:
        return str(error)
    return ""


def describe(name: str, path: Path) -> Artifact:
    """Return what was written to `path` in the format `name`, read back from the disk."""
    contents: Contents = load(name).inspect(path)
    found = files(name, path)
    return Artifact(
        format=name,
        files=tuple(storage.digest(file) for file in found),
        inputs=contents.inputs,
        outputs=contents.outputs,
        facts=dict(contents.facts),
        lora_names=tuple(sorted(n for n in contents.names if "lora" in n.lower())),
        leaked_paths=tuple(sorted({leak for file in found for leak in _leaks(file)})),
        operators=dict(sorted(contents.operators.items())),
    )


def files(name: str, path: Path) -> tuple[Path, ...]:
    """Return the files that the artifact at `path` in the format `name` consists of."""
    own = getattr(load(name), "files", None)
    if own is not None:
        return tuple(own(path))
    beside = path.parent.glob(f"{path.name}.*")  # a data file: model.onnx.data, never model.onnx2
    return (path, *sorted(file for file in beside if file.is_file()))


def _leaks(file: Path) -> Iterator[str]:
    """Yield which folders of this machine the bytes of `file` mention: what they are, not where."""
    places = {
        "the home folder": Path.home(),
        "the working folder": Path.cwd(),
        "the folder of Python": Path(sys.prefix),
        "the folder of the base Python": Path(sys.base_prefix),
        "the folder of lora-export": Path(__file__).parent,
    }
    marks = {
        what: f"{place}/".encode() for what, place in places.items() if place != Path(place.anchor)
    }
    overlap = max(map(len, marks.values())) - 1
    for piece in _pieces(file, overlap):
        yield from (what for what, mark in marks.items() if mark in piece)


def _pieces(file: Path, overlap: int) -> Iterator[bytes]:
    """Yield what `file` holds, unpacked, in pieces that begin with the end of the one before."""
    with contextlib.ExitStack() as stack:
        streams: Iterable[IO[bytes]] = [stack.enter_context(file.open("rb"))]
        if zipfile.is_zipfile(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
            streams = (stack.enter_context(archive.open(name)) for name in archive.namelist())
        for stream in streams:
            before = b""
            while new := stream.read(_PIECE):
                yield before + new
                before = (before + new)[-overlap:]
