"""Rows × questions to answers: the album's rows, checked; the language half, loaded alone.

Nothing is asked until the album is shown to come from the checkpoint's own tower (`check_tower`). The prompt up to
its last picture is computed once a picture; the questions behind it, and those behind other pictures, share batches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qvsplit.album import Album
from qvsplit.answers import Key, Table
from qvsplit.checkpoint import Checkpoint, choose_checkpoint
from qvsplit.checks import Question, levels, normalised, outcome
from qvsplit.errors import OutOfMemory, RecipeError, UsageError
from qvsplit.store import Row

if TYPE_CHECKING:
    from qvsplit.language import Decoding, Language
    from qvsplit.prefix import Prefix, Warm
    from qvsplit.prompt import Prompt

MAX_NEW_TOKENS = 128
TOKEN_BUDGET = {"cpu": 1 << 14, "cuda": 1 << 17}  # in one batch, a picture's once: 0.9 GB on a 2B in float32
WARM_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}  # of prefixes that are kept for the next question
WINDOW = 64  # questions that are answered before the first of them is handed on
SKIPPED = "skipped"  # the finish reason of a question whose `only_if` did not hold


@dataclass(frozen=True)
class Settings:
    """What asking may be told. None is the album's own, or the default.

    Greedy without `temperature`; with it, or `top_p` or `top_k`, sampled, and the same `seed` gives the same answers
    whatever is asked beside them. `token_budget` and `warm_tokens` bound what is in memory, in tokens of KV cache.
    """

    model: str | None = None
    device: str | None = None  # `auto` spreads the model over all devices, as transformers does
    dtype: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    system: str | None = None
    unchecked_tower: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    token_budget: int | None = None
    warm_tokens: int | None = None

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn, not greedy."""
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k))


@dataclass(frozen=True)
class Shown:
    """The pictures of one prompt, in order; the first `shared` of them begin others' prompts too."""

    rows: tuple[Row, ...]
    shared: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer, and the evidence (`tower_check`) that its embeddings belong to the model.

    For a question with allowed answers `text` is the likeliest of them, `tokens` is empty, `logprobs` has the
    log-probability of each as a whole answer, and `probabilities` the same normalised over them. `flagged` says
    whether the answer raised its check, None where nothing could.
    """

    rows: tuple[Row, ...]
    question: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    tower_check: str
    id: str = ""
    severity: str | None = None
    flagged: bool | None = None
    logprobs: Mapping[str, float] | None = None
    probabilities: Mapping[str, float] | None = None
    recalled: str | None = None  # when it was given, where it was known from before

    @property
    def name(self) -> str:
        """The check's id, or the question."""
        return self.id or self.question

    @property
    def probability(self) -> float | None:
        """Of the likeliest allowed answer."""
        return max(self.probabilities.values()) if self.probabilities else None

    @property
    def coverage(self) -> float | None:
        """How probable it is that the model would have given any of the allowed answers by itself."""
        return math.fsum(map(math.exp, self.logprobs.values())) if self.logprobs else None

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it: `path`, or `paths` where pictures were asked together."""
        told = (
            named(self.rows) | ({"id": self.id} if self.id else {}) | {"question": self.question, "answer": self.text}
        )
        if self.probabilities is not None:
            told |= {
                "probability": self.probability, "probabilities": dict(self.probabilities),
                "logprobs": dict(self.logprobs or {}), "coverage": self.coverage,
            }  # fmt: skip
        if self.flagged is not None:
            told |= {"flagged": self.flagged, "severity": self.severity}
        return told | {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "tower_check": self.tower_check,
        }


def named(rows: Sequence[Row]) -> dict[str, Any]:
    """What `--json` calls the pictures of one prompt."""
    if len(rows) == 1:
        return {"path": rows[0].path, "root": rows[0].root}
    return {"paths": [row.path for row in rows], "roots": [row.root for row in rows]}


@dataclass
class _Ready:
    """A question ready for the language half."""

    shown: Shown
    question: Question
    prompt: Prompt
    spelt: list[list[int]] = field(default_factory=list)  # tokens of every spelling of every allowed answer

    def __post_init__(self) -> None:
        length = self.prompt.prefix_tokens
        self.tail = self.prompt.input_ids[length:]
        hashes = tuple(row.sha256 for row in self.shown.rows)
        # the tokens too: a template may put text before the pictures, and then every question has its own prefix
        self.key = (hashes, tuple(self.prompt.input_ids[:length]))

    @property
    def tail_tokens(self) -> int:
        """What stands behind the prefix: the question, and the allowed answers."""
        return len(self.tail) + sum(map(len, self.spelt))


class Asker:
    """An album and the language half that may answer for it."""

    def __init__(
        self,
        album: Album,
        load: Callable[[], Language],
        *,
        settings: Settings,
        tower_check: str,
        checkpoint: Checkpoint,
    ) -> None:
        self.album = album
        self.settings = settings
        self.tower_check = tower_check
        self.checkpoint = checkpoint
        self._load = load

    @property
    def model(self) -> str:
        """The model as it was named."""
        return self.checkpoint.name

    @property
    def is_loaded(self) -> bool:
        """Whether the language half is in memory."""
        return "language" in self.__dict__

    @cached_property
    def language(self) -> Language:
        """The language half, loaded when it is first needed."""
        return self._load()

    @cached_property
    def _warm(self) -> Warm:
        from qvsplit.prefix import Warm

        wanted = self.settings.warm_tokens
        return Warm(WARM_TOKENS[self.language.device.type] if wanted is None else wanted)

    @cached_property
    def _budget(self) -> int:
        return self.settings.token_budget or TOKEN_BUDGET[self.language.device.type]

    @cached_property
    def _decoding(self) -> Decoding:
        from qvsplit.language import Decoding
        from qvsplit.schema import compiler

        told, constraint = self.settings, None
        if told.json_schema is not None:
            constraint = compiler(told.json_schema, self.language.prompter.tokenizer, self.language.stops)
        return Decoding(
            max_new_tokens=told.max_new_tokens,
            temperature=(1.0 if told.temperature is None else told.temperature) if told.sampled else None,
            top_p=told.top_p, top_k=told.top_k, stop=told.stop, constraint=constraint,
        )  # fmt: skip

    def answer(
        self, rows: Row | Sequence[Row], question: str | Question, *, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to one question about one picture, or about several shown together in this order."""
        ready = self._prepare(Shown(_together(rows)), _question(question))
        return self._run([ready], {}, on_text)[0]

    def answers(self, rows: Row | Sequence[Row], questions: Iterable[str | Question]) -> list[Answer]:
        """The answers to many questions about one picture, or about several shown together: one prefill for all."""
        if isinstance(questions, str):
            raise UsageError("give a list of questions, or ask one with Asker.answer")
        return list(self.survey([Shown(_together(rows))], [_question(question) for question in questions]))

    def survey(
        self,
        shown: Iterable[Shown],
        questions: Sequence[Question],
        *,
        recall: Callable[[Shown, Question], Answer | None] = lambda shown, question: None,
        on_answer: Callable[[Answer], None] = lambda answer: None,
    ) -> Iterator[Answer]:
        """Every question asked of everything shown, in that order; what `recall` knows already is not asked again.

        A question whose `only_if` does not hold gives an answer with the finish reason `skipped`. `on_answer` hears
        each answer as soon as its batch is done, before those that stand before it are yielded. UsageError where two
        different questions have one name: which of them an answer is to could not be told.
        """
        _check_names(questions)
        rounds = levels(questions)
        for window in self._windows(shown, questions, recall):
            held: dict[Any, Prefix] = {}
            for level in rounds:
                asked: list[tuple[Shown, dict[str, Answer], Question]] = []
                for one, told in window:
                    waiting: set[str] = set()  # the same question may stand there twice
                    for question in level:
                        if not _is_due(question, told):
                            told[question.name] = self._skipped(one, question)
                        elif question.name not in told and question.name not in waiting:
                            waiting.add(question.name)
                            asked.append((one, told, question))
                places = iter(asked)
                for batch in self._batches(self._prepare(one, question) for one, _, question in asked):
                    for answer in self._run(batch, held):
                        _, told, question = next(places)
                        told[question.name] = answer
                        on_answer(answer)
            for _, told in window:
                yield from (told[question.name] for question in questions)

    def _windows(
        self, shown: Iterable[Shown], questions: Sequence[Question], recall: Callable[[Shown, Question], Answer | None]
    ) -> Iterator[list[tuple[Shown, dict[str, Answer]]]]:
        """What is shown, with what is known of it, in parts that are answered together."""
        window: list[tuple[Shown, dict[str, Answer]]] = []
        tokens = unknown = 0
        by_name = {question.name: question for question in questions}
        for one in shown:
            known = {q.name: answer for q in questions if (answer := recall(one, q)) is not None}
            missing = sum(q.name not in known and _may_be_due(q, known, by_name) for q in questions)
            new = sum(row.n_tokens or 0 for row in one.rows) if missing else 0
            if window and (unknown >= WINDOW or (new and tokens + new > self._budget)):
                yield window
                window, tokens, unknown = [], 0, 0
            window.append((one, known))
            tokens, unknown = tokens + new, unknown + max(1, missing)
        if window:
            yield window

    def dtype_note(self) -> str | None:
        """What a user should know where the two halves compute in different dtypes; None where they do not."""
        from qvsplit.devices import dtype_name

        assert self.album.recipe is not None
        mine, theirs = dtype_name(self.language.dtype), self.album.recipe.compute_dtype
        if mine == theirs:
            return None
        return (
            f"the album was computed in {theirs}, answers are in {mine}: they are those of the two halves in these "
            f"dtypes, not of a whole model in one; --dtype {theirs} makes them so"
        )

    def _prepare(self, shown: Shown, question: Question) -> _Ready:
        assert self.album.recipe is not None
        if not shown.rows:
            raise UsageError("no picture to ask about")
        if not question.text.strip():
            raise UsageError("an empty question")
        prompter = self.language.prompter
        grids = []
        for row in shown.rows:
            if row.grid_thw is None:
                self.album.embeds(row)  # says why it has none
            assert row.grid_thw is not None
            grids.append(row.grid_thw)
        prompt = prompter.ask(
            question.text, grids, merge_size=self.album.recipe.merge_size, system=self.settings.system
        )  # fmt: skip
        spellings = [spelling for spelt in question.spelt.values() for spelling in spelt]
        tokens = [prompter.text_tokens(spelling) for spelling in spellings]
        if not all(tokens) or len(set(map(tuple, tokens))) < len(tokens):
            raise UsageError(
                f"{question.name}: to this model two of the allowed answers are the same, or one is nothing"
            )
        return _Ready(shown, question, prompt, tokens)

    def _batches(self, ready: Iterable[_Ready]) -> Iterator[list[_Ready]]:
        """Cut by the token budget; scored and generated questions are batches of their own, and keep their order.

        What counts: the tails, padded to the longest, room for the answers, and every prefix but the first, without
        which nothing could be asked at all.
        """
        batch: list[_Ready] = []
        prefixes: dict[Any, int] = {}
        longest = 0
        for one in ready:
            room = 0 if one.spelt else self.settings.max_new_tokens
            more = prefixes | {one.key: len(one.key[1])}
            longest = max(longest, one.tail_tokens)
            others = sum(more.values()) - next(iter(more.values()))
            cost = others + (len(batch) + 1) * (longest + room)
            if batch and (bool(batch[0].spelt) != bool(one.spelt) or cost > self._budget):
                yield batch
                batch, more, longest = [], {one.key: len(one.key[1])}, one.tail_tokens
            batch.append(one)
            prefixes = more
        if batch:
            yield batch

    def _run(
        self, batch: Sequence[_Ready], held: dict[Any, Prefix], on_text: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """One batch's answers; where memory does not suffice for all, in halves."""
        others = bool(held) or len(self._warm) > 0
        try:
            return self._run_whole(batch, held, on_text)
        except OutOfMemory:
            if len(batch) == 1 and not others:
                raise
        from qvsplit.devices import empty_cache

        held.clear()
        self._warm.clear()
        empty_cache()
        if len(batch) == 1:
            return self._run_whole(batch, held, on_text)
        middle = len(batch) // 2
        return [*self._run(batch[:middle], held), *self._run(batch[middle:], held)]

    def _run_whole(
        self, batch: Sequence[_Ready], held: dict[Any, Prefix], on_text: Callable[[str], None] | None
    ) -> list[Answer]:
        from qvsplit.language import Asked

        for one in batch:
            if one.key not in held:
                held[one.key] = self._prefix(one.shown, one.prompt)
        asked = [Asked(held[one.key], one.tail, self._seed(one)) for one in batch]
        if batch[0].spelt:
            scored = self.language.score(asked, [one.spelt for one in batch])
            return [self._scored(one, logs) for one, logs in zip(batch, scored, strict=True)]
        completions = self.language.generate(asked, self._decoding, on_text=on_text)
        return [
            replace(self._blank(one), text=done.text, tokens=done.tokens, finish_reason=done.finish_reason)
            for one, done in zip(batch, completions, strict=True)
        ]

    def _prefix(self, shown: Shown, prompt: Prompt) -> Prefix:
        """The KV prefix of what is shown: a warm one, one behind a shared beginning, or a new one."""
        from qvsplit.language import as_tensor

        key = (tuple(row.sha256 for row in shown.rows), tuple(prompt.input_ids[: prompt.prefix_tokens]))
        known = self._warm.get(key)
        if known is not None:
            return known
        after = None
        if 0 < shown.shared < len(shown.rows):
            first = Shown(shown.rows[: shown.shared])
            after = self._prefix(first, prompt.upto(shown.shared))
        new = shown.rows[shown.shared if after else 0 :]
        prefix = self.language.prefill(prompt, [as_tensor(self.album.embeds(row)) for row in new], after=after)
        self._warm.put(key, prefix)
        return prefix

    def _blank(self, one: _Ready) -> Answer:
        return Answer(
            rows=one.shown.rows, question=one.question.text, id=one.question.id, text="", tokens=[],
            prompt_tokens=len(one.prompt.input_ids), finish_reason="", tower_check=self.tower_check,
        )  # fmt: skip

    def _scored(self, one: _Ready, logs: Sequence[float]) -> Answer:
        spelt = iter(logs)
        logprobs = {
            answer: _log_sum([next(spelt) for _ in spellings]) for answer, spellings in one.question.spelt.items()
        }
        return judged(replace(self._blank(one), logprobs=logprobs, finish_reason="scored"), one.question)

    def _skipped(self, shown: Shown, question: Question) -> Answer:
        return Answer(
            rows=shown.rows, question=question.text, text="", tokens=[], prompt_tokens=0, finish_reason=SKIPPED,
            tower_check=self.tower_check, id=question.id,
        )  # fmt: skip

    def _seed(self, one: _Ready) -> int:
        told = [self.settings.seed, [(row.sha256 or b"").hex() for row in one.shown.rows], one.tail]
        return int.from_bytes(hashlib.sha256(json.dumps(told).encode()).digest()[:7])


def judged(answer: Answer, question: Question) -> Answer:
    """`answer` by its log-probabilities, under the threshold, flag and severity that `question` has now."""
    if answer.logprobs is None:
        return answer
    probabilities = normalised(answer.logprobs)
    found = outcome(question, probabilities)
    return replace(
        answer, text=found.answer, probabilities=probabilities, flagged=found.flagged,
        severity=question.severity if question.flag else None, id=question.id,
    )  # fmt: skip


class Recorder:
    """A survey's way into a table, and what of it the table knows already."""

    def __init__(self, table: Table, asker: Asker, questions: Sequence[Question]) -> None:
        from qvsplit.weights import canonical_json, language_fingerprint

        assert asker.album.recipe is not None
        self._table = table
        self._asker = asker
        self._recipe = hashlib.sha256(canonical_json(asker.album.recipe.to_json())).hexdigest()
        self._weights = language_fingerprint(asker.checkpoint)
        self._dtype = expected_dtype(asker.checkpoint, asker.settings)
        self._new: set[Key] = set()
        self._hashes = {question.name: prompt_hash(question, asker.settings) for question in questions}
        self.recalled = self.asked = 0

    def recall(self, shown: Shown, question: Question) -> Answer | None:
        """The answer that the table has for these very bytes, prompt, recipe and model, judged anew."""
        record = self._table.find(self._key(shown.rows, question.name))
        if record is None:
            return None
        answer = Answer(
            rows=shown.rows, question=question.text, id=question.id, text=record["answer"] or "",
            tokens=record["tokens"] or [], prompt_tokens=record["prompt_tokens"] or 0,
            finish_reason=record["finish_reason"], tower_check=record["tower_check"], logprobs=record["logprobs"],
            recalled=record["time"],
        )  # fmt: skip
        return judged(answer, question)

    def put(self, answer: Answer) -> None:
        """Into the table; again, for an answer that it has, says nothing new."""
        skipped = answer.finish_reason == SKIPPED
        key = self._key(answer.rows, answer.name)
        if answer.recalled is None and not skipped and key not in self._new:
            self._new.add(key)
            self.asked += 1
        self.recalled += answer.recalled is not None and key not in self._new
        self._table.put({
            "root": _joined([row.root for row in answer.rows]), "path": _joined([row.path for row in answer.rows]),
            "sha256": key.sha256, "id": answer.name, "question": answer.question,
            "answer": None if skipped else answer.text, "probability": answer.probability, "flagged": answer.flagged,
            "severity": answer.severity, "probabilities": _plain(answer.probabilities),
            "logprobs": _plain(answer.logprobs), "coverage": answer.coverage, "tokens": answer.tokens,
            "prompt_tokens": answer.prompt_tokens, "finish_reason": answer.finish_reason, "recipe": key.recipe,
            "prompt_hash": key.prompt_hash, "model": self._asker.model, "weights": key.weights, "dtype": key.dtype,
            "tower_check": answer.tower_check, "time": answer.recalled or _now(),
        })  # fmt: skip

    def drop_stale(self) -> None:
        """Drop what was answered about pictures that the album knows to be gone, or to be other bytes by now."""
        self._table.keep(lambda record: not self._is_stale(record))

    def _is_stale(self, record: Mapping[str, Any]) -> bool:
        hashes = record["sha256"].split("+")
        roots, paths = (_parts(record[name], len(hashes)) for name in ("root", "path"))
        for root, path, sha256 in zip(roots, paths, hashes, strict=False):
            row = self._asker.album.current(root, path)
            if row is not None and (row.status != "ok" or row.sha256 is None or row.sha256.hex() != sha256):
                return True
        return False

    def _key(self, rows: Sequence[Row], name: str) -> Key:
        hashes = "+".join((row.sha256 or b"").hex() for row in rows)
        return Key(hashes, self._hashes[name], self._recipe, self._weights, self._dtype)


def _joined(names: list[str]) -> str:
    """One name as it is, several as a JSON list."""
    return names[0] if len(names) == 1 else json.dumps(names, ensure_ascii=False)


def _parts(text: str, number: int) -> list[str]:
    """The inverse of `_joined` for `number` names."""
    if number == 1:
        return [text]
    try:
        return [str(name) for name in json.loads(text)]
    except (ValueError, TypeError):
        return []  # not ours: nothing is known of it


def _plain(told: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if told is None else dict(told)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def prompt_hash(question: Question, settings: Settings) -> str:
    """What decides an answer beside picture, recipe and model: the prompt, the allowed answers, the decoding."""
    told: dict[str, Any] = {"question": question.text, "system": settings.system}
    if question.answers is not None:
        told["answers"] = {answer: list(spellings) for answer, spellings in question.spelt.items()}
    else:
        told |= {"max_new_tokens": settings.max_new_tokens, "stop": list(settings.stop)}
        told["schema"] = json.dumps(settings.json_schema)  # in its own order, which is the answer's
    if question.answers is None and settings.sampled:
        told |= {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "seed")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _is_due(question: Question, told: Mapping[str, Answer]) -> bool:
    """Whether `only_if` holds, by what was told in the rounds before."""
    condition = question.only_if
    if condition is None:
        return True
    other = told[condition.id]
    if other.finish_reason == SKIPPED:
        return False
    return bool(other.flagged) if condition.answer is None else other.text == condition.answer


def _may_be_due(question: Question, known: Mapping[str, Answer], by_name: Mapping[str, Question]) -> bool:
    """Whether `only_if` holds, or hangs on what is not known yet."""
    if question.only_if is None:
        return True
    other = by_name[question.only_if.id]
    if other.name in known and _may_be_due(other, known, by_name):
        return _is_due(question, known)
    return other.name not in known and _may_be_due(other, known, by_name)


def _check_names(questions: Sequence[Question]) -> None:
    by_name: dict[str, Question] = {}
    for question in questions:
        if by_name.setdefault(question.name, question) != question:
            raise UsageError(f"two different questions have the name {question.name}; give one of them another id")


def _together(rows: Row | Sequence[Row]) -> tuple[Row, ...]:
    return (rows,) if isinstance(rows, Row) else tuple(rows)


def _question(question: str | Question) -> Question:
    return question if isinstance(question, Question) else Question(question)


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(log - top) for log in logs)) if math.isfinite(top) else top


def open_asker(album: Album, settings: Settings | None = None, *, loaded: bool = True) -> Asker:
    """Check that `album` belongs to the model, then load the model's language half, or, not `loaded`, when it is used.

    RecipeError if it does not, or if nothing shows that it does; ModelError if the model cannot be loaded.
    """
    settings = settings or Settings()
    _check_settings(settings)
    assert album.made is not None
    checkpoint = choose_checkpoint(settings.model, "language", own=album.made.model, revision=album.made.revision)
    evidence = check_tower(album, checkpoint, allow_unchecked=settings.unchecked_tower)
    asker = Asker(
        album, lambda: _load(checkpoint, settings), settings=settings, tower_check=evidence, checkpoint=checkpoint
    )
    if loaded:
        _ = asker.language
    return asker


def expected_dtype(checkpoint: Checkpoint, settings: Settings) -> str:
    """The dtype that answers will be computed in, by its name, without loading the model; or how it is quantised."""
    from qvsplit import devices
    from qvsplit.weights import stored_dtype

    if settings.dtype is not None:
        return settings.dtype
    if "quantization_config" in checkpoint.config:
        return f"quantised by {checkpoint.config['quantization_config'].get('quant_method', 'its own way')}"
    asked = None if settings.device == "auto" else settings.device
    return stored_dtype(checkpoint, "language") if devices.is_cuda(asked) else "float32"


def _check_settings(settings: Settings) -> None:
    """UsageError for numbers that mean nothing."""
    if settings.max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1")
    if settings.temperature is not None and not 0 < settings.temperature < math.inf:
        raise UsageError("--temperature must be above 0; leave it out for greedy answers")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise UsageError("--top-p must be above 0, and at most 1")
    if settings.top_k is not None and settings.top_k < 1:
        raise UsageError("--top-k must be at least 1")
    if any(not stop for stop in settings.stop):
        raise UsageError("--stop must not be empty")
    if settings.token_budget is not None and settings.token_budget < 1:
        raise UsageError("--token-budget must be at least 1")


def _load(checkpoint: Checkpoint, settings: Settings) -> Language:
    from qvsplit import devices, language
    from qvsplit.weights import stored_dtype

    spread = settings.device == "auto"
    device = devices.choose_device(None if spread else settings.device)
    dtype = None  # a quantised checkpoint's own
    if settings.dtype is not None:
        dtype = devices.choose_dtype(settings.dtype, device, "")
    elif "quantization_config" not in checkpoint.config:
        dtype = devices.choose_dtype(None, device, stored_dtype(checkpoint, "language"))
    return language.load(checkpoint, device=device, dtype=dtype, device_map="auto" if spread else None)


def select(album: Album, globs: Sequence[str] = (), *, only: int | None = None) -> list[Row]:
    """The rows that can be asked and that one of `globs` matches, by path or by file name; all without globs.

    UsageError if there are none, or another number than `only`.
    """
    rows = [row for row in album if not globs or any(_matches(row, pattern) for pattern in globs)]
    if only is not None and len(rows) != only:
        raise UsageError(f"{' '.join(globs)} matches {len(rows)} of the album's {len(album)} pictures, not {only}")
    if not rows and globs:
        raise UsageError(f"--image {' '.join(globs)} matches none of the album's {len(album)} pictures")
    if not rows:
        raise UsageError("the album holds no picture that can be asked; `qvsplit inspect` says what is in it")
    return rows


def _matches(row: Row, pattern: str) -> bool:
    return any(
        name == pattern or fnmatchcase(name, pattern)
        for name in (row.path, row.path.rsplit("/", 1)[-1], f"{row.root}/{row.path}")
    )


def check_tower(album: Album, checkpoint: Checkpoint, *, allow_unchecked: bool = False) -> str:
    """The evidence that `album` was made by the tower of `checkpoint`; RecipeError if there is none, or against it.

    `fingerprint`: computed from the tower at hand. `note`: from the note of a language-only checkpoint of ours.
    `revision`: the same name and commit on the hub. `unchecked`: none, and the user said that will do.
    """
    from qvsplit.weights import fingerprint, noted_fingerprint

    recipe, made = album.recipe, album.made
    assert recipe is not None
    assert made is not None
    _check_fit(album, checkpoint)
    noted = None
    if checkpoint.has("vision"):
        evidence, noted = "fingerprint", fingerprint(checkpoint)
    elif (noted := noted_fingerprint(checkpoint)) is not None:
        evidence = "note"
    elif checkpoint.revision is not None and (made.model, made.revision) == (checkpoint.name, checkpoint.revision):
        return "revision"
    elif allow_unchecked:
        return "unchecked"
    else:
        raise RecipeError(
            f"nothing shows that the album was made by the tower of {checkpoint.name}: it has none at hand; "
            "use a checkpoint with its tower, or take the responsibility with --unchecked-tower"
        )
    if noted != recipe.tower:
        raise RecipeError(
            f"the album was made by another tower (tower: {recipe.tower[:12]}…, and {checkpoint.name} has "
            f"{noted[:12]}…); ask with the model it was made with ({made.model}), or extract again"
        )
    return evidence


def _check_fit(album: Album, checkpoint: Checkpoint) -> None:
    """RecipeError where family, processor or widths alone show that album and checkpoint are strangers."""
    from qvsplit.families import settings_of

    recipe = album.recipe
    assert recipe is not None
    vision = settings_of(checkpoint.vision_config, checkpoint.family.vision_settings)
    processor = settings_of(checkpoint.processor_config, checkpoint.family.processor_settings)
    pairs = {f"processor.{name}": (recipe.processor.get(name), value) for name, value in processor.items()}
    pairs |= {
        "family": (recipe.family, checkpoint.family.model_type),
        "hidden_size": (album.hidden_size, vision["hidden_size"]),
        "merge_size": (recipe.merge_size, vision["spatial_merge_size"]),
    }
    wrong = [f"{name}: {mine}, not {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if wrong:
        raise RecipeError(
            f"the album does not fit {checkpoint.name} ({'; '.join(wrong)}); ask with the model it was made with"
        )
