"""Show that nothing is lost between training and deployment of a causal language model.

    python recipes/integrity.py --model facebook/opt-125m --out out/integrity
    python recipes/integrity.py --from-config --out out/integrity

The second form needs no download: it builds a small OPT with random weights and a byte-level BPE
tokenizer of its own. Either way: inject, count, freeze, train a little, save, load into a fresh
base, merge in memory, merge to a directory, export to ONNX. After each step the logits and the
greedy text are held against the model that was trained; the table at the end has a line for each
claim with what was measured, and the exit code is 1 if one fails. "The same bits" is meant
literally; where sums are taken in another order, "as in float64" allows eight times the distance
that float32 itself puts between the trained model and its float64 counterpart.
"""

import argparse
import copy
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import lora_export
from lora_export import (
    BaseRef,
    InputError,
    LoraConfig,
    bases,
    inject,
    inputs,
    load_adapter,
    merge,
    records,
    run,
    save_adapter,
    stages,
    trainable_parameters,
)
from lora_export.calling import interface_of
from lora_export.generating import generate
from lora_export.injection import idle, lora_layers

FORMAT = "onnx"
NOISE_FLOORS = records.Policy().multiple


@dataclass(frozen=True)
class Claim:
    """What is claimed, whether it holds, and what was measured."""

    name: str
    holds: bool
    measured: str


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="directory or hub id of a causal language model")
    source.add_argument("--from-config", action="store_true", help="build a small OPT instead")
    add("--out", type=Path, default=Path("out/integrity"))
    add("--text", type=Path, help="a file of sentences, one a line; none: those of the package")
    add("--targets", default="all-linear", help="comma-separated names, globs or re: expressions")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--steps", type=int, default=10, help="of training, so that the adapter does something")
    add("--new-tokens", type=int, default=20, help="of each greedy text")
    add("--layers", type=int, default=2, help="of --from-config")
    add("--no-export", action="store_true", help="end with the merge in memory")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.steps < 1:
        raise InputError(f"--steps is {args.steps}; an untrained adapter proves nothing")
    torch.manual_seed(args.seed)
    texts = inputs.read_texts(args.text)[0][:16]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.from_config:
        build(args.out / "base", texts, args.layers)
    base = bases.find(str(args.out / "base") if args.from_config else args.model)
    asked = Sentences.of(base.path, texts)
    asked.check_room(base.path, args.new_tokens)
    held = report(claims(base, asked, args))
    sys.exit(0 if held else 1)


def build(folder: Path, texts: Sequence[str], layers: int) -> None:
    """Write a small OPT with random weights, and a tokenizer that was trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    config = OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.2,  # so that the texts are not all one token
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(folder)


def load(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


# ---------------------------------------------------------------- what is claimed


def claims(base: bases.Base, asked: "Sentences", args: argparse.Namespace) -> Iterator[Claim]:
    """Go from a fresh base to an exported file; yield each claim as soon as it is measured."""
    model, untouched = load(base.path), load(base.path)
    config = LoraConfig(args.rank, args.alpha, targets=tuple(args.targets.split(",")))
    paths = inject(model, config)
    sizes = [sum(dict(untouched.named_modules())[path].weight.shape) for path in paths]
    yield from counted(model, args.rank * sum(sizes))
    train(model, asked, args.steps)
    yield from base_kept(model, untouched)

    truth = Truth.of(model, asked, args.new_tokens)
    with idle(model):
        moved = truth.distance(asked.logits(model))
    yield Claim("the adapter moves the logits", moved > truth.limit, truth.told(moved))

    path = args.out / "adapter.safetensors"
    save_adapter(model, path, base=BaseRef(id=base.id))
    fresh = load(base.path)
    load_adapter(fresh, path)
    far = float((asked.logits(fresh.eval()) - asked.logits(model)).abs().max())
    yield Claim("saved and loaded: logits of the same bits", far == 0, f"{far:.1e}")
    yield truth.same_text("saved and loaded", asked.texts(fresh, args.new_tokens))

    merged = merge(fresh).eval()
    left = len(lora_layers(merged))
    same = [type(m) for m in merged.modules()] == [type(m) for m in untouched.modules()]
    yield Claim("merged: the base's own modules", same, f"{left} LoRA layers left")
    yield truth.same_logits("merged", asked.logits(merged))
    yield truth.same_text("merged", asked.texts(merged, args.new_tokens))
    if args.no_export:
        return

    folder = args.out / "run"
    certificate = run(
        path, base=str(base.path), out=folder, formats=(FORMAT,), dtype="float32", overwrite=True
    )
    verdicts = certificate.verdicts
    bad = [f"{v.check} of {v.subject}: {v.status}" for v in verdicts if not v.passed]
    told = ", ".join(bad) or f"{len(verdicts)} of {len(verdicts)} verdicts pass"
    yield Claim("exported: the certificate", certificate.ok, told)
    shipped: Any = load(folder / "merged")
    yield truth.same_logits("merged directory", asked.logits(shipped))
    yield truth.same_text("merged directory", asked.texts(shipped, args.new_tokens))
    end = shipped.generation_config.eos_token_id
    ends = np.atleast_1d([] if end is None else end).tolist()
    signature = interface_of(shipped, asked.tokens).signature
    runner = stages.open_runner(FORMAT, folder / f"model.{FORMAT}", torch.get_num_threads())
    written = [
        generate(
            runner, signature, ids, np.ones_like(ids), max_new_tokens=args.new_tokens, end=ends
        )[0].tolist()
        for ids in (prompt.numpy() for prompt in asked.prompts)
    ]
    yield truth.same_text(FORMAT, written)


def counted(model: nn.Module, expected: int) -> Iterator[Claim]:
    count = trainable_parameters(model)
    told = f"{count.lora:,} of {count.total:,} ({count.ratio:.2%}), expected {expected:,}"
    yield Claim("LoRA has r (in + out) parameters a layer", count.lora == expected, told)
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.rpartition(".")[2] not in ("lora_A", "lora_B")
    ]
    yield Claim("all others are frozen", not others, f"{len(others)} trainable beside LoRA")


def base_kept(model: nn.Module, untouched: nn.Module) -> Iterator[Claim]:
    now, then = model.state_dict(), untouched.state_dict()
    moved = [name for name in then if not torch.equal(now[name], then[name])]
    told = f"{len(moved)} of {len(then)} tensors differ"
    yield Claim("training left the base's bits alone", not moved, told)
    zero = [path for path, layer in lora_layers(model).items() if not layer.lora_B.any()]
    yield Claim("every update was trained", not zero, f"{len(zero)} are zero")


@dataclass(frozen=True)
class Truth:
    """What the trained, unmerged model answers, and how far float32 alone leads from it."""

    logits: Tensor  # float64
    limit: float
    texts: list[list[int]]

    @classmethod
    def of(cls, model: nn.Module, asked: "Sentences", new_tokens: int) -> "Truth":
        """Ask `model`, in float32 and in float64."""
        exact = asked.logits(copy.deepcopy(model).double())
        floor = float((asked.logits(model) - exact).abs().max())
        return cls(exact, NOISE_FLOORS * floor, asked.texts(model, new_tokens))

    def distance(self, logits: Tensor) -> float:
        """Return the largest deviation of `logits` from the float64 ones."""
        return float((logits - self.logits).abs().max())

    def told(self, far: float) -> str:
        """Return a distance beside the largest that noise explains."""
        return f"{far:.1e}, noise is up to {self.limit:.1e}"

    def same_logits(self, name: str, logits: Tensor) -> Claim:
        """Claim that `logits` differ by noise alone."""
        far = self.distance(logits)
        return Claim(f"{name}: logits as in float64", far <= self.limit, self.told(far))

    def same_text(self, name: str, texts: list[list[int]]) -> Claim:
        """Claim that every token is the same."""
        same = sum(one == other for one, other in zip(self.texts, texts, strict=True))
        tokens = sum(map(len, self.texts))
        told = f"{same} of {len(texts)} texts, {tokens} tokens"
        return Claim(f"{name}: the same greedy text", 0 < len(texts) == same and tokens > 0, told)


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Sentences:
    """Sentences as numbers, each alone so that nothing is padded, and prompts cut from them."""

    tokens: Any
    ids: list[Tensor]  # int64, (1, tokens)

    @classmethod
    def of(cls, folder: Path, texts: Sequence[str]) -> "Sentences":
        """Read the tokenizer in `folder`."""
        tokens = AutoTokenizer.from_pretrained(folder)
        return cls(tokens, [tokens(text, return_tensors="pt")["input_ids"] for text in texts])

    @property
    def prompts(self) -> list[Tensor]:
        """Return the first halves of some sentences."""
        return [ids[:, : max(2, ids.shape[1] // 2)] for ids in self.ids[:8]]

    def check_room(self, folder: Path, new_tokens: int) -> None:
        """Refuse what the model in `folder` has no positions for."""
        if new_tokens < 1:
            raise InputError(f"--new-tokens is {new_tokens}; expected at least 1")
        positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
        written = new_tokens + max(ids.shape[1] for ids in self.prompts)
        longest = max(written, *(ids.shape[1] for ids in self.ids))
        if positions is not None and longest > positions:
            raise InputError(
                f"{longest} tokens are needed and the model has {positions} positions; shorten "
                "the texts in --text, or lower --new-tokens"
            )

    @torch.inference_mode()
    def logits(self, model: nn.Module) -> Tensor:
        """Return all logits, float64, (tokens of all sentences, vocabulary)."""
        return torch.cat([model(input_ids=ids).logits[0].double() for ids in self.ids])

    @torch.inference_mode()
    def texts(self, model: Any, new_tokens: int) -> list[list[int]]:
        """Return the new tokens that `model` finds likeliest after each prompt."""
        return [
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )[0, ids.shape[1] :].tolist()
            for ids in self.prompts
        ]


def train(model: nn.Module, asked: Sentences, steps: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for ids in itertools.islice(itertools.cycle(asked.ids), steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def report(found: Iterator[Claim]) -> bool:
    """Print a line for each claim; return whether there are any and all of them hold."""
    held = []
    for claim in found:
        held.append(claim.holds)
        print(f"{'pass' if claim.holds else 'FAIL'}  {claim.name:43}{claim.measured}", flush=True)
    return bool(held) and all(held)


if __name__ == "__main__":
    try:
        main()
    except (lora_export.LoraExportError, OSError) as error:
        sys.exit(f"Error: {error}")
