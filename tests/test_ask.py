"""The public call: what is selected, what is raised, what stands in an answer. The model is not the point."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qvsplit.answering.checks import Question
from qvsplit.answering.loading import window_limits
from qvsplit.answering.local_engine import PREFIX_CACHE_TOKENS
from qvsplit.answering.options import AskOptions
from qvsplit.answering.selection import select
from qvsplit.ask import PromptItems, Session, StoreReader, load_session
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import OutOfMemory, StoreDamaged, UsageError
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store, read_store
from tests.support import rows
from tests.support.fake_engine import FakeEngine, MemoryStore, row, session_of, store_of
from tests.support.full_model import upright_rgb
from tests.support.memory_storage import MemoryStorage

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


def stored(*pairs):
    return read_store(rows.write_store(MemoryStorage(), pairs))


@pytest.fixture
def on_disk():
    """The same as `store`, in shards."""
    images = [rows.item(name) for name in ("a.jpg", "b.jpg", "in/c.jpg")]
    return stored(*images, (rows.failed("in/bad.jpg"), None), (rows.deleted("gone.jpg"), None))


def paths(chosen) -> tuple[list[str], list[str]]:
    return [one.path for one in chosen.rows], [one.path for one in chosen.failed]


def test_what_failed_is_in_the_selection(on_disk):
    assert paths(select(on_disk)) == (["a.jpg", "b.jpg", "in/c.jpg"], ["in/bad.jpg"])
    assert paths(select(on_disk, ["in/*"])) == (["in/c.jpg"], ["in/bad.jpg"])
    assert paths(select(on_disk, ["a.jpg"])) == (["a.jpg"], [])
    assert paths(select(on_disk, ["b.jpg", "?.jpg", "a.jpg"])) == (["a.jpg", "b.jpg", "in/c.jpg"], [])


def test_a_selection_of_what_failed_alone_is_no_mistake(on_disk):
    assert paths(select(on_disk, ["bad.jpg"])) == ([], ["in/bad.jpg"])
    assert paths(select(stored((rows.failed("bad.jpg"), None)))) == ([], ["bad.jpg"])


def test_a_selection_of_nothing_is_one(on_disk):
    with pytest.raises(UsageError, match=r"none\.jpg matches none of the store's 3 images"):
        select(on_disk, ["none.jpg"])
    with pytest.raises(UsageError, match=r"`image` gone\.jpg: gone\.jpg has been deleted from /photos"):
        select(on_disk, ["gone.jpg"])
    with pytest.raises(UsageError, match="holds no item that can be asked about"):
        select(stored((rows.deleted("gone.jpg"), None)))
    with pytest.raises(UsageError, match="matches 3 of the store's 3 images, not 1"):
        select(on_disk, ["?.jpg"], only=1)
    with pytest.raises(UsageError, match=r"matches 0 of .*, not 1; in/bad\.jpg has failed: is empty"):
        select(on_disk, ["bad.jpg"], only=1)
    assert paths(select(on_disk, ["c.jpg"], only=1)) == (["in/c.jpg"], [])


@pytest.fixture
def with_videos():
    """An image, a video in two parts, and one that failed."""
    parts = [
        rows.item("film.mp4", kind="video", part=part, start=10.0 * part, end=10.0 * part + 10, duration=20.0)
        for part in range(2)
    ]
    return stored(rows.item("a.jpg"), *parts, (rows.failed("torn.mp4", kind="video"), None))


def test_a_video_is_selected_whole_or_by_a_part(with_videos):
    def parts(*names: str, **more) -> list[str]:
        return [one.name for one in select(with_videos, names, **more).rows]

    assert parts() == ["a.jpg", "film.mp4#0", "film.mp4#1"]
    assert parts("film.mp4") == parts("*.mp4") == ["film.mp4#0", "film.mp4#1"]
    assert parts("film.mp4#1") == parts("film.mp4#1", only=1) == ["film.mp4#1"]
    assert parts("film.mp4#1 (0:10 to 0:20)") == ["film.mp4#1"]  # as it is printed
    with pytest.raises(UsageError, match=r"none\.jpg matches none of the store's 1 image and 2 clips of 1 video"):
        parts("none.jpg")
    with pytest.raises(UsageError, match=r"film\.mp4 matches 2 of .*, not 1; it is a video in several parts: give one, "
                                         r"such as film\.mp4#0 \(0:00 to 0:10\)"):  # fmt: skip
        parts("film.mp4", only=1)


def test_the_config_of_videos_decides_answers_about_videos_alone(with_videos, checkpoint):
    from dataclasses import replace

    from qvsplit.checkpoints.opening import open_checkpoint

    def origin(**videos):
        session = Session(with_videos, FakeEngine(), checkpoint=open_checkpoint(checkpoint, "language"))
        session.store = _Configured(with_videos, replace(with_videos.config, videos=videos or None))
        made_by = session.recorder([], [])._origin
        return made_by.config, made_by.video_config

    (without, _), (slow, slow_videos), (fast, fast_videos) = origin(), origin(fps=1.0), origin(fps=2.0)
    assert without == slow == fast
    assert slow_videos != fast_videos


class _Configured:
    def __init__(self, store, config):
        self.config, self.current = config, store.current


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


def test_sessions_over_one_model_answer_each_from_its_own_features(whole, photos, checkpoint):
    """Of the same files, under another extraction config: by the store, by the prefix cache, and by a lazy survey."""
    images = [upright_rgb(photos / name) for name in ("chelsea.png", "coins.png", "tall.png")]
    a, b = store_of(whole, {"a.png": images[0], "b.png": images[1]}), store_of(whole, {"a.png": images[2]})
    assert a["a.png"].content == b["a.png"].content
    a_alone, b_alone = (session_of(one, checkpoint, max_new_tokens=8).answer("a.png", "What?") for one in (a, b))
    assert a_alone.tokens != b_alone.tokens

    first = session_of(a, checkpoint, max_new_tokens=8)
    # the same prompt tokens: only what the features are could tell cached prefixes apart
    same = store_of(whole, {"a.png": images[0].transpose(Image.Transpose.ROTATE_180)})
    for other, told in ((b, b_alone), (same, session_of(same, checkpoint, max_new_tokens=8).answer("a.png", "What?"))):
        survey = iter(first.survey([["a.png"], ["b.png"], ["a.png"]], ["What?"]))
        assert next(survey).tokens == a_alone.tokens
        first.engine.prefix_cache.clear()
        with_other = _over(first, other)
        assert with_other.answer("a.png", "What?").tokens == told.tokens != a_alone.tokens
        assert first.answer("a.png", "What?").tokens == a_alone.tokens
        assert [answer.tokens for answer in survey][-1] == a_alone.tokens
        assert with_other.answer("a.png", "What?").tokens == told.tokens
        assert with_other.engine.language is first.engine.language


def _over(session, store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qvsplit.ask.check_encoder", lambda *_, **__: "fingerprint")
        return session.over(store, system=None)


def test_a_session_of_the_same_store_shares_what_is_loaded_and_cached(store, checkpoint):
    session = session_of(store, checkpoint)
    brief = session.over(store, system="Be brief.")
    assert (brief.engine, brief.options.system, session.options.system) == (session.engine, "Be brief.", None)
    other = session.engine.over(StoreReader(store))
    assert not other.is_loaded and other.language is session.engine.language and session.is_loaded


def test_an_engine_of_one_store_or_an_empty_one_is_refused(store, checkpoint, monkeypatch):
    monkeypatch.setattr("qvsplit.ask.check_encoder", lambda *_, **__: "fingerprint")
    session = Session(store, FakeEngine(), checkpoint=open_checkpoint(checkpoint, "language"))
    with pytest.raises(UsageError, match="^store: this engine answers for one store alone"):
        session.over(MemoryStore(ROWS), system=None)
    empty = MemoryStore([])
    empty.provenance = None
    with pytest.raises(UsageError, match="^store: there are no rows in it"):
        session.over(empty, system=None)


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


def test_rows_are_given_by_name_too(store):
    session = Session(store, FakeEngine())
    assert session.answer("a.jpg", "What?").rows == (ROWS[0],)
    assert session.answer(Path("in/c.jpg"), "What?").rows == (ROWS[2],)
    assert session.answer(["b.jpg", ROWS[0]], "What?").rows == (ROWS[1], ROWS[0])
    assert [answer.rows for answer in session.answers("b.jpg", ["What?", "Where?"])] == [(ROWS[1],)] * 2
    shown = [answer.rows for answer in session.survey(["a.jpg", ROWS[1], ["a.jpg", "b.jpg"]], ["What?"])]
    assert shown == [(ROWS[0],), (ROWS[1],), (ROWS[0], ROWS[1])]
    with pytest.raises(UsageError, match="rows: memory has no item named none.jpg"):
        session.answer("none.jpg", "What?")
    with pytest.raises(UsageError, match=r"rows\[1\]: memory has no item named none.jpg"):
        list(session.survey([["a.jpg", "none.jpg"]], ["What?"]))


ANSWER = Session(MemoryStore(ROWS), FakeEngine()).answer(ROWS[0], "What?")
WANTED = "give a row of the store, its name, or several of these"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, f"rows: {WANTED}, not None"),
        (5, f"rows: {WANTED}, not int 5"),
        (b"a.jpg", f"rows: {WANTED}, not bytes b'a.jpg'"),
        (ANSWER, f"rows: {WANTED}, not an Answer"),
        ({"a.jpg": 1}, f"rows: {WANTED}, not a dict"),
        (["a.jpg", ANSWER], rf"rows\[1\]: {WANTED}, not an Answer"),
        ([["a.jpg"]], rf"rows\[0\]: {WANTED}, not a list"),
        ([], f"rows: {WANTED}, not none"),
        ("", f"rows: {WANTED}, not an empty text"),
        (row("x.jpg"), "rows: x.jpg is of another store; give a row of memory"),
        (["a.jpg", row("x.jpg")], r"rows\[1\]: x.jpg is of another store"),
    ],
)
def test_what_are_no_rows(store, rows, message):
    session = Session(store, FakeEngine())
    for ask in (lambda: session.answer(rows, "What?"), lambda: session.answers(rows, ["What?"])):
        with pytest.raises(UsageError, match=f"^{message}"):
            ask()


def test_what_are_no_questions(store):
    session = Session(store, FakeEngine())
    for wrong, given in ((None, "None"), (5, "int 5"), (["What?"], "a list"), (ANSWER, "an Answer")):
        with pytest.raises(UsageError, match=f"^question: give a text or a Question, not {given}"):
            session.answer("a.jpg", wrong)
        with pytest.raises(UsageError, match=rf"^questions\[1\]: give a text or a Question, not {given}"):
            session.answers("a.jpg", ["What?", wrong])
    for wrong, given in ((None, "None"), (5, "int 5"), ({"q": "What?"}, "a dict")):
        with pytest.raises(UsageError, match=f"^questions: give a list of questions, not {given}"):
            session.answers("a.jpg", wrong)
    with pytest.raises(UsageError, match="^questions: give a list of questions; one alone"):
        session.survey(["a.jpg"], Question("What?"))
    with pytest.raises(UsageError, match="^on_text: give a function, not str 'x'"):
        session.answer("a.jpg", "What?", on_text="x")
    with pytest.raises(UsageError, match="^items: give a list of rows or names, not str 'a.jpg'"):
        session.survey("a.jpg", ["What?"])
    with pytest.raises(UsageError, match="^on_answer: give a function, not int 5"):
        session.survey(["a.jpg"], ["What?"], on_answer=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens: give a whole number, not str '5'"),
        ({"max_new_tokens": 5.0}, "max_new_tokens: give a whole number, not float 5.0"),
        ({"max_new_tokens": True}, "max_new_tokens: give a whole number, not True"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, not 0"),
        ({"temperature": "hot"}, "temperature: give a number, not str 'hot'"),
        ({"temperature": float("nan")}, "`temperature` must be finite, not nan"),
        ({"prefix_cache_tokens": -1}, "`prefix_cache_tokens` must be at least 0, not -1"),
        ({"stop": 5}, "stop: give a text or several, not int 5"),
        ({"stop": ["a", 5]}, "stop: give a text or several, not int 5"),
        ({"json_schema": "schema.json"}, "json_schema: give a JSON schema as a dict, not str"),
        ({"dtype": "fp16"}, "`dtype` fp16: choose one of float32"),
        ({"model": 5}, "model: give a text, not int 5"),
        ({"system": ["Be brief."]}, "system: give a text, not a list"),
        ({"unchecked_encoder": "yes"}, "unchecked_encoder: give True or False, not str 'yes'"),
        ({"seed": None}, "seed: give a whole number, not None"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        AskOptions(**options).check()


def test_one_text_to_stop_at_is_not_its_letters():
    assert AskOptions(stop="END").stop == AskOptions(stop=["END"]).stop == ("END",)
    assert AskOptions(model=Path("a/model")).model == "a/model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"store": None}, "store: give a store, a path or several, not None"),
        ({"store": 5}, "store: give a store, a path or several, not int 5"),
        ({"store": []}, "store: give a store, a path or several, not none"),
        ({"store": ["embeds", 5]}, r"store\[1\]: give a path, not int 5"),
        ({"store": ANSWER}, "store: give a store, a path or several, not an Answer"),
        ({"store": "no/such/store"}, "no store or shard at"),
        ({"options": ExtractOptions()}, "options: give AskOptions, not an ExtractOptions"),
        ({"options": {"max_new_tokens": 5}}, "options: give AskOptions, not a dict"),
        ({"options": AskOptions(device="cpu"), "device": "cuda"}, "device: cuda is given, and cpu in options"),
        ({"device": 0}, "device: give a text, not int 0"),
    ],
)
def test_a_session_of_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        load_session(**{"store": "no/such/store"} | arguments)


def test_a_store_is_given_as_a_path_or_several_or_open(store_folder, monkeypatch):
    monkeypatch.chdir(store_folder.parent)
    shards = sorted(store_folder.glob("*.parquet"))
    number = len(open_store(store_folder))
    for given in (store_folder, "embeds", "embeds/*.parquet", shards, map(str, shards), open_store("embeds")):
        session = load_session(given, loaded=False)
        assert (len(session.store), session.encoder_check, session.is_loaded) == (number, "fingerprint", False)
    assert load_session(store_folder, device="cpu", dtype="bfloat16", loaded=False).options.dtype == "bfloat16"


def test_no_prefix_cache_is_none_everywhere():
    kept = window_limits(AskOptions(device="cpu", token_budget=8000, prefix_cache_tokens=800))
    assert kept.tokens == 700  # all prefixes of a window fit into the cache
    none = window_limits(AskOptions(device="cpu", token_budget=80_000, prefix_cache_tokens=0))
    assert none.tokens == 70_000  # there is nothing to fit into: as many as the batches take
    default = window_limits(AskOptions(device="cpu", token_budget=80_000))
    assert default.tokens == PREFIX_CACHE_TOKENS["cpu"] * 7 // 8
