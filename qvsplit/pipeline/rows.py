"""One result to rows: what is known of an item, and what the encoder gave for each of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from qvsplit.models.sampling import MORE_TOKENS
from qvsplit.pipeline.items import Result
from qvsplit.pipeline.parts import Part
from qvsplit.store.features import Features
from qvsplit.store.row import CUT_OFF, CUT_OFF_BUT_WHOLE, Row, placeholder_json


def row_of(result: Result, generation: int) -> Row:
    """Give what is known of an item, without its outcome."""
    entry, info, video = result.entry, result.info, result.video
    return Row(
        root=entry.root,
        path=entry.path,
        generation=generation,
        sha256=None if info is None else info.sha256,
        size=max(entry.size, 0) if info is None else info.size,
        mtime_ns=entry.mtime_ns if info is None else info.mtime_ns,
        version=None if info is None else info.version,  # not read: tried again
        status="failed",
        kind="image" if info is None else info.kind,
        width=result.width,
        height=result.height,
        duration=None if video is None else video.duration,
        taken_at=result.taken_at,
        media=_media(result),
    )


def encoded_rows(result: Result, parts: list[Part], generation: int) -> Iterator[tuple[Row, Features]]:
    """Give the rows of an item that was encoded, by part, with their features.

    The parts are taken out of the list, so that nobody else holds them: they may be large.
    """
    parts.reverse()
    while parts:
        part = parts.pop()
        yield _encoded_row(result, part, generation), part.features


def _encoded_row(result: Result, part: Part, generation: int) -> Row:
    features, clip = part.features, part.clip
    row = replace(
        row_of(result, generation),
        status="ok",
        grid_thw=features.grid_thw,
        n_tokens=features.n_tokens,
        placeholder=placeholder_json(features.placeholder),
        inputs=json.dumps(features.inputs, sort_keys=True),
        media=_media(result, part),
        has_features=True,
    )
    if clip is None:
        return replace(row, warnings=unseen(result))
    return replace(row, part=clip.part, start=clip.start, end=clip.end, warnings="; ".join(_flags(part)) or None)


def unseen(result: Result) -> str | None:
    """Say what of an image was not looked at: other frames, and what its file has no more."""
    return "; ".join(filter(None, [_cut_off(result), _unseen_frames(result)])) or None


def _cut_off(result: Result) -> str | None:
    """Say that an image's file ends too early, and what of its picture is missing."""
    if result.cut_rows is None:
        return None
    if not result.cut_rows:
        return CUT_OFF_BUT_WHOLE
    return f"{CUT_OFF}, and with them a part of the last {result.cut_rows:,} rows of its pixels"


def _unseen_frames(result: Result) -> str | None:
    """Say that an image has more frames or pages than the first, which alone is looked at."""
    frames = 1 if result.info is None else result.info.frames
    if frames is None:
        return "only the first frame was looked at, and how many there are cannot be told"
    return f"only the first of {frames:,} frames was looked at" if frames > 1 else None


def _flags(part: Part) -> list[str]:
    """Give what is odd about a clip."""
    assert part.clip is not None
    most = (part.features.config.videos or {}).get("max_tokens")
    flags = list(part.clip.flags)
    return [*flags, MORE_TOKENS] if most and part.features.n_tokens > most else flags


def _media(result: Result, part: Part | None = None) -> str | None:
    """Give what is known of an item, and of one part of it, beyond the columns, as JSON."""
    media: dict[str, object] = {} if result.format is None else {"format": result.format}
    if result.video is not None:
        about = ("container", "codec", "stream", "rotation", "pixel_aspect", "n_frames", "fps")
        media |= {name: getattr(result.video, name) for name in about}
    if part is not None and part.features.shapes:
        media["shapes"] = {name: list(shape) for name, shape in part.features.shapes.items()}
    if part is not None and part.clip is not None:
        media["frames_indices"] = list(part.clip.indices)
        media["flags"] = _flags(part)
    return json.dumps(media) if media else None
