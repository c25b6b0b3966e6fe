"""Run runners on batches and keep what they answer: the evidence that outputs are judged by."""

from collections.abc import Iterable, Mapping

from lora_export.errors import first_line
from lora_export.records import Array, Batch, Recording
from lora_export.runners import Runner


def record(runner: Runner, batches: Iterable[Batch]) -> Recording:
    """Return what `runner` answers on `batches`: to texts, where it takes them.

    A batch at which it raises has no answer, and what it said: that too is evidence.
    """
    outputs: list[Mapping[str, Array]] = []
    errors = []
    read = getattr(runner, "answer", None)
    for batch in batches:
        try:
            outputs.append(read(batch.texts) if read and batch.texts else runner.run(batch.arrays))
            errors.append("")
        except Exception as error:  # runtimes raise as it comes
            outputs.append({})
            errors.append(first_line(error))
    raised = tuple(errors) if any(errors) else ()
    return Recording(runner.name, runner.precision, tuple(outputs), raised)
