"""A survey's way into a table, and what of it the table has already. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvsplit.answering.checks import Question
from qvsplit.answering.options import AskOptions
from qvsplit.answering.requests import CANCELLED, ERROR, SKIPPED, PromptItems, judged
from qvsplit.output.answer import Answer
from qvsplit.output.levels import UNCERTAIN
from qvsplit.output.table import LISTS, Key, Record, Table, key_parts, now
from qvsplit.output.wide import newest_runs
from qvsplit.store.config import KERNELS
from qvsplit.store.row import Row

_OF_ONE = ("kind", "part", "start", "end")


@dataclass(frozen=True)
class Origin:
    """What decides answers beside items and prompts.

    Attributes:
        model: As it was named; for people.
        config: Hash of the store's extraction config, but for what it says of videos.
        video_config: Hash of all of it; for prompts with a video.
        weights: Fingerprint of the language model.
        dtype: What it computes in.
    """

    model: str
    config: str
    weights: str
    dtype: str
    video_config: str = ""


class Recorder:
    """Puts a survey's answers into a table, and recalls those that are there.

    Attributes:
        recalled: How many answers were known from before.
        asked: How many were new.
        failed: How many of the new ones have an error.
        runs: By question's name, the run of its answers.
    """

    def __init__(
        self,
        table: Table,
        origin: Origin,
        prompt_hashes: Mapping[str, str],
        current: Callable[[str, str], Row | None] = lambda root, path: None,
    ) -> None:
        """Take where answers come from.

        Args:
            table: Open.
            origin: What decides all of them.
            prompt_hashes: By question's name, what decides the answers to it.
            current: Gives the current row of a root and path; None where nothing is known of it.
        """
        self._table = table
        self._origin = origin
        self._hashes = prompt_hashes
        self._current = current
        self._new: set[Key] = set()
        self._failed: dict[tuple[str, str], Row] = {}  # by root and path, the items that could not be asked about
        self.runs = {name: _run(origin, decided) for name, decided in prompt_hashes.items()}
        newest = newest_runs(table)
        self._again = {run for name, run in self.runs.items() if newest.get(name) not in (run, None)}
        self._begun = now()
        self.recalled = self.asked = self.failed = 0

    def recall(self, items: PromptItems, question: Question) -> Answer | None:
        """Give the answer that the table has for these very bytes, prompt, config and model, judged anew."""
        record = self._table.find(self._key(items.rows, question.name))
        if record is None:
            return None
        answer = Answer(
            rows=items.rows, question=question.text, id=question.id, text=record["answer"] or "",
            tokens=record["tokens"] or [], prompt_tokens=record["prompt_tokens"] or 0,
            finish_reason=record["finish_reason"], encoder_check=record["encoder_check"] or "",
            recalled=record["time"], reasoning=record["reasoning"] or "", **_of_choices(record["choices"]),
        )  # fmt: skip
        return judged(answer, question)

    def put(self, answer: Answer) -> None:
        """Put an answer into the table; again, for one that it has, says nothing new."""
        if answer.finish_reason == CANCELLED:
            return
        key = self._key(answer.rows, answer.name)
        if answer.recalled is None and answer.finish_reason != SKIPPED and key not in self._new:
            self._new.add(key)
            self.asked += 1
            self.failed += answer.error is not None
        self.recalled += answer.recalled is not None and key not in self._new
        self._put(answer, key)

    def put_failed(self, row: Row, error: str, questions: Sequence[Question]) -> None:
        """Put into the table that none of `questions` could be asked about an item, and why."""
        self._failed[row.key] = row
        for question in questions:
            answer = Answer(
                rows=(row,), question=question.text, id=question.id, text="", tokens=[], prompt_tokens=0,
                finish_reason=ERROR, encoder_check="", error=error,
            )  # fmt: skip
            self._put(answer, self._key((row,), question.name))

    def _put(self, answer: Answer, key: Key) -> None:
        record = self._record(answer, key)
        self._table.put(record, again=record["run"] in self._again)

    def _record(self, answer: Answer, key: Key) -> dict[str, Any]:
        has_text = answer.finish_reason not in (SKIPPED, ERROR)
        return {
            "root": _joined([row.root for row in answer.rows]), "path": _joined([row.path for row in answer.rows]),
            **_items(answer.rows), "sha256": key.sha256, "run": self.runs[answer.name], "id": answer.name,
            "question": answer.question, "answer": answer.text if has_text else None,
            "reasoning": answer.reasoning or None, "verdict": answer.verdict, "score": answer.score,
            "choice": answer.choice, "choice_probability": answer.choice_probability,
            "choice_form": answer.choice_form, "choice_mass": answer.choice_mass, "flagged": answer.flagged,
            "level": answer.level, "choices": _choices(answer), "tokens": answer.tokens,
            "prompt_tokens": answer.prompt_tokens, "finish_reason": answer.finish_reason, "error": answer.error,
            "config": key.config, "prompt_hash": key.prompt_hash, "model": self._origin.model, "weights": key.weights,
            "dtype": key.dtype, "encoder_check": answer.encoder_check or None, "time": answer.recalled or now(),
            "asked": self._begun,
        }  # fmt: skip

    def drop_failed(self) -> None:
        """Drop answers about items that could not be asked about, of all their parts: the errors stand for them."""
        if self._failed:
            self._table.keep(lambda record: self._is_error_of_now(record) or not self._is_of_failed(record))

    def _is_of_failed(self, record: Record) -> bool:
        return any((root, path) in self._failed for root, path, _ in _items_of(record))

    def _is_error_of_now(self, record: Record) -> bool:
        row = self._failed.get((record["root"], record["path"]))
        if row is None or record["finish_reason"] != ERROR:
            return False
        return record["sha256"] == (row.sha256 or "") and (record["part"] or 0) == row.part

    def drop_stale(self) -> None:
        """Drop answers about items that are deleted, or have other bytes by now, and errors that are no more."""
        self._table.keep(lambda record: not self._is_stale(record))

    def _is_stale(self, record: Record) -> bool:
        if self._is_error_of_now(record):
            return False
        is_error = record["finish_reason"] == ERROR
        for root, path, content in _items_of(record):
            row = self._current(root, path)
            if row is None:
                if not content:
                    return True  # an error about a file that was not in the store, and is not missed any more
            elif (row.sha256 or "") != content or not (row.status == "ok" or (is_error and row.status == "failed")):
                return True
        return False

    def _key(self, rows: Sequence[Row], name: str) -> Key:
        origin = self._origin
        contents = "+".join(row.sha256 or "" for row in rows)
        config = origin.video_config if any(row.kind == "video" for row in rows) else origin.config
        parts = key_parts([row.part for row in rows])
        return Key(contents, self._hashes[name], config, origin.weights, origin.dtype, parts)


def prompt_hash(question: Question, options: AskOptions) -> str:
    """Hash what decides an answer beside items, config and model: prompt, choices, decoding, kernels."""
    digest_input: dict[str, Any] = {"question": question.text, "system": options.system}
    digest_input |= {"kernels": options.kernels} if options.kernels != KERNELS[0] else {}
    if question.choices is not None:
        digest_input["choices"] = {choice: list(forms) for choice, forms in question.forms.items()}
    else:
        digest_input |= {"max_new_tokens": options.max_new_tokens, "stop": list(options.stop)}
        digest_input["schema"] = json.dumps(options.json_schema)  # in its own order, which is the answer's
        digest_input |= {"thinking": True} if options.thinking else {}
    if question.choices is None and options.sampled:
        digest_input |= {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")}
    return hashlib.sha256(json.dumps(digest_input, sort_keys=True).encode()).hexdigest()


def _run(origin: Origin, prompt: str) -> str:
    """Name what the answers to one question have in common: language model, dtype, extraction config and prompt.

    Not what the config says of videos, so that the answers about images and videos of one store are of one run.
    """
    decided = [origin.weights, origin.dtype, origin.config, prompt]
    return hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:12]


def answer_of(record: Record) -> Answer:
    """Give the answer that a record of a table tells of; of its rows only what the table has."""
    contents = record["sha256"].split("+")
    items = record["items"] if record["items"] is not None else [record]
    rows = tuple(
        Row(item["root"], item["path"], content, 0, "ok", kind=item["kind"] or "image", part=item["part"] or 0,
            start=item["start"], end=item["end"])
        for item, content in zip(items, contents, strict=len(items) > 1)
    )  # fmt: skip
    probabilities = {one["choice"]: one["probability"] or 0.0 for one in record["choices"] or ()}
    return Answer(
        rows=rows, question=record["question"], id="" if record["id"] == record["question"] else record["id"],
        text=record["answer"] or "", tokens=record["tokens"] or [], prompt_tokens=record["prompt_tokens"] or 0,
        finish_reason=record["finish_reason"], encoder_check=record["encoder_check"] or "", level=record["level"],
        flagged=record["flagged"], uncertain=record["verdict"] == UNCERTAIN, score=record["score"],
        probabilities=probabilities or None, recalled=record["time"], error=record["error"],
        reasoning=record["reasoning"] or "", **_of_choices(record["choices"]),
    )  # fmt: skip


def _choices(answer: Answer) -> list[dict[str, Any]] | None:
    """Give each choice with its form and probability. What the model excludes has no log-probability: JSON has none."""
    if answer.logprobs is None:
        return None
    forms, probabilities = answer.forms or {}, answer.probabilities or {}
    return [
        {"choice": choice, "form": forms.get(choice), "probability": probabilities.get(choice),
         "logprob": logprob if math.isfinite(logprob) else None}
        for choice, logprob in answer.logprobs.items()
    ]  # fmt: skip


def _of_choices(choices: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Invert `_choices`, but for the probabilities, which follow from the rest."""
    if choices is None:
        return {}
    logprobs = {one["choice"]: -math.inf if one["logprob"] is None else one["logprob"] for one in choices}
    return {"logprobs": logprobs, "forms": {one["choice"]: one["form"] for one in choices if one["form"] is not None}}


def _items(rows: Sequence[Row]) -> dict[str, Any]:
    """Give what is known of one item, in columns of their own, or of several, as a list."""
    if len(rows) == 1:
        return {name: getattr(rows[0], name) for name in _OF_ONE} | {"items": None}
    return dict.fromkeys(_OF_ONE) | {"items": [{name: getattr(row, name) for name in LISTS["items"]} for row in rows]}


def _items_of(record: Record) -> Iterator[tuple[str, str, str]]:
    """Give root, path and content of each item; none where they cannot be told."""
    contents = record["sha256"].split("+")
    roots, paths = (_parts(record[name], len(contents)) for name in ("root", "path"))
    return zip(roots, paths, contents, strict=False)


def _joined(names: list[str]) -> str:
    """Give one name as it is, several as a JSON list."""
    return names[0] if len(names) == 1 else json.dumps(names, ensure_ascii=False)


def _parts(text: str, number: int) -> list[str]:
    """Invert `_joined` for `number` names."""
    if number == 1:
        return [text]
    try:
        return [str(name) for name in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []  # not ours: nothing is known of it
