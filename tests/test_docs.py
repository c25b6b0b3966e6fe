"""README, --help and behaviour agree: what a document says is run, or compared with what is."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from lora_export import checks, cli, exporters, formats, registry, storage
from lora_export.adapter import read_adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [README, (ROOT / "CONTRIBUTING.md").read_text("utf-8")]
DOCUMENTS.append((ROOT / "artifacts" / "README.md").read_text("utf-8"))
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Return every `lora-export …` line of the documents' code blocks."""
    blocks = [block for text in DOCUMENTS for block in re.findall(r"```\w*\n(.*?)```", text, re.S)]
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in found for part in line.split("&&")]
    wanted = re.compile(r"\s*(?:- run: |\$ )?(?:\.venv/bin/)?lora-export ")
    return sorted({wanted.sub("", part.split(" #")[0]) for part in parts if wanted.match(part)})


def find(name: str) -> click.Command:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None, name
    return command


@pytest.mark.parametrize("line", commands())
def test_every_command_in_a_document_can_be_parsed(line):
    words = shlex.split(line)
    if words[0].startswith("-"):
        return
    command = find(words[0])
    context = command.make_context(words[0], list(words[1:]), resilient_parsing=False)
    assert context.params


def test_a_wrong_option_in_a_document_would_be_found():
    with pytest.raises(click.NoSuchOption, match="--adaptor"):
        find("merge").make_context("merge", ["--adaptor", "x"])


@pytest.mark.parametrize("name", cli.cli.list_commands(click.Context(cli.cli)))
def test_every_command_has_help_with_an_example_and_is_in_the_readme(name):
    command = find(name)
    shown = command.get_help(click.Context(command, info_name=name))
    assert f"\n  lora-export {name}" in shown  # on a line of its own, not wrapped into the text
    assert "\\b" not in shown
    assert f"lora-export {name}" in README


@pytest.mark.parametrize("name", cli.cli.list_commands(click.Context(cli.cli)))
def test_every_option_has_help(name):
    silent = [p.name for p in find(name).params if isinstance(p, click.Option) and not p.help]
    assert silent == []


def test_every_check_exporter_and_format_is_in_the_readme():
    names = (*checks.names(), *exporters.names(), *formats.names())
    assert [name for name in names if f"`{name}`" not in README] == []


def test_the_exit_codes_of_help_and_readme_are_those_of_the_errors():
    from lora_export import errors

    for kind in (
        errors.InputError,
        errors.AdapterMismatch,
        errors.ExportFailed,
        errors.CheckFailed,
    ):
        assert re.search(rf"^\| {kind.exit_code} \|", README, re.M)
        assert re.search(rf"\b{kind.exit_code} \w", cli.cli.help or "")


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    fresh = [block for block in BLOCKS if "-m venv" in block]
    assert len(fresh) == 2
    assert "lora-export run --adapter artifacts/sst2.safetensors" in fresh[0]
    assert "pytest" in fresh[1]
    for block in fresh:
        assert block.index("torch==2.13.0") < block.index(".[")


def test_the_output_shown_has_the_verdicts_that_a_run_gives():
    shown = next(block for block in BLOCKS if "verdicts pass" in block)
    shipped = json.loads((ROOT / "artifacts" / "sst2-certificate.json").read_text())
    # The shipped one is over labelled sentences, which the run that is shown had not.
    labelled = "accuracy"
    expected = {(v["check"], v["subject"]) for v in shipped["verdicts"] if v["check"] != labelled}
    rows = re.findall(r"^ (\w+) +(\S[^\n]*?) {2,}(pass|fail|inconclusive|not run)\b", shown, re.M)
    assert {(check, subject) for check, subject, _ in rows} == expected
    assert {status for _, _, status in rows} == {"pass"}
    assert f"{len(expected)} of {len(expected)} verdicts pass" in shown


def test_the_card_states_what_the_adapter_carries():
    card = (ROOT / "artifacts" / "README.md").read_text("utf-8")
    file = ROOT / "artifacts" / "sst2.safetensors"
    about = read_adapter(file).training
    assert f"**{about['dev_accuracy']:.2%}**".replace("%", " %") in card
    assert f"{about['trainable_parameters']:,} of" in card
    assert f"{about['trainable_ratio']:.3%}".replace("%", " %") in card
    assert about["command"] in card
    digest = storage.sha256(file)
    assert f"`{digest[:8]}…{digest[-4:]}`" in card


def test_the_shipped_certificate_is_of_the_shipped_adapter():
    shipped = json.loads((ROOT / "artifacts" / "sst2-certificate.json").read_text())
    assert shipped["ok"] is True
    digests = {file["name"]: file["digest"] for file in shipped["inputs"]}
    adapter = ROOT / "artifacts" / "sst2.safetensors"
    assert digests["sst2.safetensors"] == storage.digest(adapter).digest


def test_the_figures_of_the_readme_are_those_of_the_shipped_certificate():
    shipped = json.loads((ROOT / "artifacts" / "sst2-certificate.json").read_text())
    found = {(m["name"], m["subject"]): m["value"] for m in shipped["measurements"]}
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \| ([\d.]+) ms \| ([\d.]+) ms \|", README, re.M)
    assert {row[0] for row in rows} == {"unmerged", "merged", "torchscript", "onnx"}
    for runner, accuracy, one, eight in rows:
        assert f"{100 * found['accuracy', runner]:.2f}" == accuracy
        for batch, stated in ((1, one), (8, eight)):
            value = found["latency median", f"{runner}, batch {batch}, length 32"]
            assert f"{value:.1f}" == stated


def test_the_figures_of_the_merge_are_those_of_the_shipped_benchmark():
    shipped = (ROOT / "artifacts" / "bench" / "bench_merge.md").read_text("utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shipped.splitlines()]
    known = {(row[1], row[2]): row for row in cells if len(row) == 14 and row[0] == "2.2"}
    shown = re.findall(r"^\| ([\w +-]+) \| (all|qv|-) \|((?: [\d.]+ \|){5})$", README, re.M)
    assert {row[:2] for row in shown} == known.keys()
    for tool, adapter, rest in shown:
        row = known[tool, adapter]
        numbers = [number.strip() for number in rest.split("|")[:-1]]
        assert numbers == [row[5], row[8], row[10], row[12], row[13]]
    parts = {(row[1], row[3]): row[5] for row in cells if len(row) == 7 and row[0] == "2.2"}
    assert f"take {parts['all', 'streaming']} times `cp -r`" in README
    assert f"and {parts['qv', 'streaming']} times with q and v" in README


def test_the_figures_of_exported_models_are_those_of_the_shipped_benchmark():
    shipped = (ROOT / "artifacts" / "bench-export" / "bench_export.md").read_text("utf-8")
    known: dict[str, list[str]] = {}
    for line in shipped.partition("Exports, each")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 9:
            known.setdefault(cells[0], []).append(cells[3])
    section = README.partition("### Measured: exported models")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|$", section, re.M)
    assert len(rows) > 10
    for name, *ratios in rows:
        assert known[name] == ratios, name
    llama = (ROOT / "artifacts" / "bench-export" / "llama-1b" / "bench_export.md").read_text(
        "utf-8"
    )
    phases: dict[str, list[str]] = {}
    for line in llama.partition("Exports, each")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 9:
            phases.setdefault(cells[0], []).append(cells[3])
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", section, re.M)
    assert len(rows) > 5
    for name, *ratios in rows:
        assert phases[name] == ratios, name
    cells = next(x for x in llama.splitlines() if x.startswith("| llama-1b | onnx fp32 |"))
    seconds, peak = (cells.split("|")[place].strip() for place in (4, 6))
    assert f"takes {seconds} s and {peak} MB above the model" in " ".join(section.split())
    for name in ("onnx fp32", "transformers onnx"):
        cells = next(x for x in shipped.splitlines() if x.startswith(f"| distilbert | {name} |"))
        seconds, peak = (cells.split("|")[place].strip() for place in (4, 6))
        assert f"{seconds} s and {peak} MB" in " ".join(section.split())


def test_the_figures_of_planted_faults_are_those_of_the_shipped_runs():
    lines = (ROOT / "artifacts" / "proof" / "fault_injection.jsonl").read_text("utf-8")
    rows = [row for row in map(json.loads, lines.splitlines()) if "kind" in row]
    section = README.partition("### Planted faults")[2].partition("\n#")[0]
    shown = re.findall(r"^\| (\w+) \|((?: [\d of-]+ \|){5})$", section, re.M)
    assert {name for name, _ in shown} == {row["kind"].split(":")[0] for row in rows} | {"all"}
    for name, cells in shown:
        group = [r for r in rows if name in ("all", r["kind"].split(":")[0])]
        found = [r for r in group if r["outcome"] in ("caught", "refused")]
        stopped = [r for r in group if r["outcome"] == "not proven"]
        usual = [r["usual"] for r in group if r["usual"]]
        expected = [str(len(group)), str(len(found) + len(stopped))]
        expected.append(f"{sum(r['located'] for r in found)} of {len(found)}")
        for kind in "ab":
            count = f"{sum(one[kind] for one in usual)} of {len(usual)}"
            expected.append(count if usual else "-")
        assert [cell.strip() for cell in cells.split("|")[:-1]] == expected, name
    alarms = (ROOT / "artifacts" / "proof" / "false_alarms.md").read_text("utf-8")
    counted = re.findall(r"\d+ of \d+ verdicts on \d+ correct runs", alarms.replace("\n", " "))
    assert counted
    assert counted[0] in " ".join(section.split())


def test_no_place_in_the_readme_was_left_to_be_filled():
    assert not re.findall(r"^[A-Z]{4,}$|TODO|FIXME", README, re.M)


def test_contributing_is_short():
    assert len(DOCUMENTS[1].splitlines()) <= 80


def test_the_changelog_has_the_version():
    from lora_export import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_calls_the_command_of_the_readme():
    assert "awk '/^## Test it/" in (ROOT / ".ci" / "run").read_text()
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_folders_are_registries():
    assert registry.names("lora_export.report") == ("html", "json", "junit", "markdown")
