"""A torch.export program, run by torch alone."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from lora_export.errors import ExportFailed, first_line
from lora_export.records import Array
from lora_export.runners._torch import NOTE, answers, precision_of


class Pt2Runner:
    """Runs a program operator by operator, as eager torch does.

    Its checks of the inputs stay on: sizes that do not belong together are an error. The number of
    threads is torch's own setting, one for the process.
    """

    name = "pt2"

    def __init__(self, path: Path) -> None:
        program, text = loaded(path)
        names = json.loads(text)
        self.inputs, self.outputs = (
            [spec["name"] for spec in names[side]] for side in ("inputs", "outputs")
        )
        self.module = program.module()
        self.precision = precision_of(self.module)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        return answers(self.module, inputs, self.inputs, self.outputs)


def open_runner(path: Path, threads: int) -> Pt2Runner:
    """Return a runner for the file at `path`; raises as `loaded` does.

    `threads` is not used: torch has one setting for all that runs in it, and the caller has set it.
    """
    return Pt2Runner(path)


def loaded(path: Path) -> tuple[ExportedProgram, str]:
    """Return the program in the file at `path`, and the note that lora-export left beside it.

    Raises:
        ExportFailed: torch cannot load the file, or there is no such note in it.
    """
    try:
        # `torch.export.load` would log what is wrong, and raise something else.
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            contents = load_pt2(stream)
        return contents.exported_programs["model"], contents.extra_files[NOTE]
    except KeyError as error:
        raise ExportFailed(
            f"{path.name} is no pt2 file of lora-export: it has no {error}"
        ) from error
    except Exception as error:  # unpickling and parsing a damaged file raise as it comes
        raise ExportFailed(f"{path.name} is no pt2 file: {first_line(error)}") from error
