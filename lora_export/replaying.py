"""Run the artifacts of a run again, elsewhere or later, against the answers that were saved.

Neither torch nor transformers, nor base, adapter or the model's code is needed.
"""

import dataclasses
from pathlib import Path

from lora_export import certificates, checks, judging, publishing, registry
from lora_export.environment import cores
from lora_export.errors import InputError
from lora_export.judging import Say, certify, silent
from lora_export.recording import record
from lora_export.records import REFERENCE, Certificate
from lora_export.runners import WITHOUT_TORCH


def replay(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    command: str = "lora_export.replay",
    say: Say = silent,
) -> Certificate:
    """Judge what the artifacts of the run in `folder` answer here and now to the saved inputs.

    With `out`, certificate, report and evidence are written to that directory.

    Raises:
        InputError: there is no run in `folder`, or nothing in it runs without torch.
        ExportFailed: an artifact cannot be opened.
    """
    folder = Path(folder)
    if out is not None:
        publishing.check_output(Path(out), overwrite=overwrite, directory=True, inputs=[folder])
    evidence = judging.saved_evidence(folder)
    artifacts = [a for a in evidence.artifacts if a.format in WITHOUT_TORCH]
    left = sorted({a.format for a in evidence.artifacts} - {a.format for a in artifacts})
    if not artifacts:
        known = " or ".join(WITHOUT_TORCH)
        raise InputError(f"no artifact in {folder} runs without torch: none is {known}")
    threads = cores()
    saved = evidence.recordings
    recordings = {name: saved[name] for name in (REFERENCE, evidence.floor) if name in saved}
    runtimes = {}
    for artifact in artifacts:
        say(f"running {artifact.format} again")
        load = registry.load("lora_export.runners", artifact.format)
        runner = load.open_runner(folder / artifact.files[0].name, threads)
        recordings[artifact.format] = record(runner, evidence.batches)
        runtimes[artifact.format] = runner.settings
    say("judging")
    again = dataclasses.replace(
        judging.with_files_now(evidence, folder),
        artifacts=tuple(artifacts),
        recordings=recordings,
        timings=(),
        measured=(),
        runtimes=runtimes,
    )
    settings = {"runtimes": runtimes, "notes": [f"{name} needs torch: not run" for name in left]}
    old = certificates.read(folder)
    judged = certify(again, checks.REPLAY, command, old.inputs, settings, threads)
    verdicts = (*judged.verdicts, *judging.changed_evidence(folder, old))
    certificate = dataclasses.replace(judged, verdicts=verdicts)
    if out is None:
        return certificate
    with publishing.staged(Path(out), overwrite=overwrite) as place:
        place.mkdir()
        return judging.publish_evidence(again, certificate, place, say=say)
