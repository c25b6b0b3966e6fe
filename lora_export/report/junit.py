"""A certificate as JUnit XML: one test case for each verdict.

What is no pass is a failure or an error, never skipped: most CI systems show that in green.
"""

import re
from xml.etree import ElementTree

from lora_export.records import Certificate, Evidence, Status, Verdict
from lora_export.report import _wording

NAME = "lora-export"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(certificate: Certificate, evidence: Evidence | None = None) -> str:
    """Return the certificate as a JUnit file; files and environment are its properties."""
    verdicts = _wording.verdicts(certificate)
    statuses = [verdict.status for verdict in verdicts]
    failures = statuses.count(Status.FAIL)
    counts = {
        "name": NAME,
        "tests": str(len(verdicts)),
        "failures": str(failures),
        "errors": str(len(verdicts) - statuses.count(Status.PASS) - failures),
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {**counts, "skipped": "0"})
    properties = ElementTree.SubElement(suite, "properties")
    told = [("command", certificate.command), *_wording.facts(certificate)]
    told += [(f"{side}: {f.name}", f.digest) for side, f in _wording.files(certificate)]
    for name, value in told:
        attributes = {"name": _allowed(name), "value": _allowed(value)}
        ElementTree.SubElement(properties, "property", attributes)
    for verdict in verdicts:
        _add(suite, verdict)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, "unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _add(suite: ElementTree.Element, verdict: Verdict) -> None:
    """Add the test case of `verdict`."""
    names = {"classname": _allowed(verdict.check), "name": _allowed(verdict.subject)}
    case = ElementTree.SubElement(suite, "testcase", names)
    if verdict.passed:
        ElementTree.SubElement(case, "system-out").text = _allowed(verdict.note)
        return
    kind = "failure" if verdict.status is Status.FAIL else "error"
    reasons = _wording.reasons(verdict)
    message = f"{verdict.status}: {reasons[0]}"
    attributes = {"type": str(verdict.status), "message": _allowed(message)}
    ElementTree.SubElement(case, kind, attributes).text = _allowed("\n".join(reasons))


def _allowed(text: str) -> str:
    """Return `text` with the characters that no XML may hold written as Python writes them."""
    return _FORBIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
