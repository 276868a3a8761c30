"""The row: what is stored of one part of one item, but for the features themselves. The contract is docs/format.md.

Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from qvsplit.errors import ERROR_KINDS
from qvsplit.store.config import ExtractionConfig

STATUSES = ("ok", "failed", "deleted")
KINDS = ("image", "video")
MAX_JSON_BYTES = 64 * 1024  # of `inputs`, and of `media`
MAX_RUNS = 1 << 16  # in one placeholder
INPUT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")

Key = tuple[str, str]  # root and path: what names an item in a store
Content = tuple[str, int]  # sha256 and part: what names features
Runs = tuple[tuple[str, int], ...]  # a placeholder: each text, and how many times it stands there in a row
PART_MARK = "#"  # between an item's path and the number of a part, in a row's name

# Of `warnings`: what of an image was looked at though its file ends too early
CUT_OFF = "its last bytes are missing"
CUT_OFF_BUT_WHOLE = f"{CUT_OFF}, but none of its pixels"

_ESCAPED = re.compile(r"//x[89a-f][0-9a-f]")
_HASH = re.compile(r"[0-9a-f]{64}")
_ROUNDING = 1e-9  # of a time, relatively: much less than a frame


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a store.

        row = store["coffee.png"]
        print(row.path, row.status, row.n_tokens)

    See docs/format.md for each column.
    """

    root: str
    path: str
    sha256: str | None
    size: int
    status: str
    part: int = 0
    start: float | None = None
    end: float | None = None
    generation: int = 0
    mtime_ns: int | None = None
    version: str | None = None
    kind: str = "image"
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    taken_at: str | None = None
    error: str | None = None
    error_kind: str | None = None
    warnings: str | None = None
    grid_thw: tuple[int, int, int] | None = None
    n_tokens: int | None = None
    placeholder: str | None = None
    inputs: str | None = None
    media: str | None = None
    has_features: bool = False

    @property
    def key(self) -> Key:
        """What names the item within a store."""
        return self.root, self.path

    @property
    def name(self) -> str:
        """What names the row within its root: the path, and behind it the part's number, `clip.mp4#2`, if it is one."""
        return f"{self.path}{PART_MARK}{self.part}" if self.is_part else self.path

    @property
    def is_part(self) -> bool:
        """Whether the row is of some seconds of a video that was cut into parts, be it into a single one."""
        return self.start is not None

    @property
    def is_last(self) -> bool:
        """Whether no part of the same item comes behind this one: it is the whole item, or ends where that ends."""
        if self.end is None or self.duration is None:
            return not self.is_part
        return self.end >= self.duration * (1 - _ROUNDING)

    @property
    def folder(self) -> Key:
        """The folder that the item lies in: its root, and its path below that."""
        return self.root, self.path.rpartition("/")[0]

    @property
    def content(self) -> Content | None:
        """What names the features; None where the file could not be read."""
        return None if self.sha256 is None else (self.sha256, self.part)

    @property
    def unseen(self) -> Mapping[str, str]:
        """Say what of an image was not looked at: `frames` or pages but for one, what was `cut_off` → in words."""
        texts = self.warnings.split("; ") if self.kind == "image" and self.warnings else []
        return {
            "cut_off" if text.startswith(CUT_OFF) else "frames": text for text in texts if text != CUT_OFF_BUT_WHOLE
        }

    @property
    def placeholder_runs(self) -> Runs:
        """The text that stands for this item in a prompt, as runs. ValueError for what no writer writes."""
        return parse_placeholder(self.placeholder or "[]")

    @property
    def inputs_by_name(self) -> Mapping[str, Any]:
        """Other small inputs of the language model: name → dtype, shape, values. ValueError as for a placeholder."""
        inputs = _json_object(self.inputs, "inputs")
        if not all(map(_is_input, inputs.values())):
            raise ValueError("has inputs that are no tensors")
        return inputs

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensors' names → their shapes in the encoder's output, where these are not [n_tokens, width]. ValueError."""
        shapes = _json_object(self.media, "media").get("shapes", {})
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            raise ValueError("has shapes that are none")
        return {name: tuple(shape) for name, shape in shapes.items()}


ROW_FIELDS = tuple(one.name for one in fields(Row))


def item_row(rows: Sequence[Row]) -> Row:
    """Give the row that stands for an item of these rows: one that failed, if any did, else the first part.

    So an item is counted once, and has failed if any of its parts has.
    """
    return min(rows, key=lambda row: (row.status != "failed", row.part))


def is_whole(rows: Sequence[Row]) -> bool:
    """Say whether these are all parts of one item, in order: from 0 on, without a gap, and to the end of its file."""
    return bool(rows) and [row.part for row in rows] == list(range(len(rows))) and rows[-1].is_last


def deleted_row(row: Row, generation: int) -> Row:
    """Give the row that says that the file of `row` no longer exists; of several parts each gets one."""
    return replace(row, generation=generation, status="deleted", error=None, error_kind=None, has_features=False)


def placeholder_json(runs: Sequence[tuple[str, int]]) -> str:
    """Give a placeholder as its column holds it."""
    return json.dumps([list(run) for run in runs], ensure_ascii=False, separators=(",", ":"))


def parse_placeholder(text: str) -> Runs:
    """Invert `placeholder_json`. ValueError for what it does not write."""
    runs = _json(text, "placeholder")
    sound = isinstance(runs, list) and len(runs) <= MAX_RUNS and all(map(_is_run, runs))
    if not sound:
        raise ValueError("has a placeholder that is no list of runs")
    return tuple((run[0], run[1]) for run in runs)


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"has {name} that are no JSON") from None


def _is_run(run: Any) -> bool:
    return (
        isinstance(run, list)
        and len(run) == 2
        and isinstance(run[0], str)
        and bool(run[0])
        and isinstance(run[1], int)
        and not isinstance(run[1], bool)
        and 1 <= run[1] < 1 << 31
    )


def _json_object(text: str | None, name: str) -> Mapping[str, Any]:
    content = _json(text, name) if text is not None else {}
    if not isinstance(content, dict):
        raise ValueError(f"has {name} that are no JSON object")
    return content


def _is_input(value: Any) -> bool:
    if (
        not isinstance(value, dict)
        or value.keys() != {"dtype", "shape", "values"}
        or value["dtype"] not in INPUT_DTYPES
    ):
        return False
    values, shape = value["values"], value["shape"]
    sound = isinstance(values, list) and all(isinstance(one, int | float) and not abs(one) >= 1 << 63 for one in values)
    return sound and (shape == [] or _is_shape(shape)) and math.prod(shape) == len(values)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(side) is int and 1 <= side < 1 << 31 for side in shape)


def unknown_value(row: Row) -> str | None:
    """Say which value of the row this version does not know, if any: a newer version's, not damage."""
    for name, value, known in (
        ("status", row.status, STATUSES),
        ("kind", row.kind, KINDS),
        ("error_kind", row.error_kind, ERROR_KINDS),
    ):
        if isinstance(value, str) and value not in known:
            return f"{name} {value!r}"
    return None


def row_error(row: Row, config: ExtractionConfig) -> str | None:
    """Say why no writer writes such a row; None if it is sound."""
    if wrong := _name_error(row) or _number_error(row) or _part_error(row):
        return wrong
    if row.sha256 is not None and not _HASH.fullmatch(row.sha256):
        return "has a hash that is none"
    if _is_too_long(row.inputs) or _is_too_long(row.media):
        return "has more inputs or media than any writer puts there"
    if row.status == "ok":
        if row.sha256 is None or row.n_tokens is None or row.placeholder is None:
            return "is ok, but lacks hash, token count or placeholder"
        return grid_error(row, config)
    return f"is {row.status}, yet claims features" if row.has_features else None


def _is_too_long(text: str | None) -> bool:
    return text is not None and 4 * len(text) > MAX_JSON_BYTES and len(text.encode()) > MAX_JSON_BYTES


def _name_error(row: Row) -> str | None:
    path, root = row.path, row.root
    if not path or root is None or row.size is None or row.has_features is None or row.status is None:
        return "lacks root, path, size, status or has_features"
    if "//" in path:
        path = _ESCAPED.sub("?", path)
    if "//" in root:
        root = _ESCAPED.sub("?", root)
    if path[0] == "/" or "//" in path or "\0" in path or (".." in path and ".." in path.split("/")):
        return "has a path that leads out of its root"
    if "\0" in root or "//" in root:
        return "has a root that no folder can have"
    return None


def _number_error(row: Row) -> str | None:
    if row.part is None or row.generation is None or row.part < 0 or row.generation < 0 or row.kind is None:
        return "has no part, generation or kind that can be"
    if row.grid_thw is not None and (len(row.grid_thw) != 3 or None in row.grid_thw):
        return "has a grid with a gap"
    if row.n_tokens is not None and row.n_tokens < 0:
        return "has a negative number of tokens"
    return None


def _part_error(row: Row) -> str | None:
    """Say what cannot be of part and seconds."""
    if row.kind != "video":
        timed = row.part or row.start is not None or row.end is not None or row.duration is not None
        return "is no video, and has a part or seconds" if timed else None
    if row.duration is not None and not 0 <= row.duration < math.inf:
        return "has a duration that none can be"
    if row.start is None or row.end is None:
        whole = row.part == 0 and row.start is None and row.end is None
        return None if whole else "has a part without its seconds"
    if not 0 <= row.start < row.end < math.inf:
        return "has a part that does not begin before it ends"
    if row.duration is None or row.end > row.duration * (1 + _ROUNDING):
        return "has a part that ends behind the end of the video"
    if (row.part == 0) != (row.start == 0):
        return f"has part {row.part} beginning at {row.start:g} s"
    return None


def grid_error(row: Row, config: ExtractionConfig) -> str | None:
    """Say why grid and tokens of an `ok` row do not belong together; None if they do."""
    if row.grid_thw is None:
        return "is ok, but lacks a grid" if config.has_pixel_limits else None
    t, h, w = row.grid_thw
    merge = config.merge_size_of(row.kind)
    if min(t, h, w) < 1 or h % merge or w % merge:
        return f"has the grid {t}×{h}×{w}, which {merge}×{merge} patches a token do not divide"
    made = t * h * w // config.patches_a_token(row.kind)
    if row.n_tokens != made:
        return f"has {row.n_tokens} tokens, and its grid {t}×{h}×{w} makes {made}"
    return None
