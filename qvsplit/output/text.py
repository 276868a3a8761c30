"""Text for people: one line on stderr, and the lines that say what a run did, would do, or what a store holds.

Takes plain mappings, as the commands print them in JSON; gives lines without line ends. Nothing that a file, a
model or another program wrote reaches the terminal unescaped (`errors.printable`; names of files: `errors.escaped`).
Standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qvsplit.errors import escaped, printable, size
from qvsplit.runtime.streams import shows_escape_codes

_SUMMARY_COUNTS = {
    "new": "new", "modified": "modified", "re_encoded": "re-encoded", "copied": "copied", "moved": "moved",
    "metadata_changed": "metadata changed", "unchanged": "unchanged", "failed": "failed",
    "failed_again": "failed again", "failed_before": "failed before", "disappeared": "disappeared",
    "deleted": "deleted", "remaining": "remaining",
}  # fmt: skip
_RUN_COUNTS = ("encoded", "copied", "moved", "metadata_changed", "failed", "failed_again", "deleted", "remaining")


def say(line: str) -> None:
    """Print one line to stderr, headed by the program's name."""
    print(f"qvsplit: {printable(line)}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON object on a line of stdout: JSON is UTF-8, so where stdout has another encoding, as ASCII.

    As ASCII also where a file's name has bytes that are not UTF-8: each is half a surrogate pair, as Python has them.
    """
    line = json.dumps(value, ensure_ascii=sys.stdout.encoding.lower() != "utf-8")
    print(line if _is_text(line) else json.dumps(value), flush=True)


def _is_text(line: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in line)


def print_path(file: str, *, nul: bool) -> None:
    """Print the path of a file, as `file_of` gives it: escaped on a line, or with `nul` its very bytes and a NUL."""
    if not nul:
        print(escaped(file), flush=True)
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(file.encode("utf-8", "surrogateescape") + b"\0")
    sys.stdout.buffer.flush()


def plural(number: int, singular: str, many: str = "") -> str:
    """Give `1 item`, `2 items`, `1,000 items`."""
    return f"{number:,} {singular if number == 1 else many or singular + 's'}"


def counted_items(images: int, videos: int, clips: int) -> str:
    """Give `3 images and 12 clips of 2 videos`; what is zero is left out, and clips where each is a whole video."""
    parts = [plural(images, "image")] if images or not videos else []
    if videos:
        of_videos = plural(videos, "video")
        parts.append(of_videos if clips == videos else f"{plural(clips, 'clip')} of {of_videos}")
    return " and ".join(parts)


def counted(counts: Mapping[str, int]) -> str:
    """Give `2 new, 1 failed` from name → number; what is zero is left out."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)


def bold(text: str) -> str:
    """Give `text` in bold where stdout shows it."""
    return f"\033[1m{text}\033[0m" if shows_escape_codes(sys.stdout) else text


def duration(seconds: float) -> str:
    """Give a time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# -------------------------------------------------------------------------------------------------------- extract


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Give the lines that say what a run of `extract` did, from `Summary.to_json()`."""
    what = counted({name: summary[key] for key, name in _SUMMARY_COUNTS.items()})
    nothing = f"0 of {summary['to_read']:,} done" if summary["interrupted"] else "nothing to do"
    lines = [f"{what or nothing} in {summary['seconds']:.1f} s; {escaped(summary['store'])}"]
    if summary["videos"]:
        clips = f", {plural(summary['clips'], 'clip')}" if summary["clips"] != summary["videos"] else ""
        are = "is a video" if summary["videos"] == 1 else "are videos"
        videos = f"{summary['videos']:,} of the {summary['encoded']:,} encoded {are}"
        lines.append(f"{videos}: {duration(summary['video_seconds'])} of video{clips}")
    if number := summary["cut_off"]:
        files = (
            "1 image lacks pixels, as its file is"
            if number == 1
            else f"{number:,} images lack pixels, as their files are"
        )
        lines.append(
            f"{files} cut off; `warnings` in {'its row' if number == 1 else 'their rows'} says how much is missing"
        )
    if summary["encoded"]:
        lines.append(
            f"{plural(summary['tokens'], 'token')}, {size(summary['bytes'])} written; "
            f"read {size(summary['weights_bytes_read'])} of weights, peak memory {size(summary['peak_memory_bytes'])}"
        )
    if summary["stopped"]:
        lines.append(f"stopped by `{summary['stopped'].replace('-', '_')}`; run the same command again to continue")
    if summary["not_found"]:
        files = plural(summary["not_found"], "item of the store was", "items of the store were")
        lines.append(f"{files} not found; `prune=True` marks {_them(summary['not_found'])} as deleted")
    return [*lines, *_left_out_lines(summary)]


def _left_out_lines(summary: Mapping[str, Any]) -> list[str]:
    """Give the lines that say what a walk has left out; none where it left out nothing."""
    lines = []
    if summary["left_out"]:
        kinds = ", ".join(f"{number:,} {escaped(suffix)}" for suffix, number in summary["left_out"].items())
        lines.append(f"left out: {kinds}, which nothing here reads")
    excluded = [
        plural(summary[f"excluded_{what}s"], what) for what in ("file", "folder") if summary[f"excluded_{what}s"]
    ]
    if excluded:
        lines.append(f"excluded: {' and '.join(excluded)}")
    if number := summary["excluded"]:
        items = plural(number, "item of the store is", "items of the store are")
        lines.append(
            f"{items} excluded now, and left as {'it is' if number == 1 else 'they are'}; "
            f"`qvsplit purge` takes {_them(number)} out"
        )
    return lines


def preview_lines(summary: Mapping[str, Any]) -> list[str]:
    """Give the lines that say what a run of `extract` would do, from `Summary.to_json()` with its preview."""
    known = f"{summary['unchanged']:,} are known and unchanged"
    if summary["failed_before"]:
        known += f", {summary['failed_before']:,} failed before and are unchanged"
    lines = [f"{summary['to_read']:,} of {plural(summary['found'], 'item')} would be read, {known}"]
    if summary["not_found"]:
        lines.append(plural(summary["not_found"], "item of the store was", "items of the store were") + " not found")
    lines += _left_out_lines(summary)
    preview = summary["preview"]
    if not preview or not preview["items"]:
        return lines
    if preview["tokens"] is None:
        return [*lines, "tokens, bytes and time unknown: the model's processor, which counts them, is not there"]
    parts = [plural(preview["tokens"], "token")]
    parts += [f"about {size(preview['bytes'])} on disk"] if preview["bytes"] is not None else []
    if preview["seconds"] is None:
        parts.append("time unknown: this store has had no run on such a machine yet")
    else:
        by = "by earlier runs" if preview["seconds_by"] == "earlier runs" else "a rough estimate by arithmetic"
        parts.append(f"about {duration(preview['seconds'])} ({by})")
    lines.append(f"at most {', '.join(parts)}; copies and moved items cost almost nothing")
    if preview["bad"]:
        lines.append(f"{preview['bad']:,} of them would fail: the header cannot be read")
    return lines


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


# -------------------------------------------------------------------------------------------------------- inspect


def description_lines(description: Mapping[str, Any]) -> list[str]:
    """Give the lines that describe a store, from `verify.describe`."""
    lines = [f"{name:11} {printable(text)}" for name, text in _facts(description).items()]
    for root, tally in description["roots"].items():
        lines.append(f"{'root':11} {escaped(root)}: {counted(tally)}")
    if description["superseded"]:
        lines.append(f"{'old rows':11} {description['superseded']:,}; `qvsplit compact` drops them")
    for name in description["quarantined"]:
        lines.append(f"{'quarantined':11} {escaped(name)}, a damaged shard; it may be deleted")
    if description["rebuilding"]:
        lines.append(f"{'rebuild':11} started and not finished; run `qvsplit extract` with `rebuild=True` again")
    lines += [f"{'run':11} {_run_line(run)}" for run in description["runs"]]
    for kind, number in description["warnings"].items():
        lines.append(f"{'warnings':11} {plural(number, 'row')}: {printable(kind)}")
    for failure in description["failures"]:
        name = failure["path"] if len(description["roots"]) == 1 else f"{failure['root']}/{failure['path']}"
        lines.append(f"{'failed':11} {escaped(name)} {printable(failure['error'] or '')}")
    return lines


def _facts(description: Mapping[str, Any]) -> dict[str, str]:
    config, tensors = description["config"], description["tensors"]
    widths = f"{len(tensors)} × {description['width']}" if len(tensors) > 1 else description["width"]
    named = f" ({', '.join(tensors)})" if len(tensors) > 1 else ""
    share = description["bytes"] / description["raw_bytes"] if description["raw_bytes"] else 0
    items = counted_items(description["images"], description["videos"], description["clips"])
    if description["videos"]:
        items += f" ({duration(description['video_seconds'])} of video)"
    items += f" ok ({description['copies']:,} by the features of another)"
    rest = f"{description['failed']:,} failed, {description['deleted']:,} deleted"
    if description["without_features"]:
        rest += f", {description['without_features']:,} without features"
    return {
        "items": f"{items}, {rest}",
        "tokens": f"{description['tokens']:,}, each {widths} values in {config['storage_dtype']}{named}",
        "size": f"{size(description['bytes'])} in {plural(description['shards'], 'shard')}, "
        f"{share:.3f} of the uncompressed features",
        "model": description["model"] + (f"@{description['revision']}" if description["revision"] else ""),
        **({"adapter": description["adapter"]} if description.get("adapter") else {}),
        "encoder": config["encoder"],
        "computed": f"in {config['compute_dtype']} on {description['device']}, stored as {config['storage_dtype']}",
        "kernels": f"{description['kernels']}, of images resized on the {description['prepared_on']}",
        "pixels": _pixels(config["processor"]),
        **_videos(config.get("videos")),
        "versions": ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
    }


def _pixels(processor: Mapping[str, Any]) -> str:
    limits = [processor[name] for name in ("min_pixels", "max_pixels") if isinstance(processor.get(name), int)]
    return " to ".join(f"{limit:,}" for limit in limits) or "as the model's processor resizes them"


def _videos(videos: Mapping[str, Any] | None) -> dict[str, str]:
    """Say how videos were looked at; nothing where there were none."""
    if not videos:
        return {}
    number, rate = videos.get("num_frames"), videos.get("fps")
    parts = [f"{number} frames a clip" if number else f"{rate:g} frames a second, at most {videos.get('max_frames'):,}"]
    if videos.get("max_tokens"):
        parts.append(f"at most {videos['max_tokens']:,} tokens a clip")
    if videos.get("clip_seconds"):
        parts.append(f"a clip every {videos['clip_seconds']:g} s")
    return {"videos": ", ".join(parts) + f"; read by PyAV {videos.get('av')}"}


def _run_line(run: Mapping[str, Any]) -> str:
    """Give one run of the store's history, a file that anybody may have edited."""
    counts = {name.replace("_", " "): run[name] for name in _RUN_COUNTS if isinstance(run.get(name), int)}
    ending = f"; {run['error']}" if "error" in run else "; interrupted" if run.get("interrupted") else ""
    what = ", ".join(f"{number:,} {name}" for name, number in counts.items()) or "nothing encoded"
    return printable(f"{run.get('began')}: {what} in {run.get('seconds', 0)} s{ending}")


# ---------------------------------------------------------------------------------------------------------- split


def split_lines(done: Mapping[str, Any]) -> Iterable[str]:
    """Say what `split` wrote, from `Split`."""
    for name, half in (("vision encoder", done["encoder"]), ("language model", done["language_model"])):
        if half is not None:
            tensors = plural(half["tensors"], "tensor")
            yield f"{name}: {tensors}, {size(half['bytes'])} in {escaped(half['folder'])}"
    if done["left_out"]:
        modules = [f"{escaped(name)} ({plural(number, 'tensor')})" for name, number in done["left_out"].items()]
        yield f"left out, as neither half has it: {', '.join(modules)}"
    if done["language_model"] is not None and done["fingerprint"] is None:
        yield (
            "no vision encoder is at hand, so none is noted: `ask` takes stores with this language model only with "
            "`unchecked_encoder=True`"
        )


# ---------------------------------------------------------------------------------------------- compact and purge


def compacted_line(done: Mapping[str, Any], place: str) -> str:
    """Say what `compact` did to the store at `place`."""
    return (
        f"{done['shards_before']:,} → {plural(done['shards_after'], 'shard')}, {size(done['bytes_before'])} → "
        f"{size(done['bytes_after'])}, {plural(done['rows_dropped'], 'old row')} dropped; {escaped(place)}"
    )


def foretold_line(plan: Mapping[str, Any]) -> str:
    """Say what a rewrite of shards would do, from `Foretold`."""
    shards = plural(plan["shards"], "shard")
    if not plan["shards_rewritten"]:
        return f"nothing to do: {shards}, {size(plan['bytes'])}"
    features = plural(plan["features_dropped"], "image or clip", "images and clips")
    return (
        f"would rewrite {plan['shards_rewritten']:,} of {shards}, {size(plan['bytes_rewritten'])} of "
        f"{size(plan['bytes'])}: {plural(plan['rows_kept'], 'row')} kept, {plan['rows_dropped']:,} dropped, with the "
        f"features of {features}"
    )


def foretold_purge_lines(plan: Mapping[str, Any], items: Sequence[str]) -> Iterable[str]:
    """Say what `purge` would do, from `ForetoldPurge` and the files of its items."""
    for item in items:
        yield f"would purge {escaped(item)}"
    yield f"{plural(len(items), 'item')} would be purged"
    yield foretold_line(plan)
    yield from _purge_warnings(plan, foretold=True)


def purged_lines(done: Mapping[str, Any], place: str) -> Iterable[str]:
    """Say what `purge` did to the store at `place`: first what happened, then what a user should know of it."""
    items, before, after = plural(done["purged"], "item"), size(done["bytes_before"]), size(done["bytes_after"])
    yield f"{items} purged; {before} → {after}; {escaped(place)}"
    yield from _purge_warnings(done)


def _purge_warnings(done: Mapping[str, Any], *, foretold: bool = False) -> Iterable[str]:
    """Say what a user should know of a purge that was done, or is `foretold`."""
    if done["shared"]:
        yield f"{done['shared']:,} of them: features kept, because other items of the store have the same bytes"
    if done["still_there"]:
        yield f"{done['still_there']:,} of them: the file still exists, and the next extract would encode it again"
    if done["removed_rebuild"]:
        yield f"an unfinished rebuild, which may have held them, {'would be' if foretold else 'was'} removed"
    if number := done["removed_quarantined"]:
        were = "would be" if foretold else "was" if number == 1 else "were"
        yield f"{plural(number, 'quarantined shard')}, which may have held them, {were} removed"
