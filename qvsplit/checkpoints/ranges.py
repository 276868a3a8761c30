"""Fetch the vision encoder's bytes from the hub, and no others: the headers of its files first, then ranges of them.

What was fetched is kept as a small checkpoint in qvsplit's cache, `checkpoints/OWNER--NAME/COMMIT/encoder`, which is a
model folder like any other. Only encoders are fetched so: of a file that holds one, most bytes are the language
model's, but of all files together a language model is over nine tenths from 7 B parameters on.

The ranges are of one commit and, by the server's ETag, of one file. A hash of a whole file cannot be checked by some of
its bytes: what is relied on is TLS, that commit, and that the server gives the bytes that it says it gives.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvsplit.checkpoints.cache import cache_folder
from qvsplit.checkpoints.files import NOTE_FILE, SINGLE_FILE, read_json, small_files
from qvsplit.checkpoints.tensors import MAX_HEADER_BYTES, TensorPlace, parse_header, read_header
from qvsplit.checkpoints.writing import header_of, write_json, write_small_files, writing_order
from qvsplit.errors import ModelError, QvsplitWarning, size, some_of
from qvsplit.runtime.atomic_files import disk_errors, sync_folder

GUESS_BYTES = 128 << 10  # of a file's beginning, asked for first: most headers are shorter
SYNC_BYTES = 64 << 20  # the most that a power cut loses
WORTH_IT = 0.9  # of the bytes of the files that would else be fetched
RETRIES = 5  # after a connection that broke off, without a byte more
FIRST_WAIT, LONGEST_WAIT = 1.0, 8.0  # seconds, as huggingface_hub waits
_PROGRESS_FILE = "fetched.json"
_TRIED_AGAIN = (408, 429, 500, 502, 503, 504)  # statuses of a server that is busy
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_KEPT = "what has been fetched is kept"


class RangesWarning(QvsplitWarning):
    """Whole files are fetched, as ranges of them cannot be."""


class RangesNotServed(Exception):
    """The server does not serve ranges, or not those that it was asked for; the message says what it did."""


class _Changed(RangesNotServed):
    """A file is not the one that it was when it was asked for before."""


class _BrokenOff(Exception):
    """The connection ended before the bytes that were asked for."""


@dataclass(frozen=True)
class RemoteFile:
    """A safetensors file on the hub, as its header says. Its tensors' places are in a file of its bare name."""

    name: str
    size: int
    etag: str
    places: Mapping[str, TensorPlace] = field(repr=False)


def ranges_are_wanted() -> bool:
    """Say whether the user has left it on: `QVSPLIT_RANGES=0` is for mirrors that serve ranges wrongly."""
    return os.environ.get("QVSPLIT_RANGES", "").lower() not in {"0", "false", "no", "off"}


EncodersOf = Callable[[Mapping[str, str]], Mapping[str, str]]


def kept_encoder(name: str, commit: str, encoders_of: EncodersOf | None = None, *, small: Path) -> Path | None:
    """Give the folder of an encoder that was fetched before; None if there is none, or it is damaged or out of date.

    Args:
        name: The hub name, without a revision.
        commit: Its full hash.
        encoders_of: As for `fetch_encoder`; without it nobody asks whether its tensors are those of today's rules.
        small: The folder of the checkpoint's small files.
    """
    folder = _folder(name, commit)
    try:
        same = all((folder / path.name).stat().st_size == path.stat().st_size for path in small_files(small))
    except OSError:
        return None
    return folder if same and _has_tensors(name, commit, encoders_of) else None


def _has_tensors(name: str, commit: str, encoders_of: EncodersOf | None) -> bool:
    """Say whether the kept encoder has what would be fetched now: rules change, of families and in transformers."""
    folder = _folder(name, commit)
    try:
        note = read_json(folder / NOTE_FILE, optional=True)
        kept = read_header(folder / SINGLE_FILE)
    except ModelError:
        return False
    left_out = note.get("left_out")
    if not isinstance(left_out, list) or note != _note(name, commit, left_out):
        return False
    return encoders_of is None or kept.keys() == encoders_of(dict.fromkeys([*kept, *map(str, left_out)], "")).keys()


def fetch_encoder(
    name: str,
    commit: str,
    file_names: Iterable[str],
    encoders_of: EncodersOf,
    *,
    small: Path,
) -> Path | None:
    """Fetch an encoder's bytes; go on where another process ended, and wait for one that is at it.

    Args:
        name: The hub name, without a revision.
        commit: Its full hash.
        file_names: The safetensors files that hold the encoder.
        encoders_of: Gives the encoder's tensors with the file of each; is given that of all tensors in these files.
        small: The folder of the checkpoint's small files.

    Returns:
        The folder of the small checkpoint. None where whole files are to be fetched: ranges would save little; or they
        are not served, or a file has changed twice meanwhile, or the cache cannot be written, which is then warned of.

    Raises:
        ModelError: A file is damaged, or of another commit; or the connection broke off again and again.
        DiskError: The disk is full.
        Exception: Whatever huggingface_hub raises where the hub cannot be reached.
    """
    folder = _folder(name, commit)
    if not _can_be_written(folder.parent):
        _warn(name, f"{folder.parent} cannot be written")
        return None
    with _utilities().WeakFileLock(folder.with_name("encoder.lock")):
        if _has_tensors(name, commit, encoders_of):  # another process was quicker, or only small files are missing
            with _disk_errors(folder):
                write_small_files(folder, small_files(small), read_json(folder / NOTE_FILE))
            return folder
        unfinished = _Unfinished(folder.with_name("encoder.part"))
        for last_try in (False, True):
            try:
                return _fetched(_Hub(name, commit), unfinished, folder, list(file_names), encoders_of, small)
            except RangesNotServed as reason:
                unfinished.remove()
                if last_try or not isinstance(reason, _Changed):
                    _warn(name, reason)
                    return None
    raise AssertionError("one of the tries returns or raises")


def _can_be_written(folder: Path) -> bool:
    """Make a folder of the cache if need be, and say whether it can be written: what it is for works without it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _warn(name: str, reason: object) -> None:
    warnings.warn(
        f"{name}: its vision encoder cannot be fetched alone ({reason}): fetching the whole files that hold it",
        RangesWarning, stacklevel=3,
    )  # fmt: skip


def headers_on_hub(name: str, commit: str, file_names: Iterable[str], *, small: Path) -> dict[str, TensorPlace]:
    """Find where the tensors of safetensors files lie, from their headers: of whole files here, else the hub's.

    Args:
        name: The hub name, without a revision.
        commit: Its full hash.
        file_names: The files.
        small: The folder of the checkpoint's small files, and of the whole ones that are here.

    Returns:
        Places by tensors' names; without those of files whose header cannot, or shall not, be read alone.

    Raises:
        ModelError: A file is damaged.
        Exception: Whatever huggingface_hub raises where the hub cannot be reached.
    """
    from huggingface_hub import constants

    places: dict[str, TensorPlace] = {}
    for file_name in sorted(file_names):
        if (small / file_name).is_file():
            places |= read_header(small / file_name)
        elif ranges_are_wanted() and not constants.HF_HUB_OFFLINE:
            with suppress(RangesNotServed):
                places |= _Hub(name, commit).file(file_name).places
    return places


def _utilities() -> Any:
    """Give what huggingface_hub documents of its `utils`, and does not export to type checkers."""
    return importlib.import_module("huggingface_hub.utils")


def _folder(name: str, commit: str) -> Path:
    return cache_folder() / "checkpoints" / name.replace("/", "--") / commit / "encoder"


def _note(name: str, commit: str, left_out: Iterable[str]) -> dict[str, object]:
    return {"half": "encoder", "model": name, "revision": commit, "left_out": sorted(left_out)}


def _fetched(
    hub: _Hub,
    unfinished: _Unfinished,
    folder: Path,
    file_names: list[str],
    encoders_of: EncodersOf,
    small: Path,
) -> Path | None:
    files = {file_name: hub.file(file_name) for file_name in file_names}
    found = {tensor: file.name for file in files.values() for tensor in file.places}
    places = _places(hub, files, encoders_of(found))
    total = sum(place.size for place in places.values())
    if not places or total > WORTH_IT * sum(file.size for file in files.values()):
        return None
    header = header_of(places)
    done = unfinished.begin(header, {file.name: file.etag for file in files.values()}) - len(header)
    with _bar(hub.name, total, done) as bar, closing(hub.read(files, _runs(places, done), _KEPT)) as chunks, unfinished:
        for chunk in chunks:
            unfinished.append(chunk)
            bar.update(len(chunk))
    unfinished.finish(folder, small_files(small), _note(hub.name, hub.commit, found.keys() - places))
    return folder


def _places(hub: _Hub, files: Mapping[str, RemoteFile], encoders: Mapping[str, str]) -> dict[str, TensorPlace]:
    """Find the encoder's tensors, in the order in which they are to be written. ModelError if one is not there."""
    missing = [tensor for tensor, file_name in encoders.items() if tensor not in files[file_name].places]
    if missing:
        raise ModelError(f"{hub.name}: its files on the hub lack {some_of(missing)}, which its index says they hold")
    places = {tensor: files[file_name].places[tensor] for tensor, file_name in encoders.items()}
    return {tensor: places[tensor] for tensor in writing_order(places)}


def _runs(places: Mapping[str, TensorPlace], skipped: int) -> list[tuple[str, int, int]]:
    """Join tensors that lie one behind the other: file, first byte, bytes; without the first `skipped` bytes."""
    runs: list[tuple[str, int, int]] = []
    for place in places.values():
        skip = min(skipped, place.size)
        skipped -= skip
        start, count = place.start + skip, place.size - skip
        if runs and runs[-1][0] == place.file.name and runs[-1][1] + runs[-1][2] == start:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + count)
        elif count:
            runs.append((place.file.name, start, count))
    return runs


def _bar(name: str, total: int, done: int) -> Any:
    """Show progress as huggingface_hub does, where its environment and its callers want that."""
    return _utilities().tqdm(
        desc=f"vision encoder of {name}", total=total, initial=done, unit="B", unit_scale=True, disable=None,
        name="huggingface_hub.http_get",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- on the disk


def _disk_errors(folder: Path, kept: str = _KEPT) -> AbstractContextManager[None]:
    return disk_errors(
        folder, kept, elsewhere="set QVSPLIT_CACHE to another folder, or QVSPLIT_RANGES=0 to fetch whole files instead"
    )


class _Unfinished:
    """A small checkpoint that is being fetched: its file so far, and how much of that is surely on the disk.

    `with` it, bytes can be appended; however the block ends, what it has appended is synced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / SINGLE_FILE
        self._etags: Mapping[str, str] = {}
        self._done = self._synced = 0

    def begin(self, header: bytes, etags: Mapping[str, str]) -> int:
        """Give how many bytes are there, the header among them: as another process left them, if it fetched the same.

        What was not synced is cut off: after a power cut it may be zeros.
        """
        self._etags = etags
        with _disk_errors(self._folder, kept=""):
            self._done = self._synced = self._usable(header)
            if not self._done:
                self.remove()
                self._folder.mkdir(parents=True)
                with self:
                    self.append(header)
        return self._done

    def _usable(self, header: bytes) -> int:
        try:
            note = json.loads((self._folder / _PROGRESS_FILE).read_bytes())
            synced, same = note["synced"], note["etags"] == self._etags
            with self._file.open("rb") as stream:
                same = same and stream.read(len(header)) == header
            usable = same and len(header) <= synced <= self._file.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return int(synced) if usable else 0

    def __enter__(self) -> _Unfinished:
        with _disk_errors(self._folder):
            self._stream = self._file.open("r+b" if self._file.exists() else "w+b")
            self._stream.truncate(self._done)
            self._stream.seek(self._done)
        return self

    def __exit__(self, *_: object) -> None:
        with _disk_errors(self._folder), self._stream:
            self._sync()

    def append(self, chunk: bytes) -> None:
        """Write the next bytes. Raises DiskError."""
        with _disk_errors(self._folder):
            self._stream.write(chunk)
            self._done += len(chunk)
            if self._done - self._synced >= SYNC_BYTES:
                self._sync()

    def _sync(self) -> None:
        if self._done == self._synced:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        write_json(self._folder / _PROGRESS_FILE, {"etags": self._etags, "synced": self._done})
        self._synced = self._done

    def finish(self, folder: Path, small: Iterable[Path], note: Mapping[str, object]) -> None:
        """Have it appear as `folder`, in the place of a damaged one. ModelError if it is no whole safetensors file."""
        read_header(self._file)
        with _disk_errors(folder):
            write_small_files(self._folder, small, note)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(self._folder, folder)
            sync_folder(folder.parent)
            (folder / _PROGRESS_FILE).unlink()  # only now: without it everything would be fetched again

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- over the network


class _Hub:
    """One commit of one model on the hub."""

    def __init__(self, name: str, commit: str) -> None:
        self.name = name
        self.commit = commit

    def file(self, file_name: str) -> RemoteFile:
        """Read a file's header.

        Raises:
            ModelError: It is damaged.
            RangesNotServed: It cannot be read alone.
        """
        with self._asked(file_name, 0, GUESS_BYTES) as answer:
            file = RemoteFile(file_name, answer.whole_size, answer.etag, {})
            data = bytearray()
            with suppress(_BrokenOff):  # the rest is asked for below
                for chunk in answer.chunks():
                    data += chunk

        def read_to(end: int) -> None:
            for chunk in self.read({file_name: file}, [(file_name, len(data), end - len(data))]):
                data.extend(chunk)

        read_to(min(GUESS_BYTES, file.size))
        length = int.from_bytes(data[:8], "little")
        if file.size < 8 or length > min(MAX_HEADER_BYTES, file.size - 8):
            raise self._damaged(file_name, "its header is too large")
        read_to(8 + length)
        return replace(file, places=self._checked(file, bytes(data[: 8 + length])))

    def _checked(self, file: RemoteFile, header: bytes) -> dict[str, TensorPlace]:
        """Check a header as that of a local file is checked: of a file as long as the hub's, which has only holes."""
        with disk_errors("the folder for temporary files", kept="", elsewhere="name another folder in TMPDIR"):
            stream = tempfile.NamedTemporaryFile(prefix="qvsplit-", suffix=".safetensors")  # noqa: SIM115
            stream.write(header)
            stream.flush()
        with stream:
            try:
                stream.truncate(file.size)
            except (OSError, OverflowError):
                raise self._damaged(file.name, f"of {file.size} bytes, as the server says") from None
            try:
                places = parse_header(Path(stream.name))
            except ValueError as error:
                raise self._damaged(file.name, error) from None
        return {name: replace(place, file=Path(file.name), written=None) for name, place in places.items()}

    def _damaged(self, file_name: str, reason: object) -> ModelError:
        return ModelError(f"{self.name}: {file_name} is damaged on the hub ({reason}); name another model as `model`")

    def read(
        self, files: Mapping[str, RemoteFile], runs: Iterable[tuple[str, int, int]], kept: str = ""
    ) -> Generator[bytes]:
        """Read runs of bytes one after another; go on, after a wait, where a connection breaks off.

        Of what is `kept` then, an error speaks.

        Raises:
            RangesNotServed: Other bytes are sent than were asked for.
            ModelError: Connections break off without any more bytes.
        """
        for file_name, start, count in runs:
            end, broken = start + count, 0
            while start < end:
                before = start
                try:
                    with self._asked(file_name, start, end - start, files[file_name]) as answer:
                        for chunk in answer.chunks():
                            start += len(chunk)
                            yield chunk
                except _BrokenOff as error:
                    broken = 1 if start > before else broken + 1
                    if broken > RETRIES:
                        broke = f"{self.name} cannot be fetched from the hub: the connection breaks off ({error})"
                        raise ModelError("; ".join(filter(None, (broke, kept, "run again")))) from None
                    time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (broken - 1)))

    @contextmanager
    def _asked(self, file_name: str, start: int, count: int, file: RemoteFile | None = None) -> Iterator[_Answer]:
        """Ask for at most `count` bytes from `start`, of the same file as before, and look at the answer's headers.

        Where the server cannot be reached, or is busy, huggingface_hub waits and asks again.

        Raises:
            RangesNotServed: The answer is not what was asked for.
            _Changed: It is of another file.
        """
        from huggingface_hub import constants, hf_hub_url

        utilities = _utilities()
        wanted = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        with utilities.http_stream_backoff(
            "GET",
            hf_hub_url(self.name, file_name, revision=self.commit),
            headers=utilities.build_hf_headers() | wanted,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            base_wait_time=FIRST_WAIT,
            max_wait_time=LONGEST_WAIT,
            retry_on_status_codes=_TRIED_AGAIN,
        ) as response:
            _check_status(response, begun=file is not None)
            self._check_commit(response)
            answer = _Answer(response, start, count)
            if file is not None and (file.etag, file.size) != (answer.etag, answer.whole_size):
                raise _Changed(f"{file_name} has changed on the hub while it was fetched")
            yield answer

    def _check_commit(self, response: Any) -> None:
        """Refuse what the hub says to be of another commit: it would be kept as of this one."""
        from huggingface_hub import constants

        said = [one.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT) for one in (*response.history, response)]
        if other := next((commit for commit in said if commit not in (None, self.commit)), None):
            raise ModelError(
                f"{self.name}: the hub was asked for commit {self.commit} and sends {other}; run again later, or name "
                "another server in HF_ENDPOINT"
            )


def _check_status(response: Any, *, begun: bool) -> None:
    """Raise what huggingface_hub does of a status that is an error.

    Where nothing has been had of the file yet, a status that says nothing of the model is RangesNotServed: proxies
    refuse ranges in many ways, and if the file is refused as well, that is said when it is asked for whole.
    """
    from huggingface_hub import errors

    refused = f"the server answers {response.status_code} to a request for a range"
    if response.status_code == 416:
        raise RangesNotServed(refused)
    try:
        _utilities().hf_raise_for_status(response)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        raise
    except errors.HfHubHTTPError:
        if begun or response.status_code in _TRIED_AGAIN:
            raise
        raise RangesNotServed(refused) from None


class _Answer:
    """What a server says that it sends, checked against what it was asked for; then the bytes.

    Attributes:
        whole_size: Of the file, in bytes.
        etag: Of the file: that which the hub has it under, where another host sends it.
    """

    def __init__(self, response: Any, start: int, count: int) -> None:
        self._response = response
        headers = response.headers
        if response.status_code != 206:
            raise RangesNotServed(f"the server answers {response.status_code} to a request for a range")
        if headers.get("Accept-Ranges", "").lower() == "none":
            raise RangesNotServed("the server says Accept-Ranges: none")
        found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
        first, last, whole = map(int, found.groups()) if found else (-1, -1, 0)
        self._count = last + 1 - first
        if (first, last) != (start, min(start + count, whole) - 1) or self._count < 1:
            raise RangesNotServed("the server sends another range than that which it was asked for")
        if headers.get("Content-Length", str(self._count)) != str(self._count):
            raise RangesNotServed("the server sends a range of another length than it says")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise RangesNotServed("the server sends compressed ranges")
        self.whole_size = whole
        self.etag = _etag(response)

    def chunks(self) -> Iterator[bytes]:
        """Give the bytes as they come.

        Raises:
            _BrokenOff: The connection ends before the last of them.
            RangesNotServed: There are more than were announced.
        """
        left = self._count
        for chunk in self._raw():
            left -= len(chunk)
            if left < 0:
                raise RangesNotServed("the server sends more than it says")
            yield chunk
        if left:
            raise _BrokenOff(f"{size(left)} too early")

    def _raw(self) -> Iterator[bytes]:
        chunks = self._response.iter_raw()
        while True:
            try:
                chunk = next(chunks, None)
            except Exception as error:  # of httpx or httpx2, whichever this huggingface_hub uses
                raise _BrokenOff(str(error) or type(error).__name__) from error
            if chunk is None:
                return
            yield chunk


def _etag(response: Any) -> str:
    """Give the ETag under which the hub has a file; where it does not say, that of the host which sends it."""
    from huggingface_hub import constants

    linked = [one.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) for one in response.history]
    etag = next(filter(None, [*linked, response.headers.get("ETag")]), "")
    if not etag:
        raise RangesNotServed("the server sends no ETag")
    return str(etag).removeprefix("W/").strip('"')
