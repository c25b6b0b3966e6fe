import numpy as np
from hand_made import batches

from lora_export.recording import record
from lora_export.records import Recording


class Counting:
    """Answers each batch with its number of rows; refuses batches that are `refused` long."""

    name, precision = "counting", "float32"

    def __init__(self, refused=None):
        self.refused = refused

    def run(self, inputs):
        if inputs["input_ids"].shape[1] == self.refused:
            raise RuntimeError("Got: 3 Expected: 4\nand more")
        return {"logits": np.array([len(inputs["input_ids"])])}


def test_answers_come_in_the_order_of_the_batches():
    found = record(Counting(), batches())
    assert isinstance(found, Recording)
    assert [int(out["logits"][0]) for out in found.outputs] == [3, 2]
    assert (found.runner, found.precision, found.errors) == ("counting", "float32", ())


def test_a_batch_that_is_refused_has_no_answer_and_what_was_said():
    found = record(Counting(refused=3), batches())
    assert [sorted(out) for out in found.outputs] == [["logits"], []]
    assert found.errors == ("", "Got: 3 Expected: 4")


def test_one_that_reads_is_given_the_texts_where_there_are_any():
    class Reading(Counting):
        def answer(self, texts):
            return {"logits": np.array([len(texts), -1])}

    found = record(Reading(), batches())
    assert [out["logits"].tolist() for out in found.outputs] == [[3, -1], [2]]
