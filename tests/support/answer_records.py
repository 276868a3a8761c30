"""Records of answer tables for tests: as a recorder makes them, without a model."""

from __future__ import annotations

from typing import Any

from qvsplit.output.table import COLUMNS

SHA = "ab" * 32


def answer(path: str, name: str = "caption", text: str | None = "A dog.", at: int = 0, **more: Any) -> dict[str, Any]:
    """A record; `at` seconds after the hour."""
    blank = dict.fromkeys(COLUMNS) | {
        "root": "/r", "path": path, "kind": "image", "part": 0, "sha256": SHA, "run": "one", "id": name,
        "question": f"{name}?", "answer": text, "finish_reason": "stop", "tokens": [1, 2], "prompt_tokens": 40,
        "config": "c", "prompt_hash": "p", "model": "demo", "weights": "w", "dtype": "float32", "encoder_check": "note",
        "time": f"2026-01-01T00:00:{at:02}.000000Z", "asked": f"2026-01-01T00:00:{at:02}.000000Z",
    }  # fmt: skip
    return blank | more


def check(path: str, name: str = "dog", verdict: str | None = "pass", **more: Any) -> dict[str, Any]:
    """A record of a check with a flag."""
    yes = 0.9 if verdict in ("info", "warn", "block", "uncertain") else 0.2
    choices = [{"choice": "yes", "form": "Yes.", "probability": yes, "logprob": -0.1},
               {"choice": "no", "form": "No.", "probability": 1 - yes, "logprob": -2.0}]  # fmt: skip
    flagged = {"pass": False, "uncertain": None}.get(str(verdict), True)
    text = "unsure" if verdict == "uncertain" else "yes" if yes > 0.5 else "no"
    scored = {"finish_reason": "scored", "verdict": verdict, "flagged": flagged, "choices": choices, "score": yes,
              "choice_probability": max(yes, 1 - yes), "tokens": []}  # fmt: skip
    return answer(path, name, text, **(scored | more))


def failed(path: str, name: str = "dog", **more: Any) -> dict[str, Any]:
    """A record of a question that could not be answered."""
    return answer(path, name, None, finish_reason="error", error="no memory", verdict="error", tokens=[], **more)


def skipped(path: str, name: str = "dog", **more: Any) -> dict[str, Any]:
    """A record of a question whose `only_if` did not hold."""
    return answer(path, name, None, finish_reason="skipped", tokens=[], **more)
