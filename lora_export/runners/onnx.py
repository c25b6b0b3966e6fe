"""An ONNX file, run by onnxruntime on the CPU."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from lora_export import registry, storage
from lora_export.errors import ExportFailed, InputError, first_line
from lora_export.records import LABEL, PROBABILITIES, TEXT, Array

# How far onnxruntime rewrites a graph, from not at all to all that it can.
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
EXTRA = "pip install 'lora-export[text]'"
DATA = "lora_export.data"  # metadata: name and digest of the file of weights
_TEXT_DOMAIN = "ai.onnx.contrib"  # of the operators on text


def open_runner(path: Path, threads: int) -> "OnnxRunner":
    """Return a runner for the file at `path`.

    Raises:
        InputError: the tokenizer is inside, and what runs it is not installed.
        ExportFailed: onnxruntime cannot open it, or its weights lie in another file that is not the
            one that was written with it.
    """
    try:
        runner = OnnxRunner(path, threads)
    except ExportFailed as error:
        if _TEXT_DOMAIN not in str(error):
            raise
        return open_text(path, threads)
    refuse_other_data(path, (), runner.metadata)
    return runner


def open_text(path: Path, threads: int) -> "OnnxTextRunner":
    """Return a runner for the file at `path`, which has the tokenizer inside, and its two parts."""
    from lora_export.runners import _onnx_text

    front, back = (functools.partial(f, path) for f in (_onnx_text.front, _onnx_text.back))
    return OnnxTextRunner(path, threads, front, back)


def refuse_other_data(path: Path, names: Iterable[str], said: Mapping[str, str]) -> None:
    """Raise unless the files `names` are those that the metadata `said` has.

    Raises:
        ExportFailed: the data of another export lies there, or none.
    """
    own = json.loads(said.get(DATA, "{}"))
    for name in {*names} | ({own["name"]} if own else set()):
        file = path.with_name(name)
        if own.get("name") != name or not file.is_file():
            raise ExportFailed(f"{path.name} needs {name}, which is not the data of an export")
        if storage.digest(file).digest != own["digest"]:
            raise ExportFailed(f"{name} is not the data that {path.name} was written with")


class OnnxRunner:
    """Runs an ONNX graph; spinning is off, so that it does not steal a neighbour's core."""

    name = "onnx"

    def __init__(
        self, model: Path | bytes, threads: int, library: str = "", level: str = LEVELS[-1]
    ) -> None:
        """Open the file or the bytes `model`; raises `ExportFailed` where onnxruntime cannot.

        Graphs are rewritten for speed as far as the `level` says, one of `LEVELS`.
        """
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        if library:
            options.register_custom_ops_library(library)
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.settings = {
            "intra_op_threads": threads,
            "inter_op_threads": options.inter_op_num_threads,
            "spinning": False,
            "memory_arena": options.enable_cpu_mem_arena,
            "graph_optimization": options.graph_optimization_level.name,
        }
        try:
            self.session = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # onnxruntime's own kinds have no class in common
            name = "the graph" if isinstance(model, bytes) else model.name
            raise ExportFailed(
                f"{name} cannot be opened by onnxruntime: {first_line(error)}"
            ) from error
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        said = json.loads(self.metadata.get(registry.PRECISION, f'"{registry.FULL}"'))
        self.precision = {"fp32": "float32", "fp16": "float16"}.get(said, said)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        values = self.session.run(self.outputs, dict(inputs))
        return dict(zip(self.outputs, values, strict=True))


class OnnxTextRunner(OnnxRunner):
    """Runs a graph with the tokenizer inside: on texts, and on token ids from behind it.

    `front` and `back` give the two models that the file consists of, up to the ids and from there;
    each is opened when it is first asked for.
    """

    def __init__(
        self, path: Path, threads: int, front: Callable[[], bytes], back: Callable[[], bytes]
    ) -> None:
        super().__init__(path, threads, text_library())
        self._threads, self._front, self._back = threads, front, back

    @functools.cached_property
    def _tokenizer(self) -> OnnxRunner:
        return OnnxRunner(self._front(), self._threads, text_library())

    @functools.cached_property
    def _model(self) -> OnnxRunner:
        return OnnxRunner(self._back(), self._threads)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for a text; for token ids, what the model behind answers."""
        return super().run(inputs) if TEXT in inputs else self._model.run(inputs)

    def read(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return all outputs for `texts`."""
        return self.run({TEXT: np.array(texts, object)})

    def tokenize(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return the token ids that the graph makes of `texts`, and the mask with them."""
        return self._tokenizer.run({TEXT: np.array(texts, object)})

    def answer(self, texts: Sequence[str]) -> dict[str, Array]:
        """Return what the model answers to `texts`, without what is made of it afterwards."""
        found = self.read(texts)
        return {name: found[name] for name in found if name not in (LABEL, PROBABILITIES)}


def write_as_run(path: Path, target: Path) -> None:
    """Write the graph of the file at `path` to `target`, as onnxruntime runs it; weights beside."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    entry = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{entry}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
    options.log_severity_level = 3  # that the file is for this machine is known
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def text_library() -> str:
    """Return the library of operators on text; raises `InputError` where it is not installed."""
    try:
        import onnxruntime_extensions
    except ImportError as error:
        raise InputError(f"onnxruntime-extensions is not installed; {EXTRA}") from error
    return str(onnxruntime_extensions.get_library_path())
