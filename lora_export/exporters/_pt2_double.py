"""What a torch.export program says, evaluated in float64, every value on the way included."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_export.records import Array
from lora_export.runners._torch import answers, evaluating, in_double


class Pt2InDouble:
    """A program whose numbers are float64 where the file has float32."""

    def __init__(
        self, program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        """Take over `program`, which takes `inputs` in order and gives `outputs`."""
        self._module: Any = program.module().double()
        self.inputs, self.outputs = list(inputs), list(outputs)
        for part in self._module.modules():
            if isinstance(part, fx.GraphModule):
                _widen(part)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs for named inputs."""
        return self._answers(inputs, {})

    def values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every float that is computed on the way, by its name in the graph."""
        found: dict[str, Array] = {}
        self._answers(inputs, found)
        return found

    def _answers(self, inputs: Mapping[str, Array], values: dict[str, Array]) -> dict[str, Array]:
        call = _Watched(self._module, values).run
        with evaluating():
            return answers(call, in_double(inputs), self.inputs, self.outputs)


class _Watched(fx.Interpreter):
    """Runs a program node by node, and keeps every float."""

    def __init__(self, module: fx.GraphModule, values: dict[str, Array]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of the node `n`."""
        found = super().run_node(n)
        if n.op == "call_function" and getattr(found, "dtype", None) is torch.float64:
            self.values[n.name] = found.numpy()
        return found

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a constant in float64; `nn.Module.double` leaves out what is no buffer."""
        found = super().get_attr(target, args, kwargs)
        wide = isinstance(found, torch.Tensor) and found.dtype is torch.float32
        return found.double() if wide else found


def _widen(module: fx.GraphModule) -> None:
    """Let float64 be asked for wherever `module` asks for float32."""

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # it asserts that a dtype is as it was
            continue
        node.args = fx.node.map_aggregate(node.args, wide)
        node.kwargs = fx.node.map_aggregate(node.kwargs, wide)
    module.recompile()
