"""Small models as ONNX files, and what is looked at in them."""

import collections

import families
import onnx

from lora_export import calling, exporters, inputs, models
from lora_export.records import Form


def exported(family, path, calibration=(), **form):
    """Write a small model."""
    model = families.build(family)
    interface = calling.interface_of(model, families.tokens_of(model))
    example, bound = inputs.example(interface.signature), interface.bind(model)
    request = exporters.Request(
        bound, interface.signature, example, {}, path, Form(**form), calibration
    )
    with models.quiet():
        exporters.load("onnx").export(request)
    return interface.signature, path


def counts(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def arrays_of(path):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
