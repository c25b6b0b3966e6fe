"""LoRA on a transformer of torch.nn, from a fresh model to plain layers. Copy it and change it.

    python recipes/torch_transformer.py --data FOLDER --out out/torch_transformer

FOLDER holds train.tsv and dev.tsv with the columns sentence and label, as SST-2 does; without it,
sentences are made here. No Hugging Face model, no PEFT: the classifier below is written with
torch.nn, and the words that it knows are those of the train split.

A fresh model learns a first task whole: the labels. Then its weights are frozen, and LoRA learns a
second: does the text stand in its own order, or backwards? --encoder own builds attention and
feed-forward from nn.Linear and puts LoraLinear in its place; --encoder torch takes
nn.TransformerEncoder, whose feed-forward layers `inject` replaces. (nn.MultiheadAttention reads its
weights without calling a layer: to adapt attention, write it as `Attention` does.) At the end every
claim is measured, and the exit code is 1 if one fails.
"""

import argparse
import copy
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import lora_export
from lora_export import (
    InputError,
    LoraConfig,
    LoraLinear,
    inject,
    inputs,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
)
from lora_export.injection import lora_layers

Example = tuple[list[int], int]  # numbers of words, class
Linear = Callable[[int, int], nn.Module]
Claim = tuple[str, bool, str]  # what is claimed, whether it holds, what was measured
PADDING, UNKNOWN = 0, 1
LONGEST = 64  # words; longer texts are cut
HEADS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder with train.tsv and dev.tsv; none: sentences made here")
    add("--out", type=Path, default=Path("out/torch_transformer"))
    add("--encoder", choices=("own", "torch"), default="own")
    add("--steps", type=int, default=300, help="of the first task, and again of the second")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--lr", type=float, default=2e-3)
    add("--batch-size", type=int, default=64)
    add("--width", type=int, default=64)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.width < HEADS or args.width % HEADS:
        raise InputError(f"--width is {args.width}; expected a multiple of {HEADS} heads")
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; expected at least 1")
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    torch.manual_seed(args.seed)
    splits = read(args.data) if args.data else made(args.seed)
    words = vocabulary(splits[0])
    train, dev = ([(encode(text, words), label) for text, label in split] for split in splits)
    fresh = partial(Classifier, len(words) + 2, args.width, args.encoder)

    plain = fresh(nn.Linear)
    fit(plain, train, args)
    first = accuracy(plain, dev)
    train, dev = in_order(train, args.seed), in_order(dev, args.seed)
    adapted = adapt(plain, fresh, args)
    print(f"{trainable_parameters(adapted)}\n")
    before = accuracy(adapted, dev)
    fit(adapted, train, args)
    after = accuracy(adapted, dev)
    print(f"accuracy on {len(dev)} dev texts: {first:.3f} in the first task; ", end="")
    print(f"in the second {before:.3f} before LoRA, {after:.3f} after\n")

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "adapter.safetensors"
    save_adapter(adapted, path)
    merged = merge(adapted)
    save_file(merged.state_dict(), args.out / "merged.safetensors")  # without any LoRA
    if not report(claims(plain, adapted, merged, path, dev)):
        sys.exit(1)


def adapt(
    plain: nn.Module, fresh: Callable[[Linear], nn.Module], args: argparse.Namespace
) -> nn.Module:
    """Return a copy of `plain` in which LoRA and the head alone are trained."""
    if args.encoder == "torch":
        adapted = copy.deepcopy(plain)
        config = LoraConfig(
            args.rank, args.alpha, targets=("linear1", "linear2"), modules_to_save=("head",)
        )
        inject(adapted, config)
        return adapted
    adapted = fresh(partial(LoraLinear, rank=args.rank, alpha=args.alpha))
    # A LoraLinear keeps weight and bias under the names of nn.Linear: the state dict fits.
    adapted.load_state_dict(adapted.state_dict() | plain.state_dict())
    adapted.requires_grad_(False)
    for layer in lora_layers(adapted).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    adapted.get_submodule("head").requires_grad_(True)
    return adapted


# ---------------------------------------------------------------- the model


class Attention(nn.Module):
    """Self-attention of four linear layers, any of which may be a LoraLinear."""

    def __init__(self, width: int, heads: int, linear: Linear) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = linear(width, width), linear(width, width)
        self.value, self.out = linear(width, width), linear(width, width)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """From (batch, words, width) to the same; `padded` is True where there is no word."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = ~padded[:, None, None]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Attention, then feed-forward, each beside what goes in."""

    def __init__(self, width: int, heads: int, linear: Linear) -> None:
        super().__init__()
        self.attention = Attention(width, heads, linear)
        self.first, self.second = linear(width, 4 * width), linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        """From (batch, words, width) to the same."""
        x = self.norm1(x + self.attention(x, padded))
        result: Tensor = self.norm2(x + self.second(functional.gelu(self.first(x))))
        return result


class Encoder(nn.Module):
    """What nn.TransformerEncoder is, with layers of the kind `linear`."""

    def __init__(self, width: int, heads: int, layers: int, linear: Linear) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads, linear) for _ in range(layers)])

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        """From (batch, words, width) to the same; the mask is True where there is no word."""
        for block in self.blocks:
            x = block(x, src_key_padding_mask)
        return x


class Classifier(nn.Module):
    """From numbers of words to logits: states of the words that there are, averaged."""

    def __init__(self, words: int, width: int, encoder: str, linear: Linear) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width, padding_idx=PADDING)
        self.position = nn.Embedding(LONGEST, width)
        layer = nn.TransformerEncoderLayer(
            width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = (
            Encoder(width, HEADS, 2, linear)
            if encoder == "own"
            else nn.TransformerEncoder(layer, 2)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """From (batch, words) to (batch, 2)."""
        padded = ids == PADDING
        places = torch.arange(ids.shape[1], device=ids.device)
        states = self.encoder(
            self.word(ids) + self.position(places), src_key_padding_mask=padded
        ).masked_fill(padded[..., None], 0.0)
        result: Tensor = self.head(states.sum(1) / (~padded).sum(1, keepdim=True))
        return result


# ---------------------------------------------------------------- data


def read(folder: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return texts and labels of the train split, and of the dev split."""
    splits = []
    for name in ("train", "dev"):
        texts, labels = inputs.read_labelled(folder / f"{name}.tsv")
        if strange := {*labels} - {0, 1}:
            raise InputError(f"{folder / name}.tsv has labels {strange}; expected 0 and 1")
        splits.append(list(zip(texts, labels, strict=True)))
    return splits[0], splits[1]


def made(seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return made-up judgements of films, to learn from and to be asked."""
    subjects = ("film", "plot", "cast", "music", "script", "ending", "story", "hero", "camera")
    adverbs = ("really", "rather", "truly", "often", "never", "quite")
    opinions = (("dull", "weak", "poor", "flat"), ("bright", "strong", "rich", "sharp"))
    dice = random.Random(seed)

    def text(label: int) -> str:
        one, other = dice.sample(subjects, 2)
        said = dice.choice(opinions[label])
        return f"the {one} and the {other} are {dice.choice(adverbs)} {said} ."

    rows = [(text(label), label) for label in [0, 1] * 600]
    return rows[:1000], rows[1000:]


def vocabulary(rows: list[tuple[str, int]]) -> dict[str, int]:
    """Return the number of each word that stands in `rows` twice or more."""
    counts = Counter(word for text, _ in rows for word in text.split())
    known = sorted(word for word, count in counts.items() if count > 1)
    return {word: number for number, word in enumerate(known, UNKNOWN + 1)}


def encode(text: str, words: dict[str, int]) -> list[int]:
    return [words.get(word, UNKNOWN) for word in text.split()[:LONGEST]] or [UNKNOWN]


def in_order(examples: list[Example], seed: int) -> list[Example]:
    """Return the second task: each text as it stands (1) or backwards (0)."""
    dice = random.Random(seed)
    return [(ids[:: 2 * way - 1], way) for ids, _ in examples for way in [dice.randrange(2)]]


def batches(examples: list[Example], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield padded ids (batch, words) and classes (batch,)."""
    for start in range(0, len(examples), size):
        cut = examples[start : start + size]
        longest = max(len(ids) for ids, _ in cut)
        ids = torch.tensor([ids + [PADDING] * (longest - len(ids)) for ids, _ in cut])
        yield ids, torch.tensor([label for _, label in cut])


# ---------------------------------------------------------------- training and proof


def fit(model: nn.Module, examples: list[Example], args: argparse.Namespace) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    dice = random.Random(args.seed)
    model.train()
    for _ in range(args.steps):
        some = dice.sample(examples, min(args.batch_size, len(examples)))
        ids, labels = next(batches(some, len(some)))
        functional.cross_entropy(model(ids), labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def answers(model: nn.Module, examples: list[Example], *, training: bool = False) -> Tensor:
    """Return the logits, (examples, 2), as `model` gives them in eval mode or in training mode."""
    model.train(training)
    return torch.cat([model(ids) for ids, _ in batches(examples, 64)])


def accuracy(model: nn.Module, examples: list[Example]) -> float:
    labels = torch.tensor([label for _, label in examples])
    return (answers(model, examples).argmax(-1) == labels).double().mean().item()


def claims(
    plain: nn.Module, adapted: nn.Module, merged: nn.Module, path: Path, dev: list[Example]
) -> Iterator[Claim]:
    """Yield what this recipe promises, each measured."""
    layers = lora_layers(adapted)
    rank = next(iter(layers.values())).rank
    expected = sum(rank * (layer.in_features + layer.out_features) for layer in layers.values())
    count = trainable_parameters(adapted)
    yield "LoRA has r (in + out) parameters a layer", count.lora == expected, f"{count.lora:,}"

    own, whole = plain.state_dict(), adapted.state_dict()
    moved = [n for n in own if not n.startswith("head.") and not torch.equal(own[n], whole[n])]
    yield "the base did not move", not moved, f"{len(moved)} of {len(own)} tensors"

    zero = [path for path, layer in layers.items() if not layer.lora_B.any()]
    yield "every update was trained", not zero, f"{len(zero)} of {len(layers)} are zero"

    kinds = [type(module) for module in merged.modules()]
    same = kinds == [type(module) for module in plain.modules()]
    yield "the merged model is of plain layers", same, f"{len(kinds)} modules"

    numbers = [sum(p.numel() for p in model.parameters()) for model in (plain, merged)]
    yield "and has no parameter more", numbers[0] == numbers[1], f"{numbers[1]:,}"

    exact = answers(copy.deepcopy(adapted).double(), dev, training=True)
    floor = (answers(adapted, dev, training=True) - exact).abs().max().item()
    for name, model in (("LoRA", adapted), ("merged", merged)):
        for mode in ("eval", "training"):
            found = answers(model, dev, training=mode == "training")
            far = (found - exact).abs().max().item()
            alike = int((found.argmax(-1) == exact.argmax(-1)).sum())
            told = f"{far:.1e} of at most {8 * floor:.1e}; {alike} of {len(dev)} classes"
            # The noise of float32 alone: other kernels add in another order.
            yield f"{name} answers as in float64, {mode} mode", far <= 8 * floor, told

    again = copy.deepcopy(plain)
    load_adapter(again, path)
    one, other = answers(again, dev), answers(adapted, dev)
    told = f"{(one - other).abs().max().item():.1e}"
    yield "saved and loaded again: the same bits", torch.equal(one, other), told


def report(found: Iterator[Claim]) -> bool:
    """Print a line for each claim; return whether all of them hold."""
    held = []
    for name, holds, measured in found:
        held.append(holds)
        print(f"{'pass' if holds else 'FAIL'}  {name:45}{measured}")
    return bool(held) and all(held)


if __name__ == "__main__":
    try:
        main()
    except (lora_export.LoraExportError, OSError) as error:
        sys.exit(f"Error: {error}")
