"""What `inspect` says of a model to people: from `inspecting.describe_model`, one screen. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qvsplit.errors import escaped, printable, size
from qvsplit.output.text import plural

_LEFT = 16  # columns of the first
_UNKNOWN = "–"


def model_lines(model: Mapping[str, Any]) -> list[str]:
    """Give the lines that describe a model."""
    lines = [f"{name:{_LEFT}}{printable(text)}".rstrip() for name, text in _facts(model)]
    return [*lines, "", *_memory_lines(model["memory"]), "", *_image_lines(model)]


def _facts(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    listed = "" if model["listed"] else ", split by a dry run"
    yield "model", escaped(model["model"]) + (f"@{model['revision']}" if model["revision"] else "")
    if (half := model["half_of"]) is not None:
        which = "vision encoder" if half["half"] == "encoder" else "language model"
        yield "half", f"the {which} alone, of {escaped(str(half['model']))}"
    yield "family", f"{model['family']}, {model['class']} of transformers{listed}"
    if model["quantised"] is not None:
        yield "quantised", f"by {model['quantised']}"
    yield from _half("vision encoder", model["encoder"])
    yield from _refused("extract", model["encoder"], model["model"])
    yield from _half("language model", model["language_model"])
    yield from _refused("ask", model["language_model"], model["model"])
    for module, rest in model["not_loaded"].items():
        yield "not loaded", f"{escaped(module)}: {_stored(rest)}"
    if model["width"] is not None:
        tensors = f"{model['tensors_a_token']} × " if model["tensors_a_token"] > 1 else ""
        yield "an image token", f"{tensors}{model['width']:,} values"
    if (cache := model["kv_cache_bytes"]) is not None:
        float32, bfloat16 = (size(cache[dtype]) for dtype in ("float32", "bfloat16"))
        yield "KV cache", f"{float32} a token in float32, {bfloat16} in bfloat16"
    if (limits := model["pixel_limits"]) is not None:
        yield "images", f"resized to {limits[0]:,} to {limits[1]:,} pixels by default (`max_pixels`)"


def _half(name: str, half: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    stored = f"{_stored(half)}" if half["tensors"] else "no weights on this disk"
    yield name, f"{half['parameters']:,} parameters, {stored}"
    if half["bytes"] is not None and len(half["dtypes"]) > 1:
        yield "", ", ".join(f"{size(number)} of {dtype}" for dtype, number in half["dtypes"].items())
    if absent := len(half["absent_files"]):
        files = len(half["files"])
        which = "its files are" if absent == files else f"{absent:,} of its {files:,} files are"
        yield "", f"{which} not on this disk"


def _refused(command: str, half: Mapping[str, Any], model: str) -> Iterator[tuple[str, str]]:
    """Say that a command refuses a half, and why; not what to do, which that command says."""
    if half["refused"] is not None:
        reason = half["refused"].partition(";")[0].removeprefix(model).removeprefix(":").strip()
        yield "", f"refused by `{command}`: {reason}"


def _stored(part: Mapping[str, Any]) -> str:
    """Say how many tensors there are, and how many bytes."""
    tensors = plural(part["tensors"], "tensor")
    if part["bytes"] is None:
        return f"{tensors} of unknown size"
    return f"{tensors}, {size(part['bytes'])}" + (
        f" of {next(iter(part['dtypes']))}" if len(part["dtypes"]) == 1 else ""
    )


# -------------------------------------------------------------------------------------------------------- tables


def _memory_lines(memory: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give the table of memory; weights as they are stored have a row of their own where no other is the same."""
    *computed, stored = memory
    alike = [row for row in computed if all(row[name] == stored[name] for name in row if name != "dtype")]
    rows = [(f"  {row['dtype']}{' *' if row in alike else ''}", row) for row in computed]
    rows += [] if alike else [(f"  {stored['dtype']}", stored)]
    table = [["", "encoder", "language", "extract", "ask", "extract", "ask"]]
    table += [[name, *(_amount(row[column]) for column in _MEMORY)] for name, row in rows]
    heads = [("memory", 1), ("weights", 2), ("on a CPU", 2), ("on a GPU", 2)]
    notes = ["  * as the checkpoint has it"] if alike else []
    if any(_UNKNOWN in row for row in table):
        notes.append(f"  {_UNKNOWN} not computed so, or not known")
    return [*_table(heads, table), *notes]


_MEMORY = ("encoder", "language_model", "extract", "ask", "extract_on_gpu", "ask_on_gpu")


def _image_lines(model: Mapping[str, Any]) -> list[str]:
    """Give the table of what photographs make."""
    if model["images_unknown"] is not None:
        return [f"{'images':{_LEFT}}tokens are not known: {printable(model['images_unknown'])}"]
    table = [["", "tokens", "float32", "bfloat16", "float32", "bfloat16", "int8"]]
    for image in model["images"]:
        features, stored = image["features"] or {}, image["stored"] or {}
        sizes = [features.get("float32"), features.get("bfloat16"), *(stored.get(dtype) for dtype in table[0][4:])]
        megapixels = f"  {plural(image['megapixels'], 'megapixel')}"
        table.append([megapixels, f"{image['tokens']:,}", *map(_amount, sizes)])
    return _table([("an image of", 1), ("", 1), ("before compression", 2), ("in a store, about", 3)], table)


def _amount(number: int | None) -> str:
    return _UNKNOWN if number is None else size(number)


def _table(heads: Sequence[tuple[str, int]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Give a table as lines: the first column to the left, the others to the right, each head over some columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = max(widths[0], _LEFT - 2)
    first, over = "", 0
    for text, columns in heads:
        width = sum(widths[over : over + columns]) + 2 * (columns - 1)
        first += f"{text:<{width}}  " if over == 0 else f"{text:>{width}}  "
        over += columns
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(wide) for cell, wide in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return [first.rstrip(), *(line.rstrip() for line in lines)]
