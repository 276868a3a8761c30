"""The public call: what is selected, what is raised, what stands in an answer. The model is not the point."""

from __future__ import annotations

import pytest

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.ask import PromptItems, Session, StoreReader, select
from qvsplit.errors import OutOfMemory, StoreDamaged, UsageError
from tests.support.fake_engine import FakeEngine, MemoryStore, row

FAILED = {
    "status": "failed",
    "error": "is no image",
    "error_kind": "content",
    "has_features": False,
    "placeholder": None,
}
ROWS = [
    row("a.jpg"), row("b.jpg"), row("in/c.jpg"), row("in/bad.jpg", **FAILED), row("gone.jpg", status="deleted"),
]  # fmt: skip


@pytest.fixture
def store():
    return MemoryStore(ROWS)


def test_what_failed_is_in_the_selection(store):
    everything = select(store)
    assert [one.path for one in everything.rows] == ["a.jpg", "b.jpg", "in/c.jpg"]
    assert [one.path for one in everything.failed] == ["in/bad.jpg"]
    assert [one.path for one in select(store, ["in/*"]).failed] == ["in/bad.jpg"]
    assert select(store, ["a.jpg"]).failed == []


def test_a_selection_of_what_failed_alone_is_no_mistake(store):
    chosen = select(store, ["bad.jpg"])
    assert (chosen.rows, [one.path for one in chosen.failed]) == ([], ["in/bad.jpg"])
    alone = select(MemoryStore([ROWS[3]]))
    assert (alone.rows, alone.failed) == ([], [ROWS[3]])


def test_a_selection_of_nothing_is_one(store):
    with pytest.raises(UsageError, match=r"none\.jpg matches none of the store's 3 images"):
        select(store, ["none.jpg"])
    with pytest.raises(UsageError, match="matches none"):
        select(store, ["gone.jpg"])
    with pytest.raises(UsageError, match="holds no image that can be asked"):
        select(MemoryStore([ROWS[4]]))
    with pytest.raises(UsageError, match="matches 3 of the store's 3 images, not 1"):
        select(store, ["?.jpg"], only=1)
    assert select(store, ["c.jpg"], only=1).rows == [ROWS[2]]


def test_one_answers_error_is_raised(store):
    session = Session(store, FakeEngine(lambda request: OutOfMemory("too much")))
    with pytest.raises(OutOfMemory, match="too much"):
        session.answer(ROWS[0], "What?")
    with pytest.raises(OutOfMemory, match="too much"):
        session.answers(ROWS[0], ["What?", "Where?"])
    with pytest.raises(UsageError, match="it is failed"):
        session.answer(ROWS[3], "What?")
    survey = session.survey([PromptItems((ROWS[0],))], [Question("What?")])
    assert [answer.error for answer in survey] == ["too much"]
    assert survey.error.exit_code == 3


def test_an_answer_and_what_it_says_of_the_evidence(store):
    heard = []
    engine = FakeEngine(lambda request: "A cat.")
    session = Session(store, engine, options=AskOptions(system="Be brief.", max_new_tokens=5), encoder_check="note")
    answer = session.answer(ROWS[:2], "What?", on_text=heard.append)
    assert (answer.text, answer.tokens, answer.prompt_tokens, answer.finish_reason) == ("A cat.", [1, 2], 9, "stop")
    assert (answer.rows, answer.encoder_check, heard) == (tuple(ROWS[:2]), "note", ["A cat."])
    (request,) = engine.requests
    assert request.messages[0] == {"role": "system", "content": "Be brief."}
    assert request.decoding.max_new_tokens == 5
    with pytest.raises(UsageError, match="a list of questions"):
        session.answers(ROWS[0], "What?")


def test_a_cancelled_answer_is_one_that_says_so(store):
    engine = FakeEngine()
    engine.cancel()
    assert Session(store, engine).answer(ROWS[0], "What?").finish_reason == "cancelled"


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5},
              {"top_k": 0}, {"stop": ("",)}, {"token_budget": 0}],
)  # fmt: skip
def test_numbers_that_mean_nothing(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        AskOptions(**wrong).check()


def test_a_copy_is_read_where_its_bytes_are(store):
    from qvsplit.answering.engine import FeatureRef

    reader = StoreReader(store)
    copy = row("copy.jpg", sha256=ROWS[0].sha256, has_features=False)
    reader.check(copy)
    assert reader.row(FeatureRef(*copy.content)) is ROWS[0]
    lost = row("lost.jpg", has_features=False)
    with pytest.raises(StoreDamaged):
        reader.check(lost)
    with pytest.raises(StoreDamaged, match="in no shard given"):
        reader.row(FeatureRef(*lost.content))
