"""AOTInductor: torch.export, compiled to machine code by g++. One file, for one kind of processor.

The fastest of the formats that torch runs, and the least portable: the package holds the processor,
the system and the version of torch that it needs.
"""

import contextlib
import json
import platform
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, cpu_vec_isa
from torch.export.pt2_archive import PT2ArchiveWriter

from lora_export import models
from lora_export.errors import ExportFailed, first_line
from lora_export.exporters import Contents, Request
from lora_export.exporters._program import as_text, captured, declared, from_text
from lora_export.records import Array
from lora_export.runners._torch import NOTE, precision_of
from lora_export.runners.aoti import note_of, refuse_other_machine
from lora_export.runners.aoti import open_runner as open_runner
from lora_export.torch_rounding import as_array

SUFFIX = ".aoti.pt2"
PRECISIONS = ("fp32", "fp16", "bf16")
OPTIONS = {"target": PRECISIONS}
# The instruction sets of the targets, as torch names them.
_AVX512 = {"avx512", "avx512_vnni"}
_INSTRUCTIONS = {
    "native": None,
    "generic": {"avx2"},
    "cpu-avx512": _AVX512,
    "cpu-amx": {*_AVX512, "amx_tile"},
}
_BUILD_ID = re.compile(rb"(\x04\0{3}\x14\0{3}\x03\0{3}GNU\0).{20}", re.DOTALL)  # an ELF note
_INSIDE = "data/aotinductor/model/"  # where torch's loader looks


def require() -> None:
    """Raise `ExportFailed` where there is no compiler."""
    wanted = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, wanted)):
        raise ExportFailed(
            f"aoti: no C++ compiler: {' or '.join(wanted)} is not there; install g++ (on Debian: "
            "apt-get install g++) or name another in the environment variable CXX"
        )


def export(request: Request) -> None:
    """Compile the model, every string axis of the signature free, 0 and 1 included.

    Raises:
        ExportFailed: there is no C++ compiler, torch cannot compile for the target here, the model
            is an encoder-decoder with its cache, or torch cannot export or compile it.
    """
    require()
    with _compiling_for(request.form.target):
        _export(request)


def _export(request: Request) -> None:
    signature = request.signature
    if signature.has_cache and signature.has_target:
        # It divides by the number of tokens, and ends the process.
        raise ExportFailed(
            "aoti: compiled code cannot take the source of no tokens that each step of an "
            "encoder-decoder passes; export it to pt2 or onnx, or without: --no-cache"
        )
    model = models.in_precision(request.model, request.form.precision)
    program = captured("aoti", model, signature, request.example)
    isa = _isa()
    note = as_text(
        *declared(program, signature.inputs, signature.outputs),
        request.about,
        names=[*program.state_dict, *program.constants],
        precision=precision_of(model),
        target={"platform": sys.platform, "machine": platform.machine(), "isa": isa},
        torch=torch.__version__,
    )
    tensors = tuple(torch.from_numpy(request.example[spec.name]) for spec in signature.inputs)
    # Not beside `path`: the length of this folder's name leaves a trace in the library.
    with tempfile.TemporaryDirectory(prefix="lora_export-") as folder:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                written: Any = torch._inductor.aot_compile(
                    program.module(check_guards=False), tensors, options=_options(folder, isa)
                )
            _package(map(Path, written), note, Path(folder), request.path)
        except Exception as error:  # a compiler over a compiler: it raises as it comes
            raise ExportFailed(f"aoti: {first_line(error)}") from error


def inspect(path: Path) -> Contents:
    """Return what the package at `path` says of itself.

    Raises:
        ExportFailed: it is no package, or lora-export did not write it.
    """
    try:
        inputs, outputs, content = from_text(json.dumps(note_of(path)))
        return Contents(inputs, outputs, tuple(content.pop("names")), content)
    except (ValueError, KeyError) as error:
        raise ExportFailed(f"{path.name} is no AOTInductor package: {error}") from error


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Yield the constants of the package at `path`, as its code has them once it is loaded.

    Raises:
        InputError: the package is for another kind of processor.
        ExportFailed: it is no package, or lora-export did not write it.
    """
    refuse_other_machine(path, note_of(path)["target"])
    with tempfile.TemporaryDirectory(prefix="lora_export-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                library = next(name for name in archive.namelist() if name.endswith(".so"))
                code = archive.extract(library, folder)
            runner = torch._C._aoti.AOTIModelContainerRunnerCpu(code, 1)
        except (RuntimeError, zipfile.BadZipFile, StopIteration) as error:
            raise ExportFailed(f"{path.name} cannot be loaded: {error}") from error
        for name, tensor in runner.extract_constants_map(False).items():
            yield name, as_array(tensor.clone())  # its memory goes with the library


@contextlib.contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    """Have torch choose among the instructions of `target`; raises `ExportFailed` without any."""
    allowed = _INSTRUCTIONS[target]
    if allowed is None:
        yield
        return
    offered = cpu_vec_isa.valid_vec_isa_list()
    found = [isa for isa in offered if set(str(isa).split()) <= allowed]
    if not found:
        raise ExportFailed(
            f"aoti: torch cannot compile for {target} on this machine, which offers "
            f"{'; '.join(map(str, offered)) or 'no vectors'}"
        )
    with mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", return_value=found):
        yield


def _isa() -> list[str]:
    """Return the instruction sets that torch compiles for here, as it names them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []  # what else the machine has to be is in `target`
    picked = cpu_vec_isa.pick_vec_isa()
    return str(picked).split() if picked else []


def _options(folder: str, isa: Iterable[str]) -> dict[str, Any]:
    """Return settings of Inductor: what `isa` names and no more, no line numbers, fixed names."""
    options = {
        "aot_inductor.package": True,
        "aot_inductor.output_path": folder,
        "aot_inductor.model_name_for_generated_files": "model",
        "aot_inductor.enable_line_tables": False,
        "always_keep_tensor_constants": True,  # not as numbers in the code, where none finds them
        "cpp.dynamic_threads": True,  # or the number of threads here would be that everywhere
    }
    if platform.machine() in ("x86_64", "AMD64"):
        # Not "native": that is more than the package could state.
        options["cpp.march"] = "x86-64-v3" if isa else "x86-64"
    return options


def _package(written: Iterable[Path], note: str, folder: Path, path: Path) -> None:
    """Write the library and its metadata to `path`, without the sources and paths of this build."""
    places = {folder, Path(torch.__file__).parent, Path(sys.prefix), Path.home(), Path.cwd()}
    with path.open("w+b") as stream, PT2ArchiveWriter(stream) as archive:
        for file in sorted(written):
            if file.suffix in (".so", ".json"):
                archive.write_bytes(_INSIDE + file.name, _without(places, file.read_bytes()))
        archive.write_string(f"extra/{NOTE}", note)


def _without(places: Iterable[Path], content: bytes) -> bytes:
    """Return `content` with each place blanked to slashes, so that nothing in it moves.

    torch's headers put the names of their files into messages, and the compiler that of its source;
    the linker's identifier is a hash over them.
    """
    for place in sorted(map(str, places), key=len, reverse=True):
        if len(place) > 1:
            content = content.replace(place.encode() + b"/", b"/" * (len(place) + 1))
    return _BUILD_ID.sub(lambda found: found[1] + bytes(20), content)
