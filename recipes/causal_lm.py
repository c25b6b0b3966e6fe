"""Fine-tune a language model on plain text or on instructions, by LoRA or another method.

    python recipes/causal_lm.py --base facebook/opt-125m --data instructions.jsonl --out out/opt

The base is a hub id or a directory: OPT, GPT-2, Llama or their like. The data is a file of

  .txt    documents, one on each line (--whole: the file is one), ended by the end token, joined and
          cut into blocks of --length tokens; all of a block but its first token is learned
  .jsonl  instructions, one JSON object on each line: {"instruction", "input" (may be absent),
          "output"}, {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}, whose last
          message is the answer and which goes through the tokenizer's chat template, if it has one;
          only the answer and the end token after it are learned. Each "task", where the objects
          name theirs, is scored apart as well. Nothing is cut: an example that is longer than
          --length is left out, and how many are is printed

Without a hub, a small base can be made and pretrained here, for instance on the text of SST-2:

    python recipes/causal_lm.py --sst2 data/sst2 --out out/sst2-text
    python recipes/causal_lm.py --from-scratch gpt2 --data out/sst2-text/train.txt --out out/fresh
    python recipes/causal_lm.py --base out/fresh --method full --data out/sst2-text/train.txt \
        --dev out/sst2-text/dev.txt --out out/pretrained
    python recipes/causal_lm.py --base out/pretrained/model --data out/sst2-text/train.jsonl \
        --dev out/sst2-text/dev.jsonl --out out/lora

Needs the extra `recipes`. What --out gets and how --resume goes on: as recipes/sst2.py says.
"""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads give the core back

import jinja2
import tokenizers
import torch
import transformers
from accelerate.utils import gather_object
from torch import nn

from lora_export import (
    BaseRef,
    InputError,
    LoraConfig,
    bases,
    heads,
    inputs,
    methods,
    scoring,
    training,
)
from lora_export.injection import trainable_parameters
from lora_export.records import Measurement

FAMILIES = ("gpt2", "opt", "llama")  # that can be made here
END, PAD = "<|endoftext|>", "<|padding|>"  # of a tokenizer that is made here
ASPECTS = {  # of a film, and the words that a review of SST-2 speaks of them with
    "the story": {"story", "plot", "script", "tale", "screenplay", "narrative", "characters"},
    "the acting": {"acting", "actor", "actors", "cast", "performance", "performances", "role"},
    "the humor": {"funny", "comedy", "laughs", "humor", "jokes", "comic", "gags", "hilarious"},
    "the look": {"visual", "visually", "images", "camera", "beautiful", "beautifully", "look"},
    "the film": {"film", "movie", "films", "movies", "picture", "cinema", "drama", "thriller"},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", help="directory or hub id of a causal language model")
    add("--data", type=Path, help="a .txt or .jsonl file to train on")
    add("--dev", type=Path, help="a file of the same kind to evaluate on")
    add("--dev-share", type=float, default=0.1, help="without --dev: the share that is held out")
    add("--out", type=Path, default=Path("out/causal-lm"), help="directory")
    add("--method", default="lora", choices=methods.METHODS)
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--dropout", type=float, default=0.0, help="before A, in training")
    add("--targets", default="all-linear", help="comma-separated names, globs or re: expressions")
    add("--length", type=int, default=512, help="tokens; at most what the model has positions for")
    add("--limit", type=int, default=0, help="train on this many examples only (0: all)")
    add("--whole", action="store_true", help="a .txt file is one document, not one on each line")
    add("--answers", type=int, default=256, help="instructions of dev that are answered in writing")
    add("--max-new-tokens", type=int, default=64, help="of an answer")
    add("--generate", metavar="PROMPT", help="print what the trained model makes of it")
    training.add_arguments(parser, batch_size=16, monitor="perplexity")
    made = parser.add_argument_group("made into --out, instead of training")
    made.add_argument(
        "--sst2", type=Path, metavar="FOLDER", help="its train.tsv and dev.tsv as data"
    )
    made.add_argument("--from-scratch", choices=FAMILIES, help="an untrained base, for --data")
    made.add_argument("--vocabulary", type=int, default=2048, help="tokens of its tokenizer")
    made.add_argument("--width", type=int, default=128)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--positions", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.sst2:
        return write_sst2(args.sst2, args.out)
    if args.data is None:
        raise InputError("there is nothing to learn from: name a .txt or .jsonl file with --data")
    if args.from_scratch:
        return write_base(args)
    if args.base is None:
        raise InputError("name a base model with --base, or make one with --from-scratch")
    return train(args)


def train(args: argparse.Namespace) -> None:
    settings = training.settings_of(args)
    for name in ("length", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} is {getattr(args, name)}; expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    base = bases.find(args.base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.path)
    model = build(base.path, args)
    length = min(args.length, model.config.max_position_embeddings)
    items, dev = load(args, tokenizer, length)
    prompt: list[int] = []
    if args.generate is not None:  # refused now, not after hours
        prompt = prompt_like(args.data, args.generate, tokenizer)
        room(model, prompt, args.max_new_tokens)
    pad = padding_of(tokenizer)
    files = [file for file in (args.data, args.dev) if file]
    left_out = {"base", "data", "dev", "out", "resume", "method", "generate", *vars(settings)}
    description = training.about(
        "causal_lm", args.method, settings,
        base=base.id or base.path.name,
        base_sha256=base.sha256,
        data_sha256=hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        options={name: value for name, value in vars(args).items() if name not in left_out},
    )  # fmt: skip
    if training.is_main_process():
        print(f"base: {args.base} ({base.origin}); {len(items)} examples to train, {len(dev)} dev")
        print(trainable_parameters(model))

    def evaluate(wrapped: nn.Module) -> Sequence[Measurement]:
        nats, tokens = training.likelihood(wrapped, [(one.ids, one.labels) for one in dev], pad)
        asked = [one for one in dev if one.answer is not None][: args.answers]
        texts = written(model, tokenizer, [one.prompt for one in asked], args.max_new_tokens)
        return [scoring.perplexity(nats, tokens), *scored(asked, texts)]

    history = training.fit(
        model, [(one.ids, one.labels) for one in items], settings,
        pad=pad, evaluate=evaluate, folder=args.out, resume=args.resume,
        identity={name: description[name] for name in training.IDENTITY},
    )  # fmt: skip
    if training.is_main_process():
        about = {"base": BaseRef(id=base.id), "training": description}
        saved = methods.save(model, args.method, args.out, **about)
        if saved.is_dir():
            tokenizer.save_pretrained(saved)
        measured = training.resources(model, history, saved)
        training.write(args.out, description, history, measured)
        found = history.final[1]
        print(*(f"{one.subject} {one.name} {one.value:.4f}" for one in found), sep="\n")
        print(f"{history.seconds / 60:.1f} min: {saved}")
    if args.generate is not None:
        text = written(model, tokenizer, [prompt], args.max_new_tokens)[0]
        if training.is_main_process():
            print(f"{args.generate!r} -> {text!r}")


def build(base: Path, args: argparse.Namespace) -> Any:
    """Return the model in `base`, in float32, with what the method trains trainable."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=tuple(args.targets.split(",")),
        modules_to_save=heads(model) if args.method == "head" else (),
    )
    methods.adapt(model, args.method, config)
    return model


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Item:
    """A sequence to learn from; of an instruction also the text of the answer."""

    ids: list[int]
    labels: list[int]  # one for each id; -100 where nothing is learned
    answer: str | None = None
    task: str = ""

    @property
    def prompt(self) -> list[int]:
        """What the model is given before it answers."""
        return self.ids[: self.labels.count(training.IGNORED)]


@dataclass(frozen=True)
class Exchange:
    """An instruction as text, just as it is tokenized, and the answer that it is scored by."""

    prompt: str
    response: str
    answer: str
    has_specials: bool = False  # the text holds the special tokens already


def load(args: argparse.Namespace, tokenizer: Any, length: int) -> tuple[list[Item], list[Item]]:
    """Return what to train on and what to evaluate on."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token, so no answer would ever end")
    items = read(args.data, tokenizer, length, args.whole)
    if args.dev:
        dev = read(args.dev, tokenizer, length, args.whole)
    else:
        items = random.Random(args.seed).sample(items, len(items))
        held = min(len(items), max(0, round(len(items) * args.dev_share)))
        dev, items = items[:held], items[held:]
    if args.limit:
        items = random.Random(args.seed).sample(items, min(args.limit, len(items)))
    if not items or not dev:
        raise InputError(
            f"{len(items)} examples to train on and {len(dev)} to evaluate on; expected at least "
            "one of each: see --dev, --dev-share and --length"
        )
    return items, dev


def read(path: Path, tokenizer: Any, length: int, whole: bool = False) -> list[Item]:
    """Return the examples in a file, none longer than `length` tokens."""
    if path.suffix == ".txt":
        return packed(documents(path, whole), tokenizer, length)
    if path.suffix != ".jsonl":
        raise InputError(f"{path} is neither a .txt nor a .jsonl file")
    records = list(objects(path))
    if not records:
        raise InputError(f"{path} holds no instruction")
    found = [rendered(record, tokenizer) for record in records]
    if None in found:
        raise InputError(f"{path}: object {found.index(None) + 1} is no instruction; see --help")
    items = encoded([one for one in found if one], tokenizer)
    items = [
        replace(item, task=str(record.get("task", "")))
        for item, record in zip(items, records, strict=True)
    ]
    kept = [item for item in items if len(item.ids) <= length]
    if len(kept) < len(items) and training.is_main_process():
        left_out = len(items) - len(kept)
        print(f"{path.name}: {left_out} of {len(items)} examples exceed {length} tokens: left out")
    return kept


def documents(path: Path, whole: bool = False) -> list[str]:
    text = text_of(path)
    found = [one for one in ([text] if whole else text.split("\n")) if one.strip()]
    if not found:
        raise InputError(f"{path} holds no text")
    return found


def objects(path: Path) -> Iterator[Any]:
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is no JSON: {error}") from error


def text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}") from error


def packed(texts: list[str], tokenizer: Any, length: int) -> list[Item]:
    """Return blocks of `length` tokens of all texts, the last one shorter."""
    end = [tokenizer.eos_token_id]
    documents = tokenizer(texts)["input_ids"]
    stream = [t for ids in documents for t in ids + end[: ids[-1:] != end]]
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [Item(block, block) for block in blocks if len(block) > 1]  # one token asks nothing


def rendered(record: Any, tokenizer: Any) -> Exchange | None:
    """Return the text of an instruction, or None where `record` is none."""
    match record:
        case {"prompt": str(prompt), "response": str(answer)} if prompt:
            return Exchange(prompt, answer, answer)
        case {"instruction": str(instruction), "output": str(answer)}:
            more = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
            prompt = f"### Instruction:\n{instruction}\n\n{more}### Response:\n"
            return Exchange(prompt, answer, answer)
        case {"messages": [*before, {"role": "assistant", "content": str(answer)}]} if before:
            if not all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in before):
                return None
            if tokenizer.chat_template is None:
                lines = [f"{one['role']}: {one['content']}\n" for one in before]
                return Exchange("".join(lines) + "assistant: ", answer, answer)
            template = tokenizer.apply_chat_template
            try:
                prompt = template(before, tokenize=False, add_generation_prompt=True)
                all_of_it = template(record["messages"], tokenize=False)
            except jinja2.TemplateError as error:
                raise InputError(f"the chat template refuses these messages: {error}") from error
            if not all_of_it.startswith(prompt):
                raise InputError("the chat template changes a prompt once it is answered")
            return Exchange(prompt, all_of_it[len(prompt) :], answer, has_specials=True)
    return None


def prompt_like(path: Path, prompt: str, tokenizer: Any) -> list[int]:
    """Return the tokens of `prompt`, put as the instructions in `path` are."""
    first = next(objects(path)) if path.suffix == ".jsonl" else {}
    record: dict[str, Any] = {"prompt": prompt, "response": ""}
    if "instruction" in first:
        record = {"instruction": prompt, "output": ""}
    if "messages" in first:
        turns = (("user", prompt), ("assistant", ""))
        record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    exchange = rendered(record, tokenizer)
    if exchange is None:
        raise InputError("--generate needs a prompt")
    return encoded([exchange], tokenizer)[0].prompt


def encoded(exchanges: list[Exchange], tokenizer: Any) -> list[Item]:
    """Return the examples; of each the response and the end token after it are learned."""
    end, start = tokenizer.eos_token_id, start_of(tokenizer)
    prompts, responses = (
        tokenizer(texts, add_special_tokens=False)["input_ids"]
        for texts in ([one.prompt for one in exchanges], [one.response for one in exchanges])
    )
    items = []
    for one, prompt, response in zip(exchanges, prompts, responses, strict=True):
        given = prompt if one.has_specials else [*start, *prompt]
        learned = [*takewhile(lambda token: token != end, response), end]
        labels = [training.IGNORED] * len(given) + learned
        items.append(Item(given + learned, labels, one.answer))
    return items


def start_of(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text; it may put something after it as well."""
    bare, whole = (tokenizer("a", add_special_tokens=more)["input_ids"] for more in (False, True))
    return list(whole[: whole.index(bare[0])])


# ---------------------------------------------------------------- evaluation


def room(model: Any, prompt: Sequence[int], most: int) -> int:
    """Return how many tokens the model can write after `prompt`, `most` or fewer."""
    left: int = model.config.max_position_embeddings - len(prompt)
    if left < 1:
        raise InputError(f"a prompt of {len(prompt)} tokens leaves no position for an answer")
    return min(most, left)


def padding_of(tokenizer: Any) -> int:
    """Return the id to pad with: any would do, as neither the loss nor attention looks at it."""
    known = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if known is None else known)


@torch.inference_mode()
def written(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], most: int, batch_size: int = 32
) -> list[str]:
    """Return what the model writes after each prompt, at most `most` tokens, the likeliest ones.

    Prompts of a batch are padded on the left, so that all go on at the same place, and have room
    for equally many tokens, so that none is cut off for another's sake. Each process writes a share
    and gets all.
    """
    state, pad = training.processes(), padding_of(tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    alike = groupby(order, lambda index: room(model, prompts[index], most))
    cut = [
        (new_tokens, together[start : start + batch_size])
        for new_tokens, together in ((number, list(group)) for number, group in alike)
        for start in range(0, len(together), batch_size)
    ]
    was_training, own_config = model.training, model.generation_config
    model.eval()
    # What the base's own asks for, `generate` takes wherever a call leaves something open.
    model.generation_config = transformers.GenerationConfig()
    found: list[tuple[int, str]] = []
    for new_tokens, indices in cut[state.process_index :: state.num_processes]:
        longest = len(prompts[indices[-1]])
        gaps = [longest - len(prompts[index]) for index in indices]
        rows = [[pad] * gap + prompts[index] for gap, index in zip(gaps, indices, strict=True)]
        made = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(
                [[0] * gap + [1] * (longest - gap) for gap in gaps], device=model.device
            ),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        found += zip(indices, texts, strict=True)
    model.train(was_training)
    model.generation_config = own_config
    return [text for _, text in sorted(gather_object(found))]


def scored(asked: Sequence[Item], texts: Sequence[str]) -> list[Measurement]:
    """Return the scores of the answers, of all and of each task."""
    found: list[Measurement] = []
    pairs = [(one.answer or "", text, one.task) for one, text in zip(asked, texts, strict=True)]
    for task in [None, *sorted({one.task for one in asked} - {""})] if asked else []:
        chosen = [pair for pair in pairs if task in (None, pair[2])]
        references, answers, _ = zip(*chosen, strict=True)
        found += scoring.generation(references, answers, f"dev, {task}" if task else "dev")
    return found


# ---------------------------------------------------------------- made here


def write_base(args: argparse.Namespace) -> None:
    """Write a random model of the family, and a byte-level BPE tokenizer of the text in --data."""
    if args.width % (2 * args.heads):
        raise InputError(f"--width is {args.width}; expected a multiple of twice --heads")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(documents(args.data, args.whole), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=END, eos_token=END, pad_token=PAD,
        model_max_length=args.positions,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    made = transformers.AutoModelForCausalLM.from_config(config_of(args, tokenizer))
    made.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{made.num_parameters():,} parameters, {len(tokenizer)} tokens: {args.out}")


def config_of(args: argparse.Namespace, tokenizer: Any) -> Any:
    sizes = {
        "vocab_size": len(tokenizer),
        "initializer_range": args.width**-0.5,  # the usual 0.02 is made for widths of a thousand
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": args.positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    own = {
        "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        "opt": {
            "ffn_dim": 4 * args.width,
            "word_embed_proj_dim": args.width,
            "dropout": 0.0,
            "init_std": args.width**-0.5,
        },
        "llama": {"intermediate_size": 8 * args.width // 3},
    }
    return transformers.AutoConfig.for_model(args.from_scratch, **sizes, **own[args.from_scratch])


def write_sst2(folder: Path, out: Path) -> None:
    """Write SST-2 as plain text and as instructions of two tasks."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        labelled = zip(*inputs.read_labelled(folder / f"{split}.tsv"), strict=True)
        texts = [(text.strip(), label) for text, label in labelled]
        lines = [json.dumps(one) for text, label in texts for one in tasks(text, bool(label))]
        (out / f"{split}.txt").write_text("".join(f"{text}\n" for text, _ in texts), "utf-8")
        (out / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"train and dev as .txt and as .jsonl: {out}")


def tasks(text: str, is_good: bool) -> Iterator[dict[str, str]]:
    """Yield instructions over a review: judge it; describe it, if it names an aspect.

    Their words are common in the reviews, as LoRA leaves the embeddings as pretraining made them.
    """
    verdict = "good" if is_good else "bad"
    question = f"{text} is it good or bad ? it is"
    yield {"task": "verdict", "prompt": question, "response": f" {verdict}"}
    words = text.split()
    if found := [aspect for aspect, names in ASPECTS.items() if names & set(words)]:
        size = "short" if len(words) < 12 else "long"
        answer = f" a {size} and {verdict} one that speaks of {' and '.join(found)} ."
        question = f"{text} what is it like ? it is"
        yield {"task": "description", "prompt": question, "response": answer}


if __name__ == "__main__":
    training.run(main)
