"""The recipe for language models: what is learned of an example, what is asked, what comes out."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lora_export import read_adapter, training
from lora_export.errors import InputError

ROOT = Path(__file__).parent.parent
TEXTS = ["a great film .", "the worst film of the year .", "a warm and funny story .", "dull ."]
TEMPLATE = (
    "{% for one in messages %}<|{{ one['role'] }}|>{{ one['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("causal_lm")


@pytest.fixture
def call(recipe, monkeypatch):
    """`call(*words)`: run the recipe with that command line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["causal_lm.py", *map(str, words)])
        recipe.main()

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with text.txt and pairs.jsonl, whose answers depend on their prompts."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(TEXTS * 8) + "\n")
    records = [
        {"task": task, "prompt": f"{text}\n{task}:", "response": f" {answer}"}
        for text in TEXTS
        for task, answer in (("first", text.split()[0]), ("all", text))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records * 4))
    return folder


@pytest.fixture(scope="module")
def fresh(recipe, data, tmp_path_factory):
    """`fresh(family)`: the directory of a small untrained base."""
    root = tmp_path_factory.mktemp("fresh")

    def make(family):
        folder = root / family
        if not folder.exists():
            words = ["--from-scratch", family, "--data", data / "text.txt", "--out", folder]
            words += ["--width", 16, "--layers", 2, "--heads", 2, "--vocabulary", 300]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["causal_lm.py", *map(str, words)])
                recipe.main()
        return folder

    return make


@pytest.fixture(scope="module")
def tokenizer(fresh):
    return transformers.AutoTokenizer.from_pretrained(fresh("gpt2"))


@pytest.fixture(scope="module")
def model(fresh):
    """A GPT-2 whose weights are large enough for its answers to depend on its prompts."""
    from conftest import scale_up

    return scale_up(transformers.AutoModelForCausalLM.from_pretrained(fresh("gpt2")), seed=1).eval()


def written_to(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


# ---------------------------------------------------------------- what is learned


def test_exactly_the_answer_and_the_end_are_learned(recipe, tokenizer, tmp_path):
    path = written_to(tmp_path / "a.jsonl", {"prompt": "a great", "response": " film ."})
    (item,) = recipe.read(path, tokenizer, length=64)
    learned = [label for label in item.labels if label != training.IGNORED]
    assert tokenizer.decode(item.prompt) == "a great"
    assert tokenizer.decode(learned) == " film .<|endoftext|>"
    assert item.ids == item.prompt + learned
    assert len(item.labels) == len(item.ids)


def test_loss_and_gradient_see_every_token_of_the_answer_and_no_label_of_the_prompt(
    recipe, model, tokenizer
):
    """Against -log p of the answer's tokens in float64, one by one."""
    exchange = recipe.Exchange("a great film\nfirst:", " a great", " a great")
    (item,) = recipe.encoded([exchange], tokenizer)

    def answered(labels):
        inputs, targets = training.collate([(item.ids, labels), ([5, 6, 7], [-100, 6, 7])], pad=1)
        model.zero_grad()
        loss = training.loss_sum(model(**inputs).logits, targets)
        loss.backward()
        return loss.item(), model.transformer.wte.weight.grad.clone()

    def exact(ids, start):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        likely = logits.log_softmax(-1)
        return -sum(float(likely[place - 1, ids[place]]) for place in range(start, len(ids)))

    loss, gradient = answered(item.labels)
    expected = exact(item.ids, len(item.prompt)) + exact([5, 6, 7], 1)
    assert loss == pytest.approx(expected, rel=1e-5)
    learned = len(item.ids) - len(item.prompt)
    assert training.label_count([(item.ids, item.labels)]) == learned
    for place in range(len(item.prompt), len(item.ids)):  # each one counts
        fewer = [*item.labels]
        fewer[place] = training.IGNORED
        assert answered(fewer)[0] < loss
    whole, its_gradient = answered(item.ids)  # the control: had the prompt been learned too
    assert whole > loss + 1
    assert not torch.allclose(its_gradient, gradient)


def test_what_a_prompt_says_is_read_though_not_learned(recipe, model, tokenizer):
    items = recipe.encoded(
        [recipe.Exchange(prompt, " great", " great") for prompt in ("a", "the")], tokenizer
    )
    first, second = (training.likelihood(model, [(i.ids, i.labels)], 1)[0] for i in items)
    assert first != second


def test_text_is_packed_into_blocks_and_nothing_is_lost(recipe, tokenizer):
    items = recipe.packed(TEXTS, tokenizer, length=7)
    stream = [token for item in items for token in item.ids]
    assert tokenizer.decode(stream) == "".join(f"{text}<|endoftext|>" for text in TEXTS)
    assert {len(item.ids) for item in items[:-1]} == {7}
    assert all(item.labels == item.ids for item in items)


def test_a_whole_file_is_one_document(recipe, tokenizer, data):
    lines, whole = (recipe.read(data / "text.txt", tokenizer, 64, w) for w in (False, True))
    end = tokenizer.eos_token_id
    assert [sum(i.ids.count(end) for i in items) for items in (lines, whole)] == [32, 1]


@pytest.mark.parametrize("kind", ["alpaca", "input", "messages"])
def test_the_forms_of_an_instruction(recipe, tokenizer, kind, tmp_path):
    records = {
        "alpaca": {"instruction": "Say it.", "output": "It"},
        "input": {"instruction": "Say it.", "input": "twice", "output": "It"},
        "messages": {"messages": [{"role": "user", "content": "Say it."},
                                  {"role": "assistant", "content": "It"}]},
    }  # fmt: skip
    prompts = {
        "alpaca": "### Instruction:\nSay it.\n\n### Response:\n",
        "input": "### Instruction:\nSay it.\n\n### Input:\ntwice\n\n### Response:\n",
        "messages": "user: Say it.\nassistant: ",
    }
    (item,) = recipe.read(written_to(tmp_path / "a.jsonl", records[kind]), tokenizer, 128)
    assert tokenizer.decode(item.prompt) == prompts[kind]
    assert item.answer == "It"


def test_messages_go_through_the_chat_template(recipe, fresh, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(fresh("llama"), chat_template=TEMPLATE)
    turns = [("system", "Be."), ("user", "Who?"), ("assistant", "I."), ("user", "And?")]
    messages = [{"role": role, "content": text} for role, text in (*turns, ("assistant", "You."))]
    path = written_to(tmp_path / "a.jsonl", {"messages": messages})
    (item,) = recipe.read(path, tokenizer, 128)
    assert item.answer == "You."
    assert tokenizer.decode(item.prompt).endswith("<|user|>And?<|endoftext|>\n<|assistant|>")
    learned = item.ids[len(item.prompt) :]
    assert tokenizer.decode(learned) == "You.<|endoftext|>"  # and no line end after it


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}" + TEMPLATE, "changes a prompt"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(recipe, fresh, template, message):
    tokenizer = transformers.AutoTokenizer.from_pretrained(fresh("gpt2"), chat_template=template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=message):
        recipe.rendered({"messages": messages}, tokenizer)


def test_what_the_tokenizer_puts_before_a_text_is_put_before_a_prompt(recipe, fresh):
    tokenizer = transformers.AutoTokenizer.from_pretrained(fresh("opt"))
    tokenizer.backend_tokenizer.post_processor = recipe.tokenizers.processors.TemplateProcessing(
        single="<|padding|> $A", special_tokens=[("<|padding|>", tokenizer.pad_token_id)]
    )
    (item,) = recipe.encoded([recipe.Exchange("a", " b", " b")], tokenizer)
    assert item.ids.count(tokenizer.pad_token_id) == 1
    assert item.ids[0] == tokenizer.pad_token_id


def test_what_the_tokenizer_puts_after_a_text_is_in_no_prompt_and_ends_no_text_twice(recipe, fresh):
    for family, before in (("llama", "<|padding|>"), ("opt", "<|endoftext|>"), ("gpt2", "")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(fresh(family))
        ids = {"<|padding|>": tokenizer.pad_token_id, "<|endoftext|>": tokenizer.eos_token_id}
        tokenizer.backend_tokenizer.post_processor = (
            recipe.tokenizers.processors.TemplateProcessing(
                single=f"{before} $A <|endoftext|>".split(), special_tokens=list(ids.items())
            )
        )
        (item,) = recipe.encoded([recipe.Exchange("a great", " film", " film")], tokenizer)
        assert tokenizer.decode(item.prompt) == f"{before}a great"
        assert tokenizer.decode(item.ids) == f"{before}a great film<|endoftext|>"
        (block,) = recipe.packed(["a", "b"], tokenizer, 20)
        assert tokenizer.decode(block.ids) == "".join(
            f"{before}{text}<|endoftext|>" for text in "ab"
        )


def test_an_example_that_is_too_long_is_left_out_whole_and_counted(
    recipe, tokenizer, tmp_path, capsys
):
    records = [{"prompt": "a " * n, "response": " film"} for n in (2, 50)]
    items = recipe.read(written_to(tmp_path / "a.jsonl", *records), tokenizer, length=20)
    assert [item.answer for item in items] == [" film"]
    assert tokenizer.decode(items[0].ids) == "a a  film<|endoftext|>"
    assert "1 of 2 examples exceed 20 tokens" in capsys.readouterr().out


# ---------------------------------------------------------------- what is written


def test_a_batch_padded_on_the_left_answers_as_each_prompt_alone(recipe, fresh, tokenizer):
    from conftest import scale_up

    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 1
    for family in recipe.FAMILIES:
        kind = transformers.AutoModelForCausalLM
        model = scale_up(kind.from_pretrained(fresh(family)), seed=1)
        together = recipe.written(model, tokenizer, prompts, most=8)
        alone = [recipe.written(model, tokenizer, [prompt], most=8)[0] for prompt in prompts]
        assert together == alone
        assert len(set(together)) > 1  # or padding on the wrong side would not show


def test_a_long_neighbour_cuts_no_answer_off(recipe, model, tokenizer):
    prompts = [tokenizer("dull .")["input_ids"], [5] * 126, [7] * 125, [9] * 125]
    together = recipe.written(model, tokenizer, prompts, most=8)
    assert together == [recipe.written(model, tokenizer, [one], most=8)[0] for one in prompts]
    assert len(tokenizer(together[0])["input_ids"]) > 2  # more than the longest has room for


def test_answers_follow_nothing_that_the_base_asks_for(recipe, model, tokenizer, monkeypatch):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = recipe.written(model, tokenizer, prompts, most=8)
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor(prompts[:1])).logits[0, -1].argmax())
    own = transformers.GenerationConfig(
        min_new_tokens=8, no_repeat_ngram_size=1, suppress_tokens=[first], repetition_penalty=2.0,
        num_beams=2, do_sample=True,
    )  # fmt: skip
    monkeypatch.setattr(model, "generation_config", own)
    assert recipe.written(model, tokenizer, prompts, most=8) == expected
    assert model.generation_config is own  # a model that is saved keeps it
    inputs = {"input_ids": torch.tensor(prompts[:1]), "pad_token_id": 1, "do_sample": False}
    made = model.generate(**inputs, num_beams=1, max_new_tokens=8)[0, len(prompts[0]) :]
    assert tokenizer.decode(made, skip_special_tokens=True) != expected[0]  # the control


def test_a_prompt_that_leaves_no_position_is_refused(recipe, model, tokenizer):
    with pytest.raises(InputError, match="128 tokens leaves no position"):
        recipe.written(model, tokenizer, [[5] * 128], most=8)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, "dull"),
        ({"prompt": "a", "response": "b"}, "dull"),
        ({"instruction": "a", "output": "b"}, "### Instruction:\ndull\n\n### Response:\n"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "user: dull\nassistant: ",
        ),
    ],
)
def test_a_prompt_is_put_as_the_data_puts_its_own(recipe, tokenizer, tmp_path, record, expected):
    path = tmp_path / ("a.jsonl" if record else "a.txt")
    written_to(path, record)
    assert tokenizer.decode(recipe.prompt_like(path, "dull", tokenizer)) == expected


def test_answers_are_the_likeliest_tokens_one_by_one(recipe, model, tokenizer):
    prompt = tokenizer(TEXTS[0])["input_ids"]
    ids = [*prompt]
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert recipe.written(model, tokenizer, [prompt], most=8) == [expected]


def test_each_task_is_scored_apart(recipe):
    items = [recipe.Item([0], [0], answer, task) for answer, task in (("a", "x"), ("b", "y"))]
    found = {(m.subject, m.name): m.value for m in recipe.scored(items, ["a", "c"])}
    exact = {subject: value for (subject, name), value in found.items() if name == "exact match"}
    assert exact == {"dev": 0.5, "dev, x": 1.0, "dev, y": 0.0}
    assert recipe.scored([], []) == []


# ---------------------------------------------------------------- whole runs


def results(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_base_made_here_is_adapted_and_merges(call, fresh, data, family, tmp_path, capsys):
    from lora_export import merged_files

    call("--base", fresh(family), "--data", data / "pairs.jsonl", "--out", tmp_path / "run",
         "--rank", 2, "--max-steps", 4, "--answers", 2, "--generate", "dull .\nfirst:",
         "--max-new-tokens", 4)  # fmt: skip
    adapter = read_adapter(tmp_path / "run" / "adapter.safetensors")
    assert adapter.task_type == "CAUSAL_LM"
    assert not adapter.replaced
    names = {(one["subject"], one["name"]) for one in results(tmp_path / "run")}
    assert {("dev", "perplexity"), ("dev", "ROUGE-L"), ("train", "loss")} <= names
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == "causal_lm"
    assert repr("dull .\nfirst:") in capsys.readouterr().out
    out = tmp_path / "merged"
    path = tmp_path / "run" / "adapter.safetensors"
    assert merged_files.merge_files(path, base=str(fresh(family)), out=out).ok


def test_full_training_resumes_over_its_own_base_alone(
    recipe, call, fresh, data, tmp_path, monkeypatch
):
    base, other = tmp_path / "a" / "model", tmp_path / "b" / "model"
    shutil.copytree(fresh("gpt2"), base)
    shutil.copytree(base, other)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    model.save_pretrained(other)
    text = data / "text.txt"
    words = ["--data", text, "--method", "full", "--max-steps", 1, "--length", 16]
    words += ["--out", tmp_path / "out"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe.training, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            call("--base", base, *words)
    with pytest.raises(InputError, match="not empty; --resume goes on"):
        call("--base", base, *words)
    with pytest.raises(InputError, match="written with other settings: base_sha256 was"):
        call("--base", other, *words, "--resume")
    call("--base", base, *words, "--resume")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["base_sha256"]
    with pytest.raises(InputError, match="nothing to resume: the run in"):
        call("--base", base, *words, "--resume")


@pytest.mark.slow
def test_it_pretrains_and_then_learns_to_answer_and_to_stop(call, fresh, data, tmp_path):
    """LoRA on what full training made of plain text; greedy answers end by themselves."""
    call("--base", fresh("gpt2"), "--data", data / "text.txt", "--dev", data / "text.txt",
         "--method", "full", "--lr", 1e-2, "--epochs", 80, "--out", tmp_path / "text",
         "--length", 32)  # fmt: skip
    found = [one["value"] for one in results(tmp_path / "text") if one["name"] == "perplexity"]
    assert found[-1] < 4  # a guess among all tokens has 300
    pairs = data / "pairs.jsonl"
    call("--base", tmp_path / "text" / "model", "--data", pairs, "--dev", pairs, "--lr", 2e-2,
         "--epochs", 60, "--out", tmp_path / "pairs")  # fmt: skip
    last = {(one["subject"], one["name"]): one["value"] for one in results(tmp_path / "pairs")}
    assert last["dev", "exact match"] > 0.9
    assert last["dev, all", "BLEU"] > 90
    assert last["dev", "perplexity"] < 2


@pytest.mark.slow
def test_two_processes_answer_and_score_as_one(fresh, data, tmp_path):
    words = [ROOT / "recipes" / "causal_lm.py", "--base", fresh("gpt2"), "--method", "full",
             "--data", data / "pairs.jsonl", "--lr", 1e-2, "--epochs", 40, "--out"]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    measured = []
    for count, before in enumerate(([], launch), start=1):
        command = [sys.executable, *before, *words, tmp_path / str(count)]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        found = results(tmp_path / str(count))
        measured.append(
            {(m["subject"], m["name"]): m["value"] for m in found if "dev" in m["subject"]}
        )
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)
    assert measured[0]["dev", "exact match"] > 0.5


def test_sst2_becomes_text_and_instructions(recipe, call, tokenizer, tmp_path):
    for split in ("train", "dev"):
        rows = 'a funny film with a fine cast \t1\nit \'s "dull" \t0\n'
        (tmp_path / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    call("--sst2", tmp_path, "--out", tmp_path / "made")
    assert (tmp_path / "made" / "dev.txt").read_text().splitlines()[1] == 'it \'s "dull"'
    records = list(recipe.objects(tmp_path / "made" / "train.jsonl"))
    assert [(one["task"], one["response"]) for one in records] == [
        ("verdict", " good"),
        ("description", " a short and good one that speaks of the acting and the humor and the"
         " film ."),
        ("verdict", " bad"),
    ]  # fmt: skip
    assert len(recipe.read(tmp_path / "made" / "train.jsonl", tokenizer, 128)) == 3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}', "object 1 is no instruction"),
        ('{"prompt": "", "response": "b"}', "object 1 is no instruction"),
        ('{"prompt": 1, "response": "b"}', "object 1 is no instruction"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "object 1 is no instruction"),
        ('{"messages": [{"text": "a"}, {"role": "assistant", "content": "b"}]}', "no instruction"),
        ('{"prompt": "a", "response": "b"}\n[]', "object 2 is no instruction"),
        ('{"prompt": "a", "response": "b"}\n{', "line 2 is no JSON"),
        ('{"messages": ["a", {"role": "assistant", "content": "b"}]}', "no instruction"),
        ("", "holds no instruction"),
    ],
)
def test_a_file_of_something_else_is_refused(recipe, tokenizer, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        recipe.read(tmp_path / "a.jsonl", tokenizer, 64)


def test_other_files_and_empty_texts_are_refused(recipe, tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"neither a \.txt nor a \.jsonl"):
        recipe.read(tmp_path / "a.csv", tokenizer, 64)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="no UTF-8"):
        recipe.read(tmp_path / "latin.txt", tokenizer, 64)
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no text"):
        recipe.read(tmp_path / "a.txt", tokenizer, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "BASE"], "--data"),
        (["--data", "TEXT"], "--base"),
        (["--from-scratch", "gpt2", "--data", "TEXT", "--width", 20], "--width is 20"),
        (["--base", "BASE", "--data", "TEXT", "--dev-share", 0], "0 to evaluate on"),
        (["--base", "BASE", "--data", "TEXT", "--method", "head"], "nothing to train"),
        (["--base", "BASE", "--data", "TEXT", "--length", 0], "length is 0"),
        (["--base", "BASE", "--data", "TEXT", "--max-new-tokens", 0], "max_new_tokens is 0"),
        (["--base", "BASE", "--data", "PAIRS", "--generate", ""], "--generate needs a prompt"),
        (["--base", "BASE", "--data", "PAIRS", "--generate", "a " * 200], "leaves no position"),
    ],
)
def test_a_command_that_cannot_work_says_why(call, fresh, data, tmp_path, words, message):
    places = {"BASE": fresh("gpt2"), "TEXT": data / "text.txt", "PAIRS": data / "pairs.jsonl"}
    with pytest.raises(InputError, match=message):
        call(*[places.get(word, word) for word in words], "--out", tmp_path / "out")
    assert not [*tmp_path.rglob("*.json*")]  # nothing was trained first


def test_a_tokenizer_without_an_end_token_is_refused(call, fresh, data, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(fresh("gpt2"), eos_token=None)
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(fresh("gpt2")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match="no end token"):
        call("--base", base, "--data", data / "pairs.jsonl", "--out", tmp_path / "out")
