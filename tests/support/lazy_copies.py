"""A device for Copies that is this machine's memory, and that copies as late as a GPU may: when somebody waits for it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class LazyEvent:
    """A point behind some copies."""

    port: LazyPort
    number: int  # of the copies before it

    def synchronize(self) -> None:
        """Wait for them: copy."""
        self.port.done_up_to(self.number)


@dataclass
class LazyPort:
    """Stands in for a CUDA device.

    Attributes:
        heard: What happened, in order: `pinned N`, `copy N`, `computed`, …
        room: Bytes that one `empty` may ask for.
    """

    heard: list[str] = field(default_factory=list)
    room: int = 1 << 40

    def __post_init__(self):
        self._copies: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._targets: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def use(self):
        self.heard.append("use")

    def pinned(self, size):
        self.heard.append(f"pinned {size}")
        return torch.full((size,), 0xAA, dtype=torch.uint8)

    def empty(self, size):
        if size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.full((size,), 0x55, dtype=torch.uint8)

    @contextmanager
    def copying(self):
        yield

    def copy(self, target, source):
        self.heard.append(f"copy {source.numel() * source.element_size()}")
        with self._lock:
            self._copies.append((target, source))
            self._targets.append(target)

    def copied(self):
        return LazyEvent(self, len(self._copies))

    def computed(self):
        self.heard.append("computed")
        return LazyEvent(self, 0)

    def compute_after(self, event, uses):
        """Compute with `uses`, the memory that was sent: else a GPU's allocator may give it away meanwhile."""
        with self._lock:
            sent = any(uses is target for target in self._targets[: event.number])
        assert sent, "what is computed with is not the sent memory"
        self.heard.append(f"compute after {event.number}")
        event.synchronize()

    def copy_after(self, event):
        self.heard.append("copy after computed")

    def done_up_to(self, number: int) -> None:
        """Copy what was begun before that."""
        with self._lock:
            for place, pair in enumerate(self._copies[:number]):
                if pair is not None:
                    pair[0].copy_(pair[1])
                    self._copies[place] = None
