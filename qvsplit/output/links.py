"""A folder of symbolic links to files, kept in step: those that are wanted, and no others of ours.

A link is ours if the manifest names it and it still points to where the manifest says. The manifest names a link before
it is made, and until after it has been removed, so that a run that is killed leaves none behind that the next would not
know. Everything else in the folder is its user's, and is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvsplit.errors import StoreDamaged, StoreInUse, UsageError
from qvsplit.runtime.atomic_files import disk_errors, sync_folder, written_whole
from qvsplit.runtime.names import is_within
from qvsplit.sources.exclusions import IGNORE_FILE

MANIFEST = ".qvsplitlinks"
# `extract` follows links, and would find each file twice
_IGNORE_ALL = b"# links that `qvsplit find --link-to` made\n*\n"
_FORMAT = 1


@dataclass(frozen=True)
class Linked:
    """What was done.

    Attributes:
        made: How many links are new, or point elsewhere than before.
        removed: How many were removed.
        kept: How many were right as they were.
        missing: The files that do not exist, and so have no link.
    """

    made: int
    removed: int
    kept: int
    missing: Sequence[str]


def link_files(files: Iterable[str], folder: Path, *, relative: bool = False) -> Linked:
    """Have `folder` hold a link to each of `files`, absolute paths, and no other link that was made here before.

    A link has the name of its file; of several files of one name the later ones have a part of a hash of the path in
    it. A link keeps its name for as long as it is there.

    Args:
        files: As the file system has them.
        folder: Made if it does not exist.
        relative: Have the links say where a file is from the folder, not from the root of the file system.

    Raises:
        UsageError: The folder cannot be made, or has files in it and none of them is a manifest.
        StoreInUse: Another run is at work in it.
        StoreDamaged: The manifest cannot be read.
        DiskError: Links cannot be made there.
    """
    if not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is not a folder, and cannot be made one; name a folder for the links")
    here = os.path.realpath(folder)
    wanted = sorted(file for file in set(files) if not is_within(os.path.realpath(os.path.dirname(file)), here))
    there = [file for file in wanted if os.path.exists(file)]
    with disk_errors(folder, "links that were made are kept"):
        folder.mkdir(exist_ok=True)
        with _locked(folder):
            ours = _ours(folder)
            targets = _named(there, ours, folder, relative=relative)
            missing = sorted(set(wanted) - set(there))
            return _kept_in_step(folder, ours, targets, missing)


def _kept_in_step(folder: Path, ours: Mapping[str, str], targets: Mapping[str, str], missing: Sequence[str]) -> Linked:
    """Remove, make and record links: `ours` are there, `targets` are wanted; name to target."""
    stale = [name for name, target in ours.items() if targets.get(name) != target]
    new = {name: target for name, target in targets.items() if ours.get(name) != target}
    if stale or new or not (folder / MANIFEST).exists():
        with suppress(FileExistsError), open(folder / IGNORE_FILE, "xb") as stream:
            stream.write(_IGNORE_ALL)
        # a name may have an old and a new target: until both are settled the manifest has both
        _write_manifest(folder, [*ours.items(), *new.items()])
        for name in stale:
            os.unlink(folder / name)
        for name, target in new.items():
            os.symlink(target, folder / name)
        sync_folder(folder)
        _write_manifest(folder, targets.items())
    return Linked(len(new), sum(name not in targets for name in stale), len(targets) - len(new), missing)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for as long as the block runs; the lock ends with the process and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise
            raise StoreInUse(f"another run is linking to {folder}; wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _ours(folder: Path) -> dict[str, str]:
    """Give the links that are ours and there: name to target."""
    file = folder / MANIFEST
    for name in os.listdir(folder):
        if name.startswith(f".{MANIFEST}."):  # half a manifest of a run that was killed
            os.unlink(folder / name)
    try:
        manifest = json.loads(file.read_bytes())
        links = [(_checked_name(name), str(target)) for name, target in manifest["links"]]
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}")
    except FileNotFoundError:
        _refuse_other_files(folder)
        return {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreDamaged(
            f"{file} is damaged ({type(error).__name__}: {error}); remove it and the links of the folder, and run again"
        ) from None
    return {name: target for name, target in links if _target(folder / name) == target}


def _refuse_other_files(folder: Path) -> None:
    """UsageError where a folder that was never linked to has files: its user may have meant another."""
    others = sorted(set(os.listdir(folder)) - {IGNORE_FILE})
    if others:
        raise UsageError(f"{folder} has files that qvsplit did not make ({others[0]}); name a new or an empty folder")


def _checked_name(name: Any) -> str:
    """ValueError unless it names something in the folder itself: what the manifest names may be removed."""
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"the name {name!r}")
    return name


def _target(link: Path) -> str | None:
    """Give where a link points to; None for what is no link, or not there."""
    try:
        return os.readlink(link)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        return None


def _write_manifest(folder: Path, links: Iterable[tuple[str, str]]) -> None:
    lines = ",\n".join(json.dumps(link) for link in sorted(set(links)))
    with written_whole(folder / MANIFEST) as stream:
        stream.write(f'{{"format": {_FORMAT}, "links": [\n{lines}\n]}}\n'.encode())


# ----------------------------------------------------------------------------------------------------------- names


def _named(files: Sequence[str], ours: Mapping[str, str], folder: Path, *, relative: bool) -> dict[str, str]:
    """Give each file the name of its link: the one that it has, else one that no other has."""
    start = os.path.realpath(folder)

    def target_of(file: str) -> str:
        return os.path.relpath(file, start) if relative else file

    present = {target: name for name, target in ours.items()}
    named = {present[target_of(file)]: target_of(file) for file in files if target_of(file) in present}
    taken = {_key(name) for name in named}
    taken |= {_key(name) for name in os.listdir(folder) if name not in ours}  # a user's files keep their names
    for file in files:
        if target_of(file) not in present:
            name = next(name for name in _names(file) if _key(name) not in taken)
            taken.add(_key(name))
            named[name] = target_of(file)
    return named


def _names(file: str) -> Iterator[str]:
    """Give names for the link to a file: its own, then with more and more of a hash of its path."""
    name = os.path.basename(file)
    yield name
    stem, suffix = os.path.splitext(name)
    digest = hashlib.sha256(os.fsencode(file)).hexdigest()
    room = 255 - len(os.fsencode(suffix)) - len(digest) - 1  # bytes that the name of a file may have
    stem = os.fsdecode(os.fsencode(stem)[:room])
    for length in (6, 12, len(digest)):
        yield f"{stem}.{digest[:length]}{suffix}"


def _key(name: str) -> str:
    """Give what two names have in common that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()
