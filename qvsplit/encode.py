"""The vision encoder alone, without a store: the public call from images and videos to features.

Wires decoding and encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from os import PathLike, path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qvsplit.checkpoints.adapter import open_adapter
from qvsplit.checkpoints.opening import open_checkpoint
from qvsplit.errors import ItemError, ItemNotFound, ModelError, UsageError
from qvsplit.models import encoder as models
from qvsplit.models.encoder import Clips, EncoderSpec, TransformersEncoder
from qvsplit.models.preparing import Prepared
from qvsplit.models.sampling import VideoOptions
from qvsplit.pipeline.options import ExtractOptions, check_options
from qvsplit.pipeline.parts import Parts
from qvsplit.pipeline.stages import JoinSlices, PrepareClips, Quantize
from qvsplit.runtime import arguments, devices
from qvsplit.runtime.loading import READY, OnLoad, nobody
from qvsplit.runtime.names import absolute, stored_name
from qvsplit.sources import images as decoding
from qvsplit.sources.decoder import DecoderPool
from qvsplit.sources.pixels import upright_rgb
from qvsplit.sources.source import Entry
from qvsplit.store.config import PREPARED_ON, ExtractionConfig
from qvsplit.store.features import Features

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt
    import PIL.Image

    from qvsplit.weights import EncoderWeights

    Image = str | PathLike[str] | bytes | PIL.Image.Image | npt.NDArray[np.uint8]

T = TypeVar("T")
_AN_ADAPTER = "an adapter's folder or hub name"
_AN_IMAGE = "a path, a file's bytes, a PIL image or a uint8 array [height, width, 3]"


class VisionEncoder:
    """The vision encoder of a checkpoint, loaded alone. Made by `load_encoder`; memory is freed when it is dropped.

        with qvsplit.load_encoder("demo") as encoder:
            cat, dog = encoder.encode(["cat.jpg", "dog.jpg"])

    Attributes:
        config: The extraction config of the features; a store made by the same encoder has the same one.
    """

    def __init__(self, encoder: TransformersEncoder, max_image_pixels: int = decoding.MAX_IMAGE_PIXELS) -> None:
        self._max_image_pixels = max_image_pixels
        self.config: ExtractionConfig = encoder.config
        self._spec: EncoderSpec = encoder.spec
        self._quantize = Quantize(encoder.config, encoder.tensors)
        self._clips: Clips | None = None
        self._encoder: TransformersEncoder | None = encoder
        self._module: Any = None

    def encode(self, images: Iterable[Image]) -> list[Features]:
        """Encode images: one `Features` for each, in their order.

        Each goes through the encoder alone, so that its features do not depend on its neighbours. Files, and PIL images
        likewise, are turned upright and made RGB as `extract_files` does it; an array is taken as it is.

        Args:
            images: Paths, files' bytes, PIL images, uint8 arrays [height, width, 3]; also mixed.

        Raises:
            ItemError: An image cannot be read or encoded; the message says which.
            UsageError: `images` is one image, or something in it is none.
        """
        encoder = self._open()
        if _is_image(images):
            raise UsageError("images: give a list of images, not a single one: encode([image])")
        if not isinstance(images, Iterable) or isinstance(images, Mapping):
            raise arguments.wrong("images", images, "a list of images")
        features, cut_off = [], list[str]()
        for number, image in enumerate(images):
            features.append(self._encode(encoder, image, f"images[{number}]", cut_off))
        for line in cut_off:
            warnings.warn(line, stacklevel=2)  # in the caller's own line
        return features

    def _encode(self, encoder: TransformersEncoder, image: Any, place: str, cut_off: list[str]) -> Features:
        if not _is_image(image):
            raise arguments.wrong(place, image, _AN_IMAGE)
        name = f"{place} ({image})" if isinstance(image, str | PathLike) else place
        try:
            prepared = encoder.preparer.prepare(_pixels(image, place, self._max_image_pixels, cut_off))
            return self._encoded(encoder, prepared)
        except ItemError as error:
            raise ItemError(f"{name}: {error}", error.kind) from None

    def _encoded(self, encoder: TransformersEncoder, prepared: Prepared) -> Features:
        (one,) = encoder.encode([prepared])
        return _sound(self._quantize(_sound(one)))

    def encode_video(self, video: str | PathLike[str]) -> list[Features]:
        """Encode the frames of a video that are sampled as `load_encoder` was told: one `Features`, or one a clip.

            (features,) = encoder.encode_video("clip.mp4")

        Args:
            video: The path of a file.

        Raises:
            ItemError: It cannot be read or encoded.
            ModelError: The model takes no videos.
        """
        encoder = self._open()
        name = arguments.a_path("video", video, "the path of a video")
        folder, file = path.split(absolute(name))
        entry = Entry(stored_name(folder), stored_name(file), 0, None, None)
        if self._clips is None:
            self._clips = encoder.load_clips()
        join = JoinSlices(self._clips.config, encoder.tensors)
        pool = DecoderPool(gifs_are_videos=True)
        stage = PrepareClips(pool, self._clips.preparer, encoder.tensors, models.PATCH_BUDGET_CPU)
        parts = Parts(join, None)
        try:
            info = pool.mine().read(entry)
            if info.kind != "video":
                raise ItemError("is no video; `encode` takes images")
            for clip, prepared in stage(entry, info, pool.mine().scan(entry, info)):
                parts.add(self._encoded(encoder, prepared), clip)
            return [part.features for part in parts.finish()]
        except ItemError as error:
            raise ItemError(f"{name}: {error}", error.kind) from None
        finally:
            pool.close()

    @property
    def module(self) -> Any:
        """The encoder as transformers' own torch module, strictly loaded, in evaluation mode, without gradients.

        Call it as transformers does: `encoder.module(pixel_values, grid_thw=grid)`. With `kernels="fused"` the weights
        are laid out otherwise, and the module is loaded beside them when it is first asked for.

        Raises:
            ModelError: The checkpoint has changed since the encoder was loaded.
        """
        encoder = self._open()
        if self._module is None:
            weights = encoder.weights if self._spec.kernels == "reference" else _load_weights(self._spec)
            if weights.fingerprint != self.config.encoder:
                raise ModelError(
                    f"{self._spec.checkpoint.label} has another vision encoder now than when this one was loaded: "
                    "load it again with load_encoder"
                )
            self._module = weights.module
        return self._module

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, `cuda:0`."""
        return self._spec.device

    def close(self) -> None:
        """Free the memory; nothing can be encoded any more."""
        self._encoder = self._module = None
        devices.empty_cache()

    def _open(self) -> TransformersEncoder:
        if self._encoder is None:
            raise UsageError("the encoder is closed; load it again with load_encoder")
        return self._encoder

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the memory."""
        self.close()

    def __repr__(self) -> str:
        """Say which encoder, and where it computes in what."""
        config, closed = self.config, ", closed" if self._encoder is None else ""
        return (
            f"<VisionEncoder of {self._spec.checkpoint.label}: {config.family}, {config.compute_dtype} on "
            f"{self.device}, kernels {config.kernels}{closed}>"
        )


def load_encoder(
    model: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    kernels: str | None = None,
    prepare_on: str | None = None,
    videos: VideoOptions | None = None,
    max_image_pixels: int = decoding.MAX_IMAGE_PIXELS,
    on_load: OnLoad = nobody,
) -> VisionEncoder:
    """Load the vision encoder of a checkpoint, and nothing else of it.

        encoder = qvsplit.load_encoder("Qwen/Qwen2-VL-2B-Instruct")
        (features,) = encoder.encode(["cat.jpg"])

    Args:
        model: A checkpoint's folder or hub name, `NAME@REVISION` for a revision, or `demo`.
        adapter: A PEFT adapter's folder or hub name, likewise: merged into the encoder.
        device: `cpu`, `cuda` or `cuda:N`; by default CUDA where there is one.
        dtype: Compute in `float32`, `bfloat16` or `float16`; by default float32 on a CPU, the checkpoint's on CUDA.
        min_pixels: Smaller images are scaled up to this many pixels; by default the checkpoint's own limit.
        max_pixels: Larger images are scaled down to this many pixels; by default 1,003,520, or the checkpoint's own
            limit if lower.
        kernels: `fused`, the fast forward pass of the Qwen-VL line, or `reference`, transformers' own, to the bit; by
            default `fused` where there is one.
        prepare_on: Where images are resized: on the `cpu`, or the encoder's `device`, in float32, where some pixels
            become others; by default on the CPU.
        videos: How `encode_video` looks at videos; by default at 2 frames a second, at most 768 of them.
        max_image_pixels: A file of more pixels is not decoded, and an ItemError.
        on_load: Hears each part of loading as it begins, and how many of how many bytes of tensors have been read.

    Raises:
        UsageError: An argument is wrong.
        ModelError: The checkpoint cannot be loaded.
    """
    name = arguments.a_path("model", model, "a checkpoint's folder or hub name")
    check_options(
        ExtractOptions(
            device=device,
            dtype=dtype,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            kernels=kernels,
            prepare_on=prepare_on,
            max_image_pixels=max_image_pixels,
        )
    )
    merged = None if adapter is None else open_adapter(arguments.a_path("adapter", adapter, _AN_ADAPTER))
    checkpoint = open_checkpoint(name, "encoder", adapter=merged)
    place = devices.choose_device(device)
    chosen = devices.choose_dtype(dtype, place, checkpoint.stored_dtype("encoder"))
    spec = EncoderSpec(
        checkpoint, str(place), devices.dtype_name(chosen), min_pixels=min_pixels, max_pixels=max_pixels,
        kernels=kernels or checkpoint.family.default_kernels, prepare_on=prepare_on or PREPARED_ON[0],
        videos=videos or VideoOptions(),
    )  # fmt: skip
    encoder = VisionEncoder(models.load_encoder(spec, on_load), max_image_pixels)
    on_load(READY, 0, 0)
    return encoder


def _load_weights(spec: EncoderSpec) -> EncoderWeights:
    import torch

    from qvsplit.weights import load_encoder_weights

    dtype = getattr(torch, spec.dtype)
    return load_encoder_weights(spec.checkpoint, device=torch.device(spec.device), dtype=dtype)


def _sound(outcome: T | ItemError) -> T:
    """Give what is no ItemError, and raise what is."""
    if isinstance(outcome, ItemError):
        raise outcome
    return outcome


# ------------------------------------------------------------------------------------------------------------ decoding


def _is_image(given: object) -> bool:
    """Say whether this may be one image: of an array the number of dimensions says so."""
    import numpy as np
    from PIL import Image

    if isinstance(given, np.ndarray):
        return given.ndim == 3
    return isinstance(given, str | PathLike | bytes | bytearray | memoryview | Image.Image)


def _pixels(image: Any, place: str, max_image_pixels: int, cut_off: list[str]) -> npt.NDArray[np.uint8]:
    """Give an image as uint8 [height, width, 3]. ItemError if it is bad, UsageError if it is no image.

    Where the file's last bytes are missing, `cut_off` gets a line that says so.
    """
    import numpy as np

    if isinstance(image, np.ndarray):
        return _array(image, place)
    if isinstance(image, str | PathLike):
        image = _read(arguments.a_path(place, image, _AN_IMAGE))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd metadata; sizes have our own limit
        if isinstance(image, bytes | bytearray | memoryview):
            return np.array(_decoded(bytes(image), place, max_image_pixels, cut_off))
        return np.array(_from_pil(image))


def _read(name: str) -> bytes:
    if path.isdir(name):
        raise ItemError("is a folder; give the files in it")
    try:
        return decoding.read_file(name)
    except ItemNotFound:
        raise ItemError("there is no such file") from None


def _decoded(data: bytes, place: str, max_image_pixels: int, cut_off: list[str]) -> PIL.Image.Image:
    image, metadata = decoding.decode_with_metadata(data, max_pixels=max_image_pixels)
    if metadata.cut_rows is not None:
        missing = f"a part of the last {metadata.cut_rows} rows" if metadata.cut_rows else "none"
        cut_off.append(f"{place}: the file's last bytes are missing, and {missing} of its pixels")
    return image


def _from_pil(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn an image upright and make it RGB, as one that is decoded from a file."""
    if not image.width or not image.height:
        raise ItemError("has no pixels")
    try:
        image.load()
        return upright_rgb(image)
    except ItemError:
        raise
    except Exception as error:  # it may be opened and not read yet, and whatever a broken file does to Pillow
        if devices.is_out_of_memory(error):
            raise ItemError("does not fit into memory", "memory") from None
        raise ItemError(f"cannot be decoded ({error})") from None


def _array(image: npt.NDArray[Any], place: str) -> npt.NDArray[np.uint8]:
    import numpy as np

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(
            f"{place}: give a uint8 array [height, width, 3] of RGB, not {image.dtype} {list(image.shape)}"
        )
    if not image.size:
        raise ItemError("has no pixels")
    return image
