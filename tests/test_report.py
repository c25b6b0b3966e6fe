import dataclasses
import json
import re

import pytest
from hand_made import FILES, certificate, verdict
from hypothesis import given
from hypothesis import strategies as st

from lora_export import report
from lora_export.errors import InputError
from lora_export.records import Certificate, FileDigest, Measurement, Status
from lora_export.report import _wording, markdown

SOUND = certificate(verdict())
FAILED = certificate(verdict(), verdict(Status.FAIL, check="exact", note="two misrounded"))


def _strict(text):
    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _json(found):
    return _strict(report.render("json", found))


def _rows(text):
    """The cells of every table row, split where GitHub splits them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# ---------------------------------------------------------------- every report


def test_the_shipped_reports_are_found():
    assert set(report.names()) == {"html", "json", "junit", "markdown"}


def test_an_unknown_report_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="'pdf' is not one of the report: html, json, junit, mark"):
        report.render("pdf", SOUND)


@pytest.mark.parametrize("name", report.names())
@pytest.mark.parametrize("found", [SOUND, FAILED, certificate()], ids=["sound", "failed", "empty"])
def test_a_report_is_text_that_ends_its_last_line(name, found):
    assert report.render(name, found).endswith("\n")


@pytest.mark.parametrize("name", report.names())
def test_a_report_of_the_same_certificate_is_the_same(name):
    assert report.render(name, SOUND) == report.render(name, SOUND)


@pytest.mark.parametrize("name", report.names())
def test_a_report_names_every_verdict_and_every_file(name):
    text = report.render(name, FAILED)
    files = (*FAILED.inputs, *FAILED.outputs)
    wanted = [v.note for v in FAILED.verdicts] + [f.name for f in files] + [f.digest for f in files]
    assert [word for word in wanted if word not in text] == []


@pytest.mark.parametrize("name", report.names())
@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_a_report_can_show_a_verdict_over_numbers_that_are_not_finite(name, value):
    broken = verdict(Status.FAIL, measured=value, limit=value, note="values that are NaN")
    assert "values that are NaN" in report.render(name, certificate(broken))


# ---------------------------------------------------------------- json


def test_json_says_its_schema_and_whether_all_is_proven():
    assert (_json(SOUND)["schema"], _json(SOUND)["ok"]) == (3, True)


@pytest.mark.parametrize("found", [FAILED, certificate()], ids=["failed", "empty"])
def test_json_is_not_ok_where_the_certificate_is_not(found):
    assert _json(found)["ok"] is False


def test_json_carries_every_field_of_the_certificate():
    assert {f.name for f in dataclasses.fields(Certificate)} < _json(SOUND).keys()


def test_json_carries_a_verdict_in_full():
    assert _json(FAILED)["verdicts"][1] == {
        "check": "exact", "subject": "onnx", "status": "fail", "measured": 1.5, "limit": 8.0,
        "unit": "abs", "compared": 10, "note": "two misrounded", "where": [],
    }  # fmt: skip


def test_json_has_null_where_nothing_was_measured():
    found = _json(certificate(verdict(Status.NOT_RUN, measured=None, limit=None, compared=0)))
    assert found["verdicts"][0]["measured"] is None


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_json_is_strict_even_where_a_verdict_is_over_no_number(value):
    # A parity verdict over NaN measures an infinite distance.
    found = _json(certificate(verdict(Status.FAIL, measured=value)))
    assert found["verdicts"][0]["status"] == "fail"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_json_is_strict_even_where_a_measurement_is_no_number(value):
    found = _json(certificate(verdict(), measurements=(Measurement("size", "x", value, "MB", 1),)))
    assert found["measurements"][0]["name"] == "size"


def test_json_keeps_letters_of_any_script():
    assert "größer" in report.render("json", certificate(verdict(note="größer")))


# ---------------------------------------------------------------- markdown


def test_markdown_says_proven_where_every_verdict_passes():
    assert report.render("markdown", SOUND).startswith("# proven: 1 of 1 verdicts pass\n")


def test_markdown_says_not_proven_on_failure():
    text = report.render("markdown", FAILED)
    assert text.startswith("# NOT proven: 1 of 2 verdicts pass\n")


def test_markdown_says_not_proven_where_there_are_no_verdicts():
    assert report.render("markdown", certificate()).startswith("# NOT proven: 0 of 0 verdicts")


@pytest.mark.parametrize(
    ("status", "mark"),
    [
        (Status.PASS, "pass"),
        (Status.FAIL, "**FAIL**"),
        (Status.INCONCLUSIVE, "**inconclusive**"),
        (Status.NOT_RUN, "**not run**"),
    ],
)
def test_markdown_stresses_all_but_a_pass(status, mark):
    rows = [row for row in _rows(report.render("markdown", certificate(verdict(status))))
            if row[0] == "parity"]  # fmt: skip
    assert {row[2] for row in rows} == {mark}


def test_markdown_shows_a_verdict_in_one_row():
    (row,) = [row for row in _rows(report.render("markdown", SOUND)) if row[0] == "parity"]
    assert row == ["parity", "onnx", "pass", "1.5", "8 abs", "10", "as it should be"]


def test_markdown_escapes_pipes():
    text = report.render("markdown", certificate(verdict(note="So | so.", subject="a|b")))
    (row,) = [row for row in _rows(text) if row[0] == "parity"]
    assert (row[1], row[6], len(row)) == (r"a\|b", r"So \| so.", 7)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_a_line_break_in_a_note_does_not_end_its_row(line_break):
    # A tensor's name can hold one; what follows would be read as a heading of the report.
    note = f"left over: x{line_break}# proven: 9 of 9 verdicts pass"
    text = report.render("markdown", certificate(verdict(Status.FAIL, note=note)))
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 1


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    for table in report.render("markdown", FAILED).split("\n\n"):
        assert len({len(row) for row in _rows(table)}) <= 1


def test_markdown_lists_what_went_in_and_what_came_out():
    rows = _rows(report.render("markdown", SOUND))
    files = [(row[0], row[1]) for row in rows if row[0] in ("in", "out")]
    assert files == [("in", "sst2.safetensors"), *(("out", file.name) for file in FILES)]


def test_markdown_shows_sizes_with_thousands_apart():
    found = certificate(verdict(), outputs=(FileDigest("m.onnx", 1_234_567, "a"),))
    assert "1,234,567" in report.render("markdown", found)


def test_markdown_shows_settings_and_environment():
    rows = _rows(report.render("markdown", SOUND))
    assert ["seed", "0"] in rows
    assert ["python", "3.12.0"] in rows


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.0, "0"), (1.23456, "1.235"), (9.5367e-07, "9.537e-07"), (float("inf"), "inf")],
)
def test_a_number_has_at_most_four_digits(value, shown):
    assert _wording.number(value) == shown


# ---------------------------------------------------------------- markdown in a pull request


def _failing(**changes):
    return certificate(verdict(), verdict(Status.FAIL, check="exact", **changes))


def test_what_failed_comes_first_with_where_it_sits():
    found = _failing(measured=9.0, where=("layer.0.query.weight", "layer.1.key.weight"))
    text = report.render("markdown", found)
    first = _rows(text.partition("<details>")[0])
    assert [row[:7] for row in first[2:]] == [
        ["exact", "onnx", "**FAIL**", "9", "8 abs", "9", "layer.0.query.weight, layer.1.key.weight"]
    ]
    folded = _rows(text.partition("<details>")[2])
    assert {"parity", "exact"} <= {row[0] for row in folded}


def test_where_all_passes_everything_is_folded():
    assert _rows(report.render("markdown", SOUND).partition("<details>")[0]) == []


def test_a_failure_comes_before_what_was_not_run():
    found = certificate(verdict(Status.NOT_RUN, check="a"), verdict(Status.FAIL, check="b"))
    rows = _rows(report.render("markdown", found).partition("<details>")[0])
    assert [row[0] for row in rows[2:]] == ["b", "a"]


@pytest.mark.parametrize(
    ("measured", "limit", "shown"),
    [
        (9.0, 8.0, 9.0),
        (9.0011, 8.0, 9.01),  # up, or what is told would not pass
        (1.2341e-5, 1e-6, 1.24e-5),
        (3.0, 0.0, None),  # faults that are counted: none is allowed
        (0.5, 1.0, None),  # at least the limit was asked for
        (float("inf"), 8.0, None),
        (float("nan"), 8.0, None),
        (None, 8.0, None),
        (9.0, None, None),
    ],
)
def test_the_limit_that_would_have_passed(measured, limit, shown):
    assert _wording.would_pass(verdict(Status.FAIL, measured=measured, limit=limit)) == shown


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_the_limit_that_would_have_passed_does(measured, limit):
    found = _wording.would_pass(verdict(Status.FAIL, measured=measured, limit=limit))
    assert (found is None) == (measured <= limit)
    assert found is None or measured <= found <= measured * 1.011


def test_a_pass_needs_no_other_limit():
    assert _wording.would_pass(verdict(measured=9.0)) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a`b`", r"a\`b\`"),
        ("<img src=x>", r"\<img src=x\>"),
        ("</details>", r"\</details\>"),
        ("@someone", "@&#8203;someone"),
        ("fixes #12", "fixes #&#8203;12"),
        ("**bold** [x](y)", r"\*\*bold\*\* \[x\](y)"),
        ("_a_ token_type_ids __init__", r"\_a\_ token_type_ids \_\_init\_\_"),
        ("~~gone~~ $x$ &amp;", r"\~\~gone\~\~ \$x\$ \&amp;"),
        ("a\\|b", r"a\\\|b"),
    ],
)
def test_what_would_be_formatted_or_notify_somebody_is_shown_as_it_is(text, shown):
    rows = _rows(report.render("markdown", _failing(note=text, where=(text,))))
    assert next(row[6:8] for row in rows if row[0] == "exact") == [shown, shown]


def test_a_status_in_a_note_is_no_status():
    rows = _rows(report.render("markdown", _failing(note="**FAIL**")))
    assert next(row[7] for row in rows if row[0] == "exact") == r"\*\*FAIL\*\*"


@pytest.mark.parametrize("command", ["a `b` c", "``` \n# proven", "plain"])
def test_the_command_stays_one_line_of_code(command):
    line = report.render("markdown", certificate(command=command)).splitlines()[2]
    fence = re.match("`+", line)[0]
    assert line.endswith(fence)
    assert fence not in line.strip("`")


def test_a_long_certificate_is_cut_with_a_count():
    many = [verdict(Status.FAIL, check=f"c{i}", note="x" * 900) for i in range(400)]
    text = report.render("markdown", certificate(*many))
    assert len(text) <= markdown.MOST < 65_536
    first, _, rest = text.partition("<details>")
    shown = len(_rows(first)) - 2
    assert f"{400 - shown} more in certificate.json" in first
    assert "400 more in certificate.json" in rest
    assert "(500 more characters)" in first
    assert rest.count("</details>") == text.count("<details>")


def test_a_short_certificate_is_not_cut():
    assert "more in certificate.json" not in report.render("markdown", FAILED)
