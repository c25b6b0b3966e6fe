"""Schema and records agree; what is damaged is refused by the place of the damage."""

import copy
import dataclasses
import enum
import json
import math
import types
from typing import get_args, get_origin, get_type_hints

import jsonschema
import pytest
from hand_made import certificate, evidence, verdict

from lora_export import certificates, checks, judging, report
from lora_export.errors import InputError
from lora_export.records import Certificate, FileDigest, Measurement, Status, Verdict
from lora_export.report.json import SCHEMA

RECORDS = [Verdict, Measurement, FileDigest]


def made():
    """A certificate over evidence in which one artifact fails, its evidence digested."""
    found = judging.certify(
        evidence(), checks.RUN, "lora-export run", evidence().files, {"seed": 0}, 1
    )
    bad = verdict(Status.FAIL, measured=math.inf, where=("layer.0.query.weight",))
    return dataclasses.replace(
        found, verdicts=(bad, *found.verdicts), evidence=(FileDigest("e.json", 3, "sha256:ab"),)
    )


@pytest.fixture
def write(tmp_path):
    def write(value):
        file = tmp_path / certificates.NAME
        file.write_text(json.dumps(value))
        return file

    return write


def as_json(found):
    return json.loads(report.render("json", found))


# ---------------------------------------------------------------- schema and records


def test_the_schema_is_a_schema_and_says_which():
    found = certificates.schema()
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["$id"].endswith(f":{SCHEMA}")
    assert found["properties"]["schema"]["const"] == SCHEMA


def test_the_certificate_has_the_fields_of_its_record():
    found = certificates.schema()
    names = {field.name for field in dataclasses.fields(Certificate)} | {"schema", "ok"}
    assert set(found["properties"]) == set(found["required"]) == names
    assert found["additionalProperties"] is False


@pytest.mark.parametrize("record", RECORDS)
def test_each_definition_has_the_fields_of_its_record(record):
    found = certificates.schema()["$defs"][record.__name__]
    names = {field.name for field in dataclasses.fields(record)}
    assert set(found["properties"]) == set(found["required"]) == names
    assert found["additionalProperties"] is False


def test_there_is_no_definition_of_anything_else():
    assert set(certificates.schema()["$defs"]) == {record.__name__ for record in RECORDS}


def _expected(hint):
    """What the schema has to say of a type hint."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if isinstance(hint, types.UnionType) or hint is float:  # JSON has no NaN
        return {"type": ["number", "null"]}
    if get_origin(hint) is tuple:
        (item, _) = get_args(hint)
        inner = {"$ref": f"#/$defs/{item.__name__}"} if item in RECORDS else _expected(item)
        return {"type": "array", "items": inner}
    return {"type": {str: "string", int: "integer"}.get(hint, "object")}


@pytest.mark.parametrize("record", [Certificate, *RECORDS])
def test_types_agree(record):
    whole = certificates.schema()
    found = whole if record is Certificate else whole["$defs"][record.__name__]
    for name, hint in get_type_hints(record).items():
        entry = found["properties"][name]
        assert {key: entry.get(key) for key in _expected(hint)} == _expected(hint), name


def test_every_field_is_described():
    whole = certificates.schema()
    parts = [whole, *whole["$defs"].values()]
    silent = [n for p in parts for n, e in p["properties"].items() if not e.get("description")]
    assert silent == []


# ---------------------------------------------------------------- reading


def test_what_was_written_is_read(write):
    file = write(as_json(made()))
    read, written = certificates.read(file), made()
    assert read == dataclasses.replace(
        written,
        verdicts=(dataclasses.replace(written.verdicts[0], measured=None), *written.verdicts[1:]),
        environment=json.loads(json.dumps(written.environment)),
    )
    assert certificates.read(file.parent) == read


def test_a_measurement_that_is_no_number_is_read_as_one(write):
    found = certificate(verdict(), measurements=(Measurement("size", "x", math.inf, "MB", 1),),
                        inputs=())  # fmt: skip
    (measured,) = certificates.read(write(as_json(found))).measurements
    assert math.isnan(measured.value)


def _set(value, path, new):
    *front, last = path
    for step in front:
        value = value[step]
    value[last] = new


DAMAGES = [
    (("verdicts", 3, "status"), "good"),
    (("verdicts", 3, "status"), None),
    (("verdicts", 1, "compared"), 0),  # a pass over nothing
    (("verdicts", 0, "compared"), -1),
    (("verdicts", 0, "compared"), "2"),
    (("verdicts", 0, "measured"), "1.5"),
    (("verdicts", 0, "where"), "layer.0"),
    (("verdicts", 0, "where", 0), 1),
    (("verdicts", 0, "colour"), "red"),
    (("verdicts",), {}),
    (("measurements", 0, "samples"), 1.5),
    (("measurements", 0, "value"), True),
    (("inputs", 0, "digest"), "abc"),
    (("inputs", 0, "size_bytes"), -1),
    (("outputs", 1, "name"), ""),
    (("evidence", 0), 3),
    (("environment",), ["python"]),
    (("settings",), None),
    (("command",), 3),
    (("ok",), 1),
    (("ok",), True),  # its verdicts say otherwise
    (("more",), 1),
]


@pytest.mark.parametrize(("path", "new"), DAMAGES, ids=str)
def test_a_damaged_certificate_is_refused_by_the_place(write, path, new):
    value = as_json(made())
    _set(value, path, new)
    place = path if path[-1] not in ("colour", "more") else path[:-1]
    shown = "/".join(map(str, ("", *place))) or "/"
    with pytest.raises(InputError, match=rf"certificate\.json is damaged at {shown}: "):
        certificates.read(write(value))


@pytest.mark.parametrize(
    "path",
    [("verdicts", 0, "note"), ("measurements", 0, "unit"), ("inputs", 0, "digest"), ("evidence",)],
)
def test_a_missing_field_is_refused_by_its_name(write, path):
    value = copy.deepcopy(as_json(made()))
    *front, last = path
    inner = value
    for step in front:
        inner = inner[step]
    del inner[last]
    with pytest.raises(InputError, match=f"is damaged at .*'{last}' is a required property"):
        certificates.read(write(value))


def test_a_whole_number_with_a_point_is_refused(write):
    value = as_json(made())
    value["verdicts"][0]["compared"] = 2.0
    with pytest.raises(InputError, match=r"certificate\.json: .*damaged at /verdicts/0/compared"):
        certificates.read(write(value))


def test_a_long_value_does_not_fill_the_message(write):
    value = as_json(made())
    value["verdicts"] = {"x": "y" * 10_000}
    with pytest.raises(InputError, match=r"is not of type 'array'$") as found:
        certificates.read(write(value))
    assert len(str(found.value)) < 600


@pytest.mark.parametrize("number", [2, 4, "3", None])
def test_another_schema_is_refused_with_the_version_that_reads_it(write, number):
    value = as_json(made()) | {"schema": number}
    value["environment"]["packages"] = {"lora-export": "0.0.7"}
    with pytest.raises(InputError, match=r"has schema .* reads 3; the version .* \(0\.0\.7\)"):
        certificates.read(write(value))


@pytest.mark.parametrize("surroundings", [None, 3, {}, {"packages": 3}, {"packages": {}}])
def test_another_schema_is_refused_where_no_version_was_recorded(write, surroundings):
    value = {"schema": 1, "environment": surroundings}
    with pytest.raises(InputError, match=r"has schema 1, .* \(not recorded\)"):
        certificates.read(write(value))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text, "latin-1")
    with pytest.raises(InputError, match=r"x\.json"):
        certificates.read(file)


def test_a_missing_certificate_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*certificate\.json"):
        certificates.read(tmp_path)
