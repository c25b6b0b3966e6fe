"""What an ONNX graph says, evaluated in float64 by onnx's own reference implementation.

No runtime is asked, so nothing of it is in the answer: no fusion, no order of summation, no
rounding but that of the constants that the file holds.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lora_export.errors import ExportFailed, first_line
from lora_export.records import Array, is_float

_FLOAT, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
_NEAR = 4 * float(np.finfo(np.float32).eps)  # a few constants, each rounded to float32
_DTYPES = ("to", "dtype")  # attributes that name one


class OnnxInDouble:
    """A graph whose numbers are float64 where the file has float32."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Take over `model`, which is changed; raises `ExportFailed` for an unknown operator."""
        for body in (model.graph, *model.functions):
            _widen(body)
        try:
            self._evaluator = ReferenceEvaluator(model, new_ops=[Erf, Gelu, GatherElements, Cast])
        except Exception as error:  # it has no class of errors of its own
            raise ExportFailed(f"the graph cannot be evaluated: {first_line(error)}") from error
        self.inputs: list[str] = list(self._evaluator.input_names)
        self.outputs: list[str] = list(self._evaluator.output_names)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs; those that the graph lacks are left out."""
        return dict(zip(self.outputs, self._evaluated(inputs, every=False), strict=True))

    def values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every float that is computed on the way, by its name in the graph."""
        found = self._evaluated(inputs, every=True)
        own = {*inputs, *(tensor.name for tensor in self._evaluator.proto_.graph.initializer)}
        return {
            name: value
            for name, value in found.items()
            if name not in own and isinstance(value, np.ndarray) and is_float(value)
        }

    def _evaluated(self, inputs: Mapping[str, Array], *, every: bool) -> Any:
        if lacking := sorted({*self.inputs} - inputs.keys()):
            raise ExportFailed(f"the graph asks for {', '.join(lacking)}")
        given = {
            name: inputs[name].astype(np.float64) if is_float(inputs[name]) else inputs[name]
            for name in self.inputs
        }
        try:
            with np.errstate(all="ignore"):
                return self._evaluator.run(None, given, intermediate=every)
        except Exception as error:
            raise ExportFailed(f"the graph cannot be evaluated: {first_line(error)}") from error


class Erf(OpRun):
    """The error function; onnx's own rounds it to float32, one element at a time."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (torch.special.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy(),)


class Gelu(OpRun):
    """The activation; onnx's own is made of its own error function."""

    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        given = torch.from_numpy(np.ascontiguousarray(x))
        return (torch.nn.functional.gelu(given, approximate=approximate).numpy(),)


class GatherElements(OpRun):
    """Elements by their place along one axis; onnx's own refuses fewer places on another axis."""

    op_domain = ""

    def _run(self, x: Array, places: Array, axis: int = 0) -> tuple[Array]:
        values = x[
            tuple(slice(None if i == axis % x.ndim else n) for i, n in enumerate(places.shape))
        ]
        return (np.take_along_axis(values, places.astype(np.int64), axis),)


class Cast(OpRun):
    """A conversion; to integers as in float32, which cannot tell a number this near from a whole.

    T5 finds its buckets by a logarithm that is to be whole at their edges.
    """

    op_domain = ""

    def _run(self, x: Array, to: int, **_: Any) -> tuple[Array]:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(to)
        if is_float(x) and dtype.kind == "i":
            whole = np.rint(x)
            x = np.where(np.abs(x - whole) <= _NEAR * np.abs(whole), whole, x)
        return (x.astype(dtype),)


def _widen(body: Any) -> None:
    """Make float64 of every float32 in a graph or function, and in the graphs inside."""
    for tensor in getattr(body, "initializer", ()):
        _widen_tensor(tensor)
    for node in body.node:
        for attribute in node.attribute:
            _widen_attribute(attribute)
        if node.op_type == "ConstantOfShape" and not node.attribute:  # zeros, in float32
            zero = onnx.numpy_helper.from_array(np.zeros(1))
            node.attribute.append(onnx.helper.make_attribute("value", zero))
    for value in _declared(body):
        if value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _DOUBLE


def _widen_attribute(attribute: Any) -> None:
    kinds = onnx.AttributeProto
    if attribute.type == kinds.TENSOR:
        _widen_tensor(attribute.t)
    elif attribute.type == kinds.GRAPH:
        _widen(attribute.g)
    elif attribute.type == kinds.INT and attribute.name in _DTYPES and attribute.i == _FLOAT:
        attribute.i = _DOUBLE
    elif attribute.name in ("value_float", "value_floats"):
        array = np.array(onnx.helper.get_attribute_value(attribute), np.float64)
        attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type == _FLOAT:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _declared(body: Any) -> Iterable[Any]:
    if isinstance(body, onnx.GraphProto):
        yield from (*body.input, *body.output)
    yield from body.value_info
