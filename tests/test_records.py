import dataclasses

import numpy as np
import pytest
from hand_made import batches, certificate, evidence, timing, verdict

from lora_export import records
from lora_export.errors import CheckFailed
from lora_export.records import Factors, Status

OTHERS = [status for status in Status if status is not Status.PASS]


def _factors(**changes):
    made = Factors(np.ones((4, 8)), np.ones((6, 4)), alpha=8.0, scale=2.0)
    return dataclasses.replace(made, **changes)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize("status", Status)
def test_a_verdict_refuses_to_be_taken_for_a_truth_value(status):
    with pytest.raises(TypeError, match=r"neither true nor false; ask for \.passed"):
        bool(verdict(status))


def test_a_verdict_cannot_stand_in_a_condition():
    with pytest.raises(TypeError, match=r"ask for \.passed"):
        all([verdict(), verdict()])


@pytest.mark.parametrize("compared", [0, -1])
def test_a_pass_over_nothing_cannot_be_made(compared):
    with pytest.raises(AssertionError, match="parity: a pass needs something that was compared"):
        verdict(compared=compared)


def test_a_fail_cannot_be_turned_into_a_pass_over_nothing():
    with pytest.raises(AssertionError, match="a pass needs something"):
        dataclasses.replace(verdict(Status.FAIL, compared=0), status=Status.PASS)


@pytest.mark.parametrize("status", OTHERS)
def test_what_is_no_pass_may_have_compared_nothing(status):
    assert verdict(status, compared=0).compared == 0


def test_only_a_pass_is_a_pass():
    assert [status for status in Status if verdict(status).passed] == [Status.PASS]


def test_a_verdict_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError, match="status"):
        verdict(Status.FAIL).status = Status.PASS


# ---------------------------------------------------------------- certificates


def test_a_certificate_of_passes_is_ok():
    assert certificate(verdict(), verdict()).ok is True


def test_an_empty_certificate_is_not_ok():
    assert certificate().ok is False


@pytest.mark.parametrize("status", OTHERS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_verdict_that_is_no_pass_makes_a_certificate_not_ok(status, place):
    verdicts = [verdict()] * 3
    verdicts[place] = verdict(status)
    assert certificate(*verdicts).ok is False


def test_a_certificate_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError, match="verdicts"):
        certificate(verdict(Status.FAIL)).verdicts = (verdict(),)


# ---------------------------------------------------------------- the rest


def test_every_record_is_frozen():
    kinds = [kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)]
    assert len(kinds) > 10
    assert [kind.__name__ for kind in kinds if not kind.__dataclass_params__.frozen] == []


def test_evidence_cannot_be_changed_after_the_fact():
    with pytest.raises(dataclasses.FrozenInstanceError, match="timings"):
        evidence().timings = (timing(),)


def test_the_rank_is_that_of_the_tensor():
    assert _factors().rank == 4


def test_a_pair_that_was_trained_is_not_zero():
    assert not _factors().is_zero


@pytest.mark.parametrize("change", [{"b": np.zeros((6, 4))}, {"a": np.zeros((4, 8))}, {"scale": 0}])
def test_a_pair_with_a_vanishing_part_is_zero(change):
    assert _factors(**change).is_zero


def test_a_diagonal_of_zeros_makes_a_pair_zero():
    assert _factors(diagonal=np.zeros(4)).is_zero
    assert not _factors(diagonal=np.ones(4)).is_zero


@pytest.mark.parametrize("extra", ["bias", "magnitude"])
def test_a_pair_that_trained_something_beside_its_product_is_not_zero(extra):
    """A bias is added, a magnitude scales the base's rows, whatever B is."""
    assert not _factors(b=np.zeros((6, 4)), **{extra: np.ones(6)}).is_zero


@pytest.mark.parametrize("extra", [{"diagonal": np.ones(4)}, {"magnitude": np.ones(6)}])
def test_a_pair_with_anything_beside_its_factors_is_not_plain(extra):
    assert _factors().is_plain
    assert not _factors(**extra).is_plain
    assert not _factors(kind=records.EMBEDDING).is_plain


@pytest.mark.parametrize(
    ("a", "b", "kind", "shapes"),
    [
        ((4, 8), (6, 4), records.LINEAR, ((1, 4, 8), (1, 6, 4))),
        ((4, 20), (6, 4), records.EMBEDDING, ((1, 4, 20), (1, 6, 4))),
        ((4, 3, 2, 2), (6, 4, 1, 1), records.CONV, ((1, 4, 12), (1, 6, 4))),
        ((3, 4, 8), (3, 6, 4), records.EXPERTS, ((3, 4, 8), (3, 6, 4))),
    ],
)
def test_every_kind_of_pair_is_seen_as_stacks_of_matrices(a, b, kind, shapes):
    pair = Factors(np.ones(a), np.ones(b), 8.0, 2.0, kind)
    assert tuple(side.shape for side in pair.matrices()) == shapes
    assert pair.rank == 4


@pytest.mark.parametrize(
    ("given", "public"),
    [
        (None, None), ("", ""), ("org/name", "org/name"), ("name", "name"), ("/home/x/m", "m"),
        ("./m", "m"), ("~/models/m/", "m"), ("a/b/c", "c"),
    ],
)  # fmt: skip
def test_only_the_last_component_of_a_path_is_written(given, public):
    assert records.BaseRef(given).public_id == public


def test_half_precision_is_widened_exactly_and_nothing_else_is():
    import ml_dtypes

    for kind in (np.float16, ml_dtypes.bfloat16):
        narrow = np.array([0.5, -3.25], kind)
        assert records.is_float(narrow)
        assert records.widened(narrow).dtype == np.float32
        assert (records.widened(narrow) == narrow).all()
    for kind in (np.float32, np.float64, np.int16, np.bool_):
        wide = np.ones(2, kind)
        assert records.widened(wide) is wide
        assert records.is_float(wide) == (kind in (np.float32, np.float64))


def test_a_batch_knows_which_tokens_count():
    batch = batches()[0]
    assert batch.mask is batch.arrays["attention_mask"]


def test_the_names_of_the_recordings_differ():
    names = {records.REFERENCE, records.UNMERGED, records.IDLE, records.MERGED}
    assert len(names) == 4


def test_the_noise_floor_is_that_of_the_unmerged_model_unless_said_otherwise():
    assert records.Evidence().floor == records.UNMERGED


def test_one_value_that_is_no_number_makes_an_array_not_finite():
    array = np.ones((2, 3))
    assert records.all_finite(array)
    array[1, 2] = np.nan
    assert not records.all_finite(array)


def test_a_certificate_that_is_required_raises_with_the_verdicts_that_fail():
    with pytest.raises(CheckFailed, match=r"not proven: .*: fail"):
        certificate(verdict(Status.PASS), verdict(Status.FAIL)).require()
    with pytest.raises(CheckFailed, match="there are no verdicts"):
        certificate().require()


def test_a_certificate_that_holds_requires_nothing_more():
    found = certificate(verdict(Status.PASS))
    found.require()
    assert found.ok
