"""Numbers without a limit, drawn from the evidence: latency, accuracy, sizes."""

import numpy as np

from lora_export.records import Evidence, Measurement


def measure(evidence: Evidence) -> tuple[Measurement, ...]:
    """Return every number that a reader of the certificate would ask for."""
    return (*evidence.measured, *_latencies(evidence), *_accuracies(evidence), *_sizes(evidence))


def _latencies(evidence: Evidence) -> list[Measurement]:
    found = []
    for timing in evidence.timings:
        shape = f"batch {timing.batch}, length {timing.sequence}"
        shape += f", {timing.past} cached" if timing.past else ""
        for runner, samples in timing.samples_ms.items():
            if not samples:
                continue
            for name, value in (("median", np.median(samples)), ("p90", np.quantile(samples, 0.9))):
                found.append(
                    Measurement(
                        f"latency {name}", f"{runner}, {shape}", float(value), "ms", len(samples)
                    )
                )
    return found


def _accuracies(evidence: Evidence) -> list[Measurement]:
    """Return the share of labelled sentences that each recording classifies rightly."""
    labelled = [i for i, batch in enumerate(evidence.batches) if batch.labels]
    labels = [label for i in labelled for label in evidence.batches[i].labels]
    found = []
    for name, recording in evidence.recordings.items():
        if not labelled or len(recording.outputs) != len(evidence.batches):
            continue
        outputs = [next(iter(recording.outputs[i].values())) for i in labelled]
        if any(output.ndim != 2 or output.shape[1] < 2 for output in outputs):
            continue
        guesses = np.concatenate([output.argmax(-1) for output in outputs])
        share = float((guesses == np.asarray(labels)).mean())
        found.append(Measurement("accuracy", name, share, "share", len(labels)))
    return found


def _sizes(evidence: Evidence) -> list[Measurement]:
    return [
        Measurement(
            "size", artifact.format, sum(f.size_bytes for f in artifact.files) / 1e6, "MB", 1
        )
        for artifact in evidence.artifacts
    ]
