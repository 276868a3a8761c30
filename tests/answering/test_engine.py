"""What goes through the Engine door can be pickled, errors and all, and names content, never tokens."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from qvsplit.answering.engine import Completion, Decoding, FeatureRef, Request
from qvsplit.answering.local_engine import LocalEngine
from qvsplit.errors import OutOfMemory, ShardDamaged, UsageError
from qvsplit.models.prompt import question_messages

REQUEST = Request(
    "7", tuple(question_messages("Is it?", ["image", "image"], "Be brief.")), (FeatureRef("ab" * 32), FeatureRef("cd" * 32, 3)),
    shared=1, decoding=Decoding(9, 0.5, 0.9, 4, ("x",), {"type": "object"}), choices=("yes", "no"), seed=5,
)  # fmt: skip


def test_a_request_comes_back_from_pickling_as_it_was():
    again = pickle.loads(pickle.dumps(REQUEST))
    assert again == REQUEST
    assert (again.features[1].sha256, again.features[1].part) == ("cd" * 32, 3)
    assert again.decoding.json_schema == {"type": "object"}
    with pytest.raises(FrozenInstanceError):
        again.seed = 6
    assert "input_ids" not in {field.name for field in fields(Request)}


@pytest.mark.parametrize(
    "error",
    [None, OutOfMemory("too much"), UsageError("no such\nchoice"), ShardDamaged("bad bytes", "a.parquet", "page")],
)
def test_a_completion_comes_back_with_its_error(error):
    completion = Completion("7", "yes", (1, 2), 40, "error" if error else "scored", {"yes": -0.5}, error)
    again = pickle.loads(pickle.dumps(completion))
    assert (type(again.error), str(again.error)) == (type(error), str(error))
    assert again.error is None or again.error.exit_code == error.exit_code
    assert (again.id, again.tokens, again.logprobs, again.finish_reason) == (
        completion.id, completion.tokens, completion.logprobs, completion.finish_reason
    )  # fmt: skip
    if isinstance(error, ShardDamaged):
        assert (again.error.path, again.error.what) == ("a.parquet", "page")


def test_the_local_engine_and_the_fake_have_the_same_door():
    from qvsplit.answering.engine import Engine
    from tests.support.fake_engine import FakeEngine

    names = {name for name in vars(Engine) if not name.startswith("_")}
    assert names == {"answer", "cancel"}
    for engine in (LocalEngine, FakeEngine):
        assert names <= {name for name in dir(engine) if not name.startswith("_")}
