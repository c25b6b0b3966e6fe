"""Numbers without a limit, drawn from the evidence: latency, accuracy, sizes."""

import numpy as np

from lora_export.compare import hits
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
    found = []
    for name, recording in evidence.recordings.items():
        right = hits(recording, evidence)
        if right is not None:
            found.append(Measurement("accuracy", name, float(right.mean()), "share", len(right)))
    return found


def _sizes(evidence: Evidence) -> list[Measurement]:
    return [
        Measurement(
            "size", artifact.format, sum(f.size_bytes for f in artifact.files) / 1e6, "MB", 1
        )
        for artifact in evidence.artifacts
    ]
