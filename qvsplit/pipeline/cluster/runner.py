"""The cluster's runner: results come from a driver process, and the shards that it has had written are committed here.

This process alone holds the store's lock. What is not committed is nobody's: whatever dies, a shard is in the store
whole and once.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import IO, Any

from qvsplit.errors import DiskError, ProcessError
from qvsplit.pipeline.cluster import messages
from qvsplit.pipeline.items import Result, Staged
from qvsplit.runtime import interrupts
from qvsplit.runtime.atomic_files import remove_folder
from qvsplit.runtime.clock import active_seconds
from qvsplit.runtime.interrupts import held_back
from qvsplit.sources.source import Entry
from qvsplit.store.row import Row
from qvsplit.store.shards import ShardNumbers
from qvsplit.store.staging import Staging
from qvsplit.store.storage import Storage
from qvsplit.store.store_writer import Written

MESSAGES_AHEAD = 64  # that nobody has taken yet
ENTRIES_A_MESSAGE = 10_000
WAIT_SECONDS = 0.1  # after which signals are looked at
LAST_SECONDS = 90.0  # for the driver to finish what has left the encoders
END_SECONDS = 20.0  # for it to end
_CODE = "from qvsplit.pipeline.cluster.driver import main; main({descriptor}, {folder!r})"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Commits:
    """How what is written becomes a part of the store.

    Attributes:
        storage: The store, locked by this process.
        numbers: Gives each shard its number.
        on_commit: Hears the rows of each item of a shard that has become one of the store's.
        on_videos: Hears how videos were looked at, before the rows of one are counted.
    """

    storage: Storage
    numbers: ShardNumbers
    on_commit: Callable[[Iterable[Sequence[Row]]], None]
    on_videos: Callable[[Mapping[str, Any]], None]


class DriverProcess:
    """The process that has joined the cluster; a thread takes in what it says.

    Attributes:
        folder: For what a cluster that it starts writes; gone with it.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        try:
            with ExitStack() as undo:
                self._said: IO[bytes] = undo.enter_context(tempfile.TemporaryFile())
                self.folder = tempfile.mkdtemp(prefix="qvsplit-ray-")
                undo.callback(self._remove_folder)
                self._connection, its = Pipe()
                undo.callback(self._connection.close)
                with its:
                    self._process = self._started(its.fileno())
                self._stack = undo.pop_all()
        except OSError as error:
            raise ProcessError(f"a process to join the Ray cluster cannot be started ({error.strerror})") from None
        self._inbox: queue.Queue[messages.FromDriver | None] = queue.Queue(MESSAGES_AHEAD)
        self._thread = threading.Thread(target=self._listen, name="qvsplit-driver", daemon=True)
        self._thread.start()

    def _started(self, descriptor: int) -> subprocess.Popen[bytes]:
        """Start it in a session of its own: its signals are ours to pass on, and so are those of what it starts."""
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE.format(descriptor=descriptor, folder=self.folder)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )

    def _listen(self) -> None:
        """Take in what it says, and None once it is gone. In a thread."""
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            self._inbox.put(None)
        except Exception as error:  # what cannot be unpickled here
            self._inbox.put(messages.Failed(error))

    def send(self, message: messages.ToDriver) -> None:
        """Say something; a driver that is gone is met by `receive`."""
        with held_back(), suppress(OSError):
            self._connection.send(message)

    def receive(self) -> messages.FromDriver | None:
        """Give what it says next; None where it has said nothing for a moment.

        Raises:
            QvsplitError, RuntimeError: What has gone wrong there.
            ProcessError: It is gone.
        """
        try:
            message = self._inbox.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            return None
        if message is None:
            words = self._last_words()
            self._inbox.put(None)  # for whoever asks again
            raise ProcessError(
                f"the process that has joined the Ray cluster ended, as when its node or the head is lost ({words}); "
                "what was finished is kept: run again"
            )
        if isinstance(message, messages.Failed):
            if message.trace:
                message.error.add_note(message.trace)
            raise message.error
        return message

    def _last_words(self) -> str:
        code = self._ended(END_SECONDS)
        self._said.seek(0)
        lines = _COLOUR.sub("", self._said.read().decode(errors="replace")).split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return f"exit code {code}: {words[-1][:300]}" if words else f"exit code {code}"

    def end(self, *, at_once: bool = False) -> None:
        """End it, and all that it has started on this machine; `at_once` it is not asked."""
        if not at_once:
            self.send(messages.Finish())
        self._ended(0 if at_once else END_SECONDS)
        deadline = active_seconds() + END_SECONDS
        while self._thread.is_alive() and active_seconds() < deadline:  # until it has taken in the end
            self._drop()
        self._stack.close()

    def _remove_folder(self) -> None:
        with suppress(OSError):
            remove_folder(Path(self.folder))

    def _ended(self, seconds: float) -> int:
        """Wait so long for it to end by itself, then end it, with its session; give its exit code."""
        deadline = active_seconds() + seconds
        while self._process.poll() is None and active_seconds() < deadline:
            self._drop()  # it may be waiting for its words to be taken
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _drop(self) -> None:
        with suppress(queue.Empty):
            self._inbox.get(timeout=WAIT_SECONDS)


class ClusterRunner:
    """Runs entries on a cluster.

    Args:
        driver: Has joined it, and declared.
        staging: Where shards are written.
        commits: How they are committed.
        limit: Items that are begun; None: all.
        on_note: Hears remarks.

    Attributes:
        seconds: What was waited for, by stage.
        stopped: "limit" or "max-runtime" where that left entries.
        decoder_memory_bytes: Not known of other machines: 0.
        written: Shards that were committed.
    """

    def __init__(
        self,
        driver: DriverProcess,
        staging: Staging,
        commits: Commits,
        limit: int | None,
        on_note: Callable[[str], None],
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.stopped = ""
        self.decoder_memory_bytes = 0
        self.written = Written()
        self._driver = driver
        self._staging = staging
        self._commits = commits
        self._limit = limit
        self._on_note = on_note
        self._results: deque[Result] = deque()  # that were told of, and not given yet
        self._is_done = True

    def run(self, entries: Sequence[Entry]) -> Generator[Result, None, None]:
        """Give the result of each entry that is begun, as it is known."""
        begun = entries if self._limit is None else entries[: self._limit]
        self.stopped = "limit" if len(begun) < len(entries) else ""
        for start in range(0, len(begun), ENTRIES_A_MESSAGE):
            self._driver.send(messages.Entries(begun[start : start + ENTRIES_A_MESSAGE]))
        self._is_done = False
        self._driver.send(messages.Run())
        while not self._is_done:
            interrupts.check()
            self._take()
            while self._results:
                yield self._results.popleft()

    def finished(self) -> Iterator[Result]:
        """Give the results of what has left the encoders, and commit it; nothing else is begun."""
        self._driver.send(messages.Finish())
        deadline = active_seconds() + LAST_SECONDS
        try:
            while not self._is_done and active_seconds() < deadline:
                self._take()
        except Exception as error:  # what interrupted the run is what it ends with
            self._on_note(f"not all that had left the encoders is kept: {error}")
        if not self._is_done:
            self._on_note("not all that had left the encoders is kept: it could not be written in time")
        self._is_done = True
        while self._results:
            yield self._results.popleft()

    def close(self) -> None:
        """End everything. What has left the encoders is committed, unless that has gone wrong; the rest is given up."""
        if not self._is_done:
            deque(self.finished(), 0)
        self._driver.end()
        with suppress(DiskError):  # a writer that has not heard of the end: whoever locks the store next removes it
            self._staging.remove()

    def _take(self) -> None:
        """Take up what the driver says next."""
        with held_back():  # what was taken, and what is known of it
            try:
                self._take_up(self._driver.receive())
            except BaseException:
                self._is_done = True  # nothing more comes, or can be committed
                raise

    def _take_up(self, message: messages.FromDriver | None) -> None:
        if isinstance(message, messages.Described):
            for result in message.results:
                if isinstance(result.outcome, Staged) and result.outcome.videos is not None:
                    self._commits.on_videos(result.outcome.videos)
            self._results += message.results
        elif isinstance(message, messages.Shard):
            self._commit(message)
        elif isinstance(message, messages.Done):
            self._is_done = True
            self.stopped = self.stopped or message.stopped
            for stage, seconds in message.seconds.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def _commit(self, shard: messages.Shard) -> None:
        self._staging.commit(self._commits.storage, shard.name, self._commits.numbers.take())
        self.written.shards += 1
        self.written.bytes += shard.size
        self.written.rows += sum(map(len, shard.rows))
        self._commits.on_commit(shard.rows)
