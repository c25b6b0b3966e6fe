"""Write an adapter in another format."""

from pathlib import Path

from lora_export import formats, publishing, storage
from lora_export.adapter import locate, read_adapter
from lora_export.errors import InputError
from lora_export.normalising import normalised
from lora_export.records import Adapter, Reading
from lora_export.refusals import refused


def convert(
    adapter: str | Path,
    out: str | Path,
    *,
    format: str = "peft",
    normalise: bool = False,
    overwrite: bool = False,
    adapter_format: str | None = None,
    reading: Reading | None = None,
) -> Adapter:
    """Write an adapter to `out` as `format`, and return what was written.

    Args:
        adapter: A file, a directory, or a hub id.
        out: The directory or file to write.
        format: A format that can be written.
        normalise: Multiply scales, patterns and rsLoRA into B (see `normalising`).
        overwrite: Replace an existing `out`.
        adapter_format: What to read the adapter as; None recognises it.
        reading: What the caller knows and the file does not say.

    Raises:
        InputError: the adapter is damaged or cannot be written so; nothing is left behind then.
    """
    writer = formats.load(format)
    if not hasattr(writer, "write"):
        raise InputError(f"adapters are not written as {format}")
    source, target = locate(adapter), Path(out)
    found = read_adapter(source, adapter_format, reading)
    if found.flat_names:
        raise InputError(refused("flat-names", str(source)))
    if normalise:
        found = normalised(found)
    directory = format == "peft"
    publishing.check_output(target, overwrite=overwrite, directory=directory, inputs=[source])
    with publishing.staged(target, overwrite=overwrite) as place:
        writer.write(found, place)
        if directory:  # a mark of ours, so that --overwrite may replace it
            source_of = {"schema": 1, "converted": found.sha256, "normalised": normalise}
            storage.write_json(place / publishing.MARKS[0], source_of)
    return found
