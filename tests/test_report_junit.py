"""JUnit XML: it parses, has the shape that CI systems read, and its counts agree."""

import dataclasses
from xml.etree import ElementTree

import pytest
from hand_made import FILES, certificate, verdict

from lora_export import report
from lora_export.records import Status

# What the schema of Jenkins' JUnit reader allows where: attributes, and children in their order.
SHAPE = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, ["testsuite"]),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), ["property"]),
    "property": ({"name", "value"}, []),
    "testcase": ({"classname", "name", "time"}, ["skipped", "error", "failure", "system-out"]),
    "failure": ({"type", "message"}, []),
    "error": ({"type", "message"}, []),
    "system-out": (set(), []),
}
ALL = certificate(*(verdict(status, check=status.name.lower()) for status in Status))


def parsed(found):
    return ElementTree.fromstring(report.render("junit", found))


def misshapen(element):
    """What of `element` and below it the shape does not allow."""
    attributes, children = SHAPE[element.tag]
    order = [children.index(child.tag) for child in element if child.tag in children]
    faults = [f"{element.tag}: {name}" for name in element.attrib.keys() - attributes]
    faults += [f"{element.tag}/{child.tag}" for child in element if child.tag not in children]
    faults += [f"{element.tag}: order"] if order != sorted(order) else []
    return faults + [fault for child in element if child.tag in SHAPE for fault in misshapen(child)]


def counts(element):
    """Cases in all, with a failure, and with an error."""
    cases = element.findall(".//testcase")
    return [len(cases), *(sum(c.find(k) is not None for c in cases) for k in ("failure", "error"))]


@pytest.mark.parametrize("found", [ALL, certificate(verdict()), certificate()])
def test_it_has_the_usual_shape_and_its_counts_agree(found):
    root = parsed(found)
    assert misshapen(root) == []
    for element in (root, root.find("testsuite")):
        assert [int(element.get(k)) for k in ("tests", "failures", "errors")] == counts(root)


def test_another_shape_would_be_found():
    root = parsed(ALL)
    suite = root.find("testsuite")
    suite.append(ElementTree.Element("properties"))
    suite.find("testcase").set("status", "good")
    assert misshapen(root) == ["testsuite: order", "testcase: status"]


def test_there_is_one_case_for_each_verdict():
    cases = parsed(ALL).findall(".//testcase")
    assert [(c.get("classname"), c.get("name")) for c in cases] == [
        (v.check, v.subject) for v in ALL.verdicts
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(Status.FAIL, "failure"), (Status.INCONCLUSIVE, "error"), (Status.NOT_RUN, "error")],
)
def test_what_is_no_pass_fails_and_is_never_skipped(status, kind):
    root = parsed(certificate(verdict(status, note="two misrounded", where=("layer.0.query",))))
    (found,) = root.findall(f".//{kind}")
    assert found.get("type") == str(status)
    assert found.get("message") == f"{status}: two misrounded"
    assert "measured 1.5, limit 8 abs" in found.text
    assert "layer.0.query" in found.text
    assert root.find(".//skipped") is None


def test_only_a_pass_passes():
    passed = [case.get("classname") for case in parsed(ALL).findall(".//testcase")
              if case.find("failure") is None and case.find("error") is None]  # fmt: skip
    assert passed == ["pass"]


def test_no_verdicts_are_an_error():
    assert counts(parsed(certificate())) == [1, 0, 1]


def test_the_limit_that_would_have_passed_is_told():
    found = certificate(verdict(Status.FAIL, measured=9.0011))
    assert "a limit of 9.01 would have passed" in parsed(found).find(".//failure").text


def test_environment_settings_and_digests_are_properties():
    found = {p.get("name"): p.get("value") for p in parsed(ALL).findall(".//property")}
    assert (found["python"], found["seed"]) == ("3.12.0", "0")
    assert {f"out: {file.name}": file.digest for file in FILES}.items() <= found.items()


@pytest.mark.parametrize("letter", ["\x00", "\x1b", "\x0b", "\ufffe", "\ud800", "]]>", "<", "&"])
def test_what_xml_forbids_is_escaped(letter):
    text = f"before {letter} after"
    broken = verdict(Status.FAIL, check=text, subject=text, note=text, where=(text,))
    found = dataclasses.replace(certificate(broken, verdict(note=text)), settings={text: text})
    root = ElementTree.fromstring(report.render("junit", found).encode())
    assert misshapen(root) == []
    assert counts(root) == [2, 1, 0]
    shown = root.find(".//failure").text
    assert "before" in shown
    assert "after" in shown
