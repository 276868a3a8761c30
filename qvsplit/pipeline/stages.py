"""The stages of an extraction: Read → Decode → Prepare → Encode (a batch) → Quantize.

Of a video: Read → Scan → PrepareClips (decodes sampled frames, gives slices) → Encode → Quantize → JoinSlices.

Each is a small picklable callable that takes one item, or one batch, and returns a value or an `ItemError`; nothing
that several workers share is changed. The same stages run in the local runner and in a cluster.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from qvsplit.errors import ItemError, some_of
from qvsplit.models.clips import ClipPreparer
from qvsplit.models.copies import ToHost
from qvsplit.models.encoder import Encoded, Encoder
from qvsplit.models.preparing import ImagePreparer, Prepared
from qvsplit.models.sampling import Clip
from qvsplit.runtime.devices import is_out_of_memory
from qvsplit.runtime.dtypes import DTYPE_BYTES
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.files import FileInfo
from qvsplit.sources.images import DecodedImage
from qvsplit.sources.source import Entry
from qvsplit.sources.videos import VideoInfo
from qvsplit.store.config import ExtractionConfig
from qvsplit.store.features import POOLER_OUTPUT, Features, StoredTensor, TensorSpec, containers_of
from qvsplit.store.row import MAX_JSON_BYTES
from qvsplit.store.shard_writer import size_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

T = TypeVar("T")

OnSize = Callable[[int, int], None]


def errors_as_values(stage: Callable[..., T]) -> Callable[..., T | ItemError]:
    """Have a stage return the ItemErrors that it would raise: one bad item stops nothing."""

    @functools.wraps(stage)
    def returning(*args: object, **kwargs: object) -> T | ItemError:
        try:
            return stage(*args, **kwargs)
        except ItemError as error:
            return error.with_traceback(None)

    return returning


def to_host(values: torch.Tensor) -> torch.Tensor:
    """Give a tensor in this machine's memory, once all that the calling thread has its device compute is done."""
    return values.cpu()


@dataclass(frozen=True)
class Read:
    """Read and hash the file of an entry, in a decoder process that can be killed."""

    pool: DecoderPool

    @errors_as_values
    def __call__(self, entry: Entry) -> FileInfo:
        """Give what identifies the file; its bytes stay in the decoder for `Decode`."""
        return self.pool.mine().read(entry)


@dataclass(frozen=True)
class Decode:
    """Decode the file that was read, in that decoder process; elsewhere it is read again."""

    pool: DecoderPool

    @errors_as_values
    def __call__(self, entry: Entry, info: FileInfo, on_size: OnSize = lambda width, height: None) -> DecodedImage:
        """Give the pixels; `on_size` is called before memory is taken for them, and may wait."""
        return self.pool.mine().decode(entry, info, on_size)


@dataclass(frozen=True)
class Scan:
    """Find out what frames the video that was read has, in that decoder process, without decoding any."""

    pool: DecoderPool

    @errors_as_values
    def __call__(self, entry: Entry, info: FileInfo) -> VideoInfo:
        """Give what the packets of its best stream say."""
        return self.pool.mine().scan(entry, info)


@dataclass(frozen=True)
class PrepareClips:
    """Have the video processor prepare the sampled frames of a video's clips, slice by slice, as they are decoded."""

    pool: DecoderPool
    preparer: ClipPreparer
    tensors: tuple[TensorSpec, ...]
    patch_budget: int

    def __call__(self, entry: Entry, info: FileInfo, video: VideoInfo) -> Iterator[tuple[Clip, Prepared]]:
        """Give the slices of one clip after the other. Raises ItemError."""
        clips = self.preparer.clips(video)
        if self.preparer.in_slices:  # each of which `Quantize` would let pass
            longest = max(clips, key=lambda clip: len(clip.indices))
            if wrong := size_error(self.preparer.outline(longest, video).n_tokens, self.tensors):
                raise ItemError(f"{wrong}; try `clip_seconds`, or a smaller `max_frames` or `video_max_tokens`")
        indices = [index for clip in clips for index in clip.indices]
        frames = self.pool.mine().frames(entry, info, indices)
        with closing(frames):
            for clip in clips:
                for prepared in self.preparer.prepare(clip, video, frames, self.patch_budget):
                    yield clip, prepared


@dataclass(frozen=True)
class Prepare:
    """Have the processor prepare an image."""

    preparer: ImagePreparer

    @errors_as_values
    def __call__(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Take uint8 [height, width, 3]."""
        return self.preparer.prepare(image)


class Encode:
    """Encode a batch. The encoder is loaded when it is first needed, once in each process.

    Args:
        load: What gives the encoder; picklable, as `functools.partial(load_encoder, spec)` is.
        encoder: One that is loaded already.
    """

    def __init__(self, load: Callable[[], Encoder], encoder: Encoder | None = None) -> None:
        self._load = load
        self._encoder = encoder

    def __reduce__(self) -> tuple[type[Encode], tuple[Callable[[], Encoder]]]:
        """Pickle what loads the encoder, not the encoder."""
        return Encode, (self._load,)

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded."""
        if self._encoder is None:
            self._encoder = self._load()
        return self._encoder

    def __call__(self, batch: Sequence[Prepared]) -> Sequence[Encoded | ItemError]:
        """Give the features of each item, or why it has none."""
        return self.encoder.encode(batch)


@dataclass(frozen=True)
class Quantize:
    """Turn features into the storage dtype, as bytes."""

    config: ExtractionConfig
    tensors: tuple[TensorSpec, ...]

    @errors_as_values
    def __call__(self, encoded: Encoded, received: ToHost = to_host) -> Features:
        """Give them as they are stored; an error for values beyond the storage dtype's range, or too many for a row.

        `received` gives a tensor of the encoder's device in this machine's memory.
        """
        if wrong := size_error(len(encoded.tensors[POOLER_OUTPUT]), self.tensors):
            raise ItemError(f"{wrong}; try a smaller `max_pixels`, or a narrower `storage_dtype`")
        if (length := len(json.dumps(encoded.inputs))) > MAX_JSON_BYTES:
            raise ItemError(f"its {some_of(encoded.inputs)} have {length:,} bytes as JSON, more than a row holds")
        stored = {spec.key: StoredTensor(_stored(encoded.tensors[spec.key], spec.dtype, received), spec.dtype)
                  for spec in self.tensors}  # fmt: skip
        return Features(
            self.config, stored, encoded.grid_thw, encoded.placeholder, encoded.inputs, encoded.shapes,
            containers_of(self.tensors, self.config), kind=encoded.kind,
        )  # fmt: skip


@dataclass(frozen=True)
class JoinSlices:
    """Join the features of a clip's temporal slices, one below the other.

    Attributes:
        config: The extraction config of clips.
        tensors: What the encoder gives.
    """

    config: ExtractionConfig
    tensors: tuple[TensorSpec, ...]

    def __call__(self, slices: Sequence[Features]) -> Features:
        """Give those of the clip; the first slice has its placeholder and inputs."""
        import numpy as np

        first = slices[0]
        tensors = {
            name: StoredTensor(np.concatenate([one.tensors[name].raw for one in slices]), tensor.dtype)
            if len(slices) > 1
            else tensor
            for name, tensor in first.tensors.items()
        }
        grid = first.grid_thw
        if grid is not None:
            grid = (sum(one.grid_thw[0] for one in slices if one.grid_thw is not None), *grid[1:])
        containers = containers_of(self.tensors, self.config, "video")
        return replace(first, config=self.config, tensors=tensors, grid_thw=grid, containers=containers)


def _stored(values: torch.Tensor, dtype: str, received: ToHost) -> npt.NDArray[np.uint8]:
    """Give [n_tokens, width] as bytes of the storage dtype. ItemError where memory does not suffice."""
    try:
        return _as_bytes(values, dtype, received)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    try:  # beside a GPU's next batch there may be no room: this machine gives the same bytes
        return _as_bytes(to_host(values), dtype, to_host)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    raise ItemError("its features do not fit into memory", "memory")


def _as_bytes(values: torch.Tensor, dtype: str, received: ToHost) -> npt.NDArray[np.uint8]:
    import torch

    if dtype == "int8":
        return _as_int8(values.float(), received)
    stored = values.to(getattr(torch, dtype))
    narrower = DTYPE_BYTES[dtype] < values.element_size() or stored.dtype != values.dtype
    if narrower and not bool(torch.isfinite(stored).all()):
        raise ItemError(f"has values beyond the range of {dtype}")
    raw: npt.NDArray[np.uint8] = received(stored.contiguous()).view(torch.uint8).numpy()
    return raw


def _as_int8(values: torch.Tensor, received: ToHost) -> npt.NDArray[np.uint8]:
    """Give float32 [n_tokens, width] as bytes [n_tokens, width + 4]: each token over its own scale."""
    import torch

    scales = values.abs().amax(1, keepdim=True) / 127  # [n_tokens, 1]
    whole = (values / scales.where(scales > 0, 1)).round().clamp(-127, 127).to(torch.int8)
    raw: npt.NDArray[np.uint8] = received(torch.cat([whole.view(torch.uint8), scales.view(torch.uint8)], 1)).numpy()
    return raw
