"""Copies between this machine's memory and a GPU, beside what the GPU computes.

What a batch needs goes up while the one before is computed, and features come down while the next one is: through
pinned memory, which the GPU reads and writes by itself, on a stream of their own. No bit changes on the way. Pinned are
as many bytes as the largest batch has, and as the largest tensor of features, up to a limit: what is larger goes the
usual way, and so does everything where no memory can be pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qvsplit.models.preparing import Prepared
from qvsplit.runtime.devices import is_out_of_memory

if TYPE_CHECKING:
    import torch

ALIGNED = 256  # bytes at whose multiples tensors begin, as an allocation of their own would
MAX_PINNED = 1 << 28  # bytes each way; what is pinned, nobody else has
ToHost = Callable[["torch.Tensor"], "torch.Tensor"]


class CudaPort:
    """What copies need of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def use(self) -> None:
        """Make it the device of the calling thread."""
        self._cuda.set_device(self._device)

    def pinned(self, size: int) -> torch.Tensor:
        """Give so many bytes, uint8, that the device can read and write by itself."""
        import torch

        with self._cuda.device(self._device):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, size: int) -> torch.Tensor:
        """Give so many bytes of the device, uint8."""
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copying(self) -> AbstractContextManager[Any]:
        """Have what is begun inside go to the stream of copies."""
        stream: AbstractContextManager[Any] = self._cuda.stream(self._stream)
        return stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy between pinned memory and the device."""
        target.copy_(source, non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        """Give the point behind all copies that were begun."""
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def computed(self) -> torch.cuda.Event:
        """Give the point behind everything that the calling thread has the device compute."""
        event: torch.cuda.Event = self._cuda.current_stream(self._device).record_event()
        return event

    def compute_after(self, event: torch.cuda.Event, uses: torch.Tensor) -> None:
        """Have what the calling thread computes from now on wait for `event`; it reads the memory of `uses`."""
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(event)
        uses.record_stream(stream)

    def copy_after(self, event: torch.cuda.Event) -> None:
        """Have copies that are begun from now on wait for `event`."""
        self._stream.wait_event(event)


@dataclass(frozen=True)
class Sent:
    """A batch on its way to the device: what it is there, and when it is."""

    batch: Sequence[Prepared]
    memory: torch.Tensor
    there: torch.cuda.Event


class Copies:
    """Copies to and from one device. One thread sends, one computes, one receives."""

    def __init__(self, port: CudaPort) -> None:
        self.port = port
        self._up: torch.Tensor | None = None
        self._down: torch.Tensor | None = None
        self._sent: torch.cuda.Event | None = None  # until then the device may still read `_up`

    def send(self, batch: Sequence[Prepared]) -> Sent | None:
        """Begin to copy what was prepared to the device, all tensors in one.

        None for what is too large, or where the device has no room for it, or this machine none that can be pinned: the
        encoder takes it as it is.
        """
        places, size = _places(batch)
        if not 0 < size <= MAX_PINNED:
            return None
        try:
            with self.port.copying():
                memory = self.port.empty(size)
            if self._sent is not None:
                self._sent.synchronize()
            self._up = staging = self._at_least(self._up, size)
        except Exception as error:
            if is_out_of_memory(error):
                return None  # the encoder halves a batch that is too large
            raise
        for one, place in zip(batch, places, strict=True):
            for name, start in place.items():
                _as_in(staging, start, one.values[name]).copy_(one.values[name])
        with self.port.copying():
            self.port.copy(memory, staging[:size])
            self._sent = self.port.copied()
        there = [_in(memory, one, place) for one, place in zip(batch, places, strict=True)]
        return Sent(there, memory, self._sent)

    def arrived(self, sent: Sent) -> Sequence[Prepared]:
        """Give a batch that was sent, for the calling thread to compute with: the device waits, not the thread."""
        self.port.compute_after(sent.there, sent.memory)
        return sent.batch

    @contextmanager
    def receiving(self, computed: torch.cuda.Event) -> Iterator[ToHost]:
        """Give what copies a tensor of the device to this machine's memory, once what comes before `computed` is done.

        What is computed inside goes to the stream of copies, too.
        """
        with self.port.copying():
            self.port.copy_after(computed)
            yield self._received

    def _received(self, values: torch.Tensor) -> torch.Tensor:
        size = values.numel() * values.element_size()
        if size > MAX_PINNED:
            return values.cpu()
        try:
            self._down = self._at_least(self._down, size)
        except Exception as error:
            if is_out_of_memory(error):
                return values.cpu()
            raise
        staging = _as_in(self._down, 0, values)
        self.port.copy(staging, values.contiguous())
        self.port.copied().synchronize()
        return staging.clone()  # the next tensor comes to the same place

    def _at_least(self, pinned: torch.Tensor | None, size: int) -> torch.Tensor:
        return pinned if pinned is not None and len(pinned) >= size else self.port.pinned(size)


def copies_to(device: torch.device) -> Copies | None:
    """Give what copies to and from a GPU; None for a CPU, which reads what is there."""
    return Copies(CudaPort(device)) if device.type == "cuda" else None


def _places(batch: Sequence[Prepared]) -> tuple[list[Mapping[str, int]], int]:
    """Give where each tensor of each item begins when all are laid one behind the other, and how many bytes that is."""
    import torch

    places: list[Mapping[str, int]] = []
    end = 0
    for one in batch:
        place = {}
        for name, value in one.values.items():
            if isinstance(value, torch.Tensor) and value.numel():
                place[name] = end
                end += -(-value.numel() * value.element_size() // ALIGNED) * ALIGNED
        places.append(place)
    return places, end


def _in(memory: torch.Tensor, one: Prepared, place: Mapping[str, int]) -> Prepared:
    """Give an item with its tensors as they lie in `memory`."""
    there = {name: _as_in(memory, start, one.values[name]) for name, start in place.items()}
    return replace(one, values={**one.values, **there})


def _as_in(memory: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """View bytes of `memory` from `start` on as a tensor of the dtype and shape of `like`."""
    return memory[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)
