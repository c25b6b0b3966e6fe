"""Small models as ONNX files, and what is looked at in them."""

import collections

import families
import onnx

from lora_export import calling, exporters, inputs, models, stages
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


def subject_of(family, folder):
    """The model of a family as it would be loaded from `folder`."""
    model = families.build(family)
    model.config.architectures = [type(model).__name__]
    interface = calling.interface_of(model, families.tokens_of(model))
    return stages.Subject(folder, model, None, interface)


def edited(path, change):
    """Make a change to the graph in the file."""
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def named(graph, part):
    """The one initializer that has `part` in its name."""
    (found,) = [tensor for tensor in graph.initializer if part in tensor.name]
    return found


def filled(tensor, array):
    """Put an array in the place of what an initializer holds."""
    tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype("float32"), tensor.name))


def nodes(graph, kind):
    return [node for node in graph.node if node.op_type == kind]
