"""Answers as batch tools have them: a JSON object a line, with a `custom_id`, in the form of OpenAI's batch output.

docs/tables.md is the contract. Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_ESCAPED = {"%": "%25", "#": "%23", "|": "%7C", "+": "%2B", "//": "/%2F"}
_FINISH_REASONS = {"scored": "stop"}  # a choice is an answer that ended by itself


def custom_id(record: Mapping[str, Any], *, with_run: bool = False) -> str:
    """Name an answer by its items and its question, and `with_run` by its run: no two of a table have one name.

    `ROOT//PATH|ID`, of a part of a video `ROOT//PATH#PART|ID`, of several items `ROOT//PATH+ROOT//PATH|ID`. In names
    `%`, `#`, `|`, `+` and two slashes in a row are percent-encoded.
    """
    items = record["items"] if record["items"] is not None else [record]
    parts = ["+".join(map(_item, items)), _escaped(record["id"]), *([_escaped(record["run"])] if with_run else [])]
    return "|".join(parts)


def batch_line(record: Mapping[str, Any], *, with_run: bool = False) -> dict[str, Any]:
    """Give a record as a line of a batch's output: a chat completion, or the error why there is none."""
    name = custom_id(record, with_run=with_run)
    number = hashlib.sha256(custom_id(record, with_run=True).encode()).hexdigest()[:24]
    line: dict[str, Any] = {"id": f"batch_req_{number}", "custom_id": name}
    if record["answer"] is None:
        skipped = "its only_if did not hold" if record["finish_reason"] == "skipped" else "no answer"
        return line | {
            "response": None,
            "error": {"code": record["finish_reason"], "message": record["error"] or skipped},
        }
    message = {"role": "assistant", "content": record["answer"]}
    if record["reasoning"]:
        message["reasoning_content"] = record["reasoning"]
    reason = _FINISH_REASONS.get(record["finish_reason"], record["finish_reason"])
    prompt, completion = record["prompt_tokens"] or 0, len(record["tokens"] or ())
    body = {
        "id": f"chatcmpl-{number}", "object": "chat.completion", "model": record["model"],
        "created": int(datetime.fromisoformat(record["time"]).timestamp()),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }  # fmt: skip
    return line | {"response": {"status_code": 200, "request_id": f"req_{number}", "body": body}, "error": None}


def _item(item: Mapping[str, Any]) -> str:
    part = f"#{item['part']}" if item["part"] or item["start"] is not None else ""
    return f"{_escaped(item['root'])}//{_escaped(item['path'])}{part}"


def _escaped(name: str) -> str:
    """Encode what separates names, so that the last two slashes of an item are those behind its root."""
    for text, encoded in _ESCAPED.items():
        name = name.replace(text, encoded)
    return name
