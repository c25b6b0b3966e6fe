"""Run as a program: the memory of its own that exporting a model, and its reference, asks for.

Weights that are mapped from a file are not the process's own. The control is a copy of all weights,
as exporters that convert a whole model make.
"""

import copy
import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import families
import torch

from lora_export import calling, exporters, inputs, loading, models, stages
from lora_export.records import Form
from lora_export.runners.eager import EagerRunner


def own():
    """Return the anonymous memory of this process, in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def grown(work):
    """Return by how many bytes this process grew, at most, while it worked."""
    gc.collect()
    before, most, done = own(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most.append(max(most.pop(), own()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most[0] - before


def measured(model, path, precision):
    """Return what exporting `model` to `path` and its reference ask for, each with its control."""
    interface = calling.interface_of(model, families.tokens_of(model), cache=False)
    signature, form = interface.signature, Form(precision)
    example, (batch, *_) = inputs.example(signature), inputs.grid_batches(signature, 0)
    onnx = exporters.load("onnx")

    def export(one):
        onnx.export(exporters.Request(interface.bind(one), signature, example, {}, path, form))

    def answer(one):
        EagerRunner("a model", interface.bind(one), signature).run(batch.arrays)

    return {
        "export": grown(lambda: export(model)),
        "copied": grown(lambda: export(models.in_precision(model, precision))),
        "reference": grown(lambda: answer(stages.exact(model))),
        "doubled": grown(lambda: answer(copy.deepcopy(model).double())),
        "written": path.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main(folder, place, precision):
    torch.set_num_threads(1)
    path = Path(place) / "model.onnx"
    with models.quiet():
        measured(families.build("llama"), path, precision)  # so that imports do not count
        model = loading.load_merged(Path(folder)).requires_grad_(False)
        sys.stdout.write(json.dumps(measured(model, path, precision)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
