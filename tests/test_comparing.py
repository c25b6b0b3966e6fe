import dataclasses
import itertools

import pytest
from hand_made import FILES, certificate, verdict

from lora_export.comparing import compare
from lora_export.records import FileDigest, Measurement, Status

SOUND = certificate(verdict())


def _one(part):
    (change,) = part
    return change


def test_a_certificate_is_as_it_was():
    found = compare(SOUND, SOUND)
    assert found.ok
    assert not any(vars(found).values())


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(Status, 2)))
def test_a_verdict_that_got_worse_fails_and_one_that_got_better_does_not(old, new):
    order = ["pass", "inconclusive", "not run", "fail"]
    found = compare(certificate(verdict(old)), certificate(verdict(new)))
    change = _one(found.verdicts)
    assert (change.before.status, change.after.status) == (old, new)
    assert found.ok is (order.index(new) < order.index(old))


def test_a_verdict_that_is_gone_fails():
    found = compare(certificate(verdict(), verdict(check="exact")), SOUND)
    assert not found.ok
    assert (_one(found.verdicts).name, _one(found.verdicts).after) == ("exact: onnx", None)


def test_a_failed_verdict_that_is_gone_fails_too():
    assert not compare(certificate(verdict(Status.FAIL)), certificate()).ok


@pytest.mark.parametrize(("status", "ok"), [(s, s is Status.PASS) for s in Status])
def test_a_new_verdict_has_to_pass(status, ok):
    found = compare(SOUND, certificate(verdict(), verdict(status, check="exact")))
    assert found.ok is ok
    assert _one(found.verdicts).before is None


def test_a_verdict_that_passes_closer_to_its_limit_is_shown_and_no_worse():
    found = compare(SOUND, certificate(verdict(measured=6.0)))
    assert found.ok
    assert _one(found.verdicts).ratio == 4.0


@pytest.mark.parametrize("field", [{"limit": 9.0}, {"where": ("layer.0",)}, {"note": "another"}])
def test_any_field_of_a_verdict_counts_as_a_change(field):
    assert _one(compare(SOUND, certificate(verdict(**field))).verdicts).ratio == 1.0


@pytest.mark.parametrize(("old", "new"), [(None, 1.0), (1.0, None), (0.0, 1.0)])
def test_there_is_no_ratio_without_two_numbers(old, new):
    found = compare(certificate(verdict(measured=old)), certificate(verdict(measured=new)))
    assert _one(found.verdicts).ratio is None


def test_measurements_are_shown_with_their_ratio():
    sizes = [Measurement("size", "onnx", value, "MB", 1) for value in (2.0, 3.0)]
    more = Measurement("size", "pt2", 1.0, "MB", 1)
    before = certificate(verdict(), measurements=(sizes[0],))
    after = certificate(verdict(), measurements=(sizes[1], more))
    changed, new = compare(before, after).measurements
    assert (changed.before, changed.after, changed.ratio) == (*sizes, 1.5)
    assert (new.before, new.after, new.ratio) == (None, more, None)


def test_settings_and_environment_are_compared_by_path():
    before = certificate(settings={"seed": 0, "runtimes": {"onnx": {"threads": 1}}},
                         environment={"packages": {"torch": "2.9", "onnx": "1.18"}})  # fmt: skip
    after = certificate(settings={"seed": 1, "runtimes": {"onnx": {"threads": 2}}},
                        environment={"packages": {"torch": "2.9", "onnx": "1.19"}})  # fmt: skip
    found = compare(before, after)
    assert [(c.name, c.before, c.after) for c in found.settings] == [
        ("seed", 0, 1), ("runtimes/onnx/threads", 1, 2),
    ]  # fmt: skip
    assert [(c.name, c.before, c.after) for c in found.environment] == [
        ("packages/onnx", "1.18", "1.19")
    ]


def test_files_are_compared_by_digest():
    other = dataclasses.replace(FILES[1], digest="sha256:dd")
    new = FileDigest("model.pt", 1, "sha256:ee")
    found = compare(SOUND, certificate(verdict(), outputs=(other, new)))
    assert {c.name: (c.before, c.after) for c in found.outputs} == {
        FILES[0].name: (FILES[0], None), FILES[1].name: (FILES[1], other), "model.pt": (None, new),
    }  # fmt: skip
    assert _one(compare(SOUND, certificate(verdict(), inputs=())).inputs).after is None
