"""What a TorchScript module says, evaluated in float64, every value on the way included."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_export.records import Array
from lora_export.runners._torch import answers, evaluating, in_double

_FLOAT, _DOUBLE = 6, 7  # torch's numbers for float32 and float64, as a graph has them


class TorchScriptInDouble:
    """A module whose numbers are float64 where the file has float32."""

    def __init__(self, module: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Take over the loaded `module`, which takes `inputs` in order and gives `outputs`."""
        self._module, self.inputs, self.outputs = module.double(), list(inputs), list(outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        with evaluating():
            return answers(self._whole, in_double(inputs), self.inputs, self.outputs)

    def values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every float that is computed on the way, by its name in the graph."""
        with evaluating():
            call, names = self._watched
            found = answers(call, in_double(inputs), self.inputs, names)
        return {name: array for name, array in found.items() if array.dtype == "float64"}

    @functools.cached_property
    def _whole(self) -> Callable[..., Any]:
        return self._function(*self._graph())

    @functools.cached_property
    def _watched(self) -> tuple[Callable[..., Any], list[str]]:
        graph, weights = self._graph()
        values = [
            value
            for node in graph.nodes()
            if node.kind() != "prim::Constant"
            for value in node.outputs()
            if value.type().kind() == "TensorType"
        ]
        while list(graph.outputs()):
            graph.eraseOutput(0)
        for value in values:
            graph.registerOutput(value)
        return self._function(graph, weights), [value.debugName() for value in values]

    def _graph(self) -> tuple[Any, list[Any]]:
        """Return the graph in float64, its modules inlined, and the weights that it takes last."""
        graph, weights = torch._C._jit_pass_lower_graph(self._module.inlined_graph, self._module._c)
        torch._C._jit_pass_lower_all_tuples(graph)
        for node in graph.nodes():
            _widen(graph, node)
        return graph, list(weights)

    def _function(self, graph: Any, weights: list[Any]) -> Callable[..., Any]:
        outputs = list(graph.outputs())
        if len(outputs) > 1:  # a function gives one value
            pack = graph.create("prim::TupleConstruct", outputs, 1)
            pack.output().setType(torch._C.TupleType([value.type() for value in outputs]))
            graph.appendNode(pack)
            for _ in outputs:
                graph.eraseOutput(0)
            graph.registerOutput(pack.output())
        function = torch._C._create_function_from_graph("forward", graph)
        return lambda *given: function(*given, *weights)


def _widen(graph: Any, node: Any) -> None:
    if node.kind() == "prim::Constant":
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            tensor = node.t("value")
            if tensor.dtype is torch.float32:
                node.t_("value", tensor.double())
        return
    if node.schema() == "(no schema)":
        return
    arguments = torch._C.parse_schema(node.schema()).arguments
    for place, (argument, given) in enumerate(zip(arguments, node.inputs(), strict=False)):
        if argument.name == "dtype" and given.toIValue() == _FLOAT:
            wide = graph.insertConstant(_DOUBLE)
            wide.node().moveBefore(node)
            node.replaceInput(place, wide)
