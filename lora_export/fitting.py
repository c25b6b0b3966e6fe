"""Change a config until the model of transformers has the shape that an adapter was trained in."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from lora_export import models, resolving
from lora_export.architecture import Again, Architecture, Link, Target, names_of
from lora_export.companions import has_tokenizer
from lora_export.errors import AdapterMismatch, listed
from lora_export.plan import order_of_model
from lora_export.records import EMBEDDING, Adapter
from lora_export.storage import Checkpoint


def target(adapter: Adapter, base: Path, checkpoint: Checkpoint, tied: str, again: Again) -> Target:
    """Return the model that `adapter` goes into, as the transformers class of that name has it.

    Args:
        adapter: What is merged.
        base: Directory of the base.
        checkpoint: The same.
        tied: One of `plan.TIED`.
        again: Reads the adapter with another order of its parameters.
    """
    if adapter.task_type and adapter.task_type not in models.TASKS:
        note = (
            f"the config's task_type is {adapter.task_type!r}, which is none of "
            f"{', '.join(models.TASKS)}: the base's own architecture is taken"
        )
        adapter = dataclasses.replace(adapter, task_type=None, notes=(*adapter.notes, note))
    config = models.config_of(
        base, models.architecture_of(adapter, base), adapter.labels, models.class_count(adapter)
    )
    if getattr(config, "pad_token_id", 0) is None and has_tokenizer(base):
        config.pad_token_id = models.tokenizer(base).pad_token_id
    return _Fitting(adapter, checkpoint, config, tied, again).target()


def _rows_at_both_ends(adapter: Adapter, tied: Architecture) -> Adapter:
    """Return `adapter` with the rows of an input embedding at the output that was tied to it."""
    rows = dict(adapter.rows)
    for path, trained in adapter.rows.items():
        links = tied.names.get(f"{path}.weight", ())
        layer = tied.layers.get(links[0].tensor.removesuffix(".weight")) if links else None
        if layer is None or layer.kind != EMBEDDING:
            continue
        for other in tied.tied(links[0].tensor) - {links[0].tensor}:
            rows.setdefault(other.removesuffix(".weight"), trained)
    return dataclasses.replace(adapter, rows=rows)


class _Fitting:
    """Change a config until the model has the shape that the adapter was trained in."""

    def __init__(
        self,
        adapter: Adapter,
        checkpoint: Checkpoint,
        config: Any,
        tied: str,
        again: Again,
    ) -> None:
        self.adapter, self.checkpoint, self.tied = adapter, checkpoint, tied
        self.config, self.again = config, again
        self.settings: dict[str, Any] = {"architectures": list(config.architectures)}
        for name in ("id2label", "label2id", "pad_token_id"):
            if (value := getattr(config, name, None)) is not None:
                self.settings[name] = value
        self.replication: dict[int, int] = {}

    def target(self) -> Target:
        self._deepen()
        found = self._architecture()
        if order := order_of_model(self.adapter, found):
            self.adapter = self.again(order)
            found = self._architecture()
        if (size := self._vocabulary(found)) is not None:
            self._set("vocab_size", size)
            found = self._architecture()
        if self.tied == "untie" and self._touches_ties(found):
            found = self._untied(found)
        return Target(self.adapter, found, self.config, self.settings)

    def _architecture(self) -> Architecture:
        self.model = models.blank(self.config)
        return resolving.architecture(
            self.model,
            self.checkpoint,
            names_of(self.adapter),
            flat=self.adapter.flat_names,
            replication=self.replication or None,
        )

    def _set(self, name: str, value: Any) -> None:
        """Change a field of the config, and of its text part where that owns it."""
        text = self.config.get_text_config()
        setattr(text if hasattr(text, name) else self.config, name, value)
        self.settings[name] = value

    def _deepen(self) -> None:
        """Have the layers that `layer_replication` asks for."""
        spans = self.adapter.fields.get("layer_replication")
        if not spans:
            return
        text = self.config.get_text_config()
        depth = getattr(text, "num_hidden_layers", None)
        if not isinstance(depth, int) or any(stop > depth for _, stop in spans):
            raise AdapterMismatch(
                f"layer_replication {spans} does not fit a base of {depth} layers"
            )
        copies = [index for start, stop in spans for index in range(start, stop)]
        if len(copies) <= max(copies):
            raise AdapterMismatch(f"layer_replication {spans} leaves layers out")
        if len(copies) > models.MOST_LAYERS:
            raise AdapterMismatch(f"layer_replication asks for {len(copies)} layers")
        self.replication = dict(enumerate(copies))
        for name, value in list(vars(text).items()):
            per_layer = name.endswith(("layer_types", "block_type"))
            if per_layer and isinstance(value, list) and len(value) == depth:
                self._set(name, [value[index] for index in copies])
        self._set("num_hidden_layers", len(copies))

    def _vocabulary(self, found: Architecture) -> int | None:
        """Return the number of rows of an embedding that the adapter brings, where it differs."""
        sizes = set()
        for name in models.embeddings(self.model):
            shape = found.shapes.get(name)
            for own, links in found.names.items():
                value = self.adapter.replaced.get(own)
                if value is None or not links or links[0].tensor not in found.tied(name):
                    continue
                if shape and value.shape[1:] == shape[1:] and value.shape[0] != shape[0]:
                    sizes.add(value.shape[0])
        if len(sizes) > 1:
            raise AdapterMismatch(listed("embeddings of several sizes", map(str, sizes)))
        return int(sizes.pop()) if sizes else None

    def _touches_ties(self, found: Architecture) -> bool:
        return any(
            len(found.tied(link.tensor)) > 1 for links in found.names.values() for link in links
        )

    def _untied(self, tied: Architecture) -> Architecture:
        """Return the architecture with input and output embeddings apart."""
        self.config = copy.deepcopy(self.config)
        self.config.tie_word_embeddings = False
        self.config.get_text_config().tie_word_embeddings = False
        self.settings["tie_word_embeddings"] = False
        self.adapter = _rows_at_both_ends(self.adapter, tied)
        found = self._architecture()
        links, outputs = list(found.links), dict(found.output_names)
        stored = {link.tensor for link in links}
        for name in found.shapes.keys() - stored:
            for link in tied.stored_for(name):
                links.append(Link(link.stored, name, link.box, link.offset, link.swapped))
                outputs[link.stored, name] = name
                outputs.setdefault((link.stored, link.tensor), link.stored)
        return dataclasses.replace(found, links=tuple(links), output_names=outputs)
