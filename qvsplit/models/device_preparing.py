"""Images prepared on the encoder's device: resized there, in float32, instead of on the CPU, in whole numbers.

That is another pixel rule. On a CPU torchvision resizes bytes with weights of 16 bits; on CUDA it computes in float32
and rounds once, and so does this, on whichever device. Of the bytes of a photograph's patches 6 to 20 % differ by one,
at most seven in ten thousand by more, at hard edges, so that the extraction config says `prepared_on` of its processor.
What else the image processor does it does itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import UsageError
from qvsplit.models.preparing import PatchPreparer, Prepared, Preparer, normalising_later, runs_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

MODES = {2: "bilinear", 3: "bicubic"}  # by PIL's numbers, which processors take


@dataclass(frozen=True)
class DevicePreparer(PatchPreparer):
    """A preparer that leaves pixels as they were decoded, and cuts them into patches on the encoder's device.

    `values` has `decoded`: uint8 [height, width, 3].
    """

    def prepare(self, image: npt.NDArray[np.uint8]) -> Prepared:
        """Say what an image [height, width, 3] becomes, by its measures alone. Raises as `Preparer.prepare`."""
        import torch

        processed, text = self._processed(torch.empty(image.shape, dtype=torch.uint8, device="meta"))
        t, h, w = (int(n) for n in processed["image_grid_thw"][0])
        runs = runs_of(text, self.image_token)
        return Prepared({"decoded": torch.from_numpy(image)}, text.count(self.image_token), t * h * w, runs, (t, h, w))

    def patches(self, image: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Give what `PatchPreparer.prepare` has as `pixels`, on the device of `image` [height, width, 3]."""
        own = self.processor.image_processor
        there = resized(image, size_of(grid, own), own.resample)
        processed = own(
            [there], input_data_format="channels_last", return_tensors="pt",
            do_resize=False,  # it would resize a slim one once more
            **normalising_later(own),
        )  # fmt: skip
        return self.first_slices(processed["pixel_values"])


def size_of(grid: tuple[int, int, int], image_processor: Any) -> tuple[int, int]:
    """Give height and width in pixels of an image of so many patches."""
    side = int(image_processor.patch_size)
    return grid[1] * side, grid[2] * side


def resized(image: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Resize uint8 [height, width, 3] as torchvision does on CUDA: in float32, clamped, rounded once.

    Args:
        image: On any device.
        size: Height and width.
        resample: PIL's number of the filter; see `MODES`.
    """
    import torch

    if tuple(image.shape[:2]) == size:
        return image
    values = image.permute(2, 0, 1)[None].float()  # [1, 3, height, width]
    values = torch.nn.functional.interpolate(
        values, size, mode=MODES[int(resample)], align_corners=False, antialias=True
    )
    return values[0].clamp_(0, 255).round_().to(torch.uint8).permute(1, 2, 0)


def on_device(preparer: Preparer) -> DevicePreparer:
    """Give a preparer that does the same on the encoder's device.

    Raises:
        UsageError: The family's images cannot be prepared there.
    """
    if not isinstance(preparer, PatchPreparer) or not can_resize(preparer.processor.image_processor):
        raise UsageError(
            f"`prepare_on` device is for models whose images are cut into patches after a bilinear or bicubic filter, "
            f"not for this {preparer.family.model_type}; use `prepare_on=cpu`"
        )
    return DevicePreparer(
        preparer.processor, preparer.family, preparer.image_token, preparer.language_model_takes, preparer.shape
    )


def can_resize(image_processor: Any) -> bool:
    """Say whether `resized` has its filter."""
    return not image_processor.do_resize or int(image_processor.resample) in MODES
