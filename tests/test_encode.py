"""The vision encoder without a store: its features are those of a store and of the full model, bit for bit."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qvsplit.encode import load_encoder
from qvsplit.errors import ItemError, ModelError, UsageError
from qvsplit.extract import extract_files
from qvsplit.pipeline.options import ExtractOptions
from qvsplit.store.opening import open_store
from tests.support.full_model import upright_rgb
from tests.support.nasty_images import encoded

NAMES = ["coffee.png", "turned.jpg", "one_pixel.png", "rocket.jpg"]


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return load_encoder(checkpoint, device="cpu")


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def bits(features) -> bytes:
    return features.tensors["pooler_output"].raw.tobytes()


def as_torch(features) -> torch.Tensor:
    return torch.from_numpy(features["pooler_output"])


def test_features_are_those_that_a_store_holds(encoder, checkpoint, photos, tmp_path):
    shown = tmp_path / "shown"
    shown.mkdir()
    for name in NAMES:
        shutil.copyfile(photos / name, shown / name)
    # each image in a pass of its own, as the encoder does it here
    extract_files([shown], out=tmp_path / "embeds", options=ExtractOptions(model=str(checkpoint), patch_budget=1))
    store = open_store(tmp_path / "embeds")
    stored = {row.path: store.features(row) for row in store}
    encoded = encoder.encode([shown / name for name in NAMES])
    assert len(encoded) == len(stored) == len(NAMES)
    for name, features in zip(NAMES, encoded, strict=True):
        assert bits(features) == bits(stored[name]), name
        assert (features.grid_thw, features.placeholder) == (stored[name].grid_thw, stored[name].placeholder)
        assert features.config == encoder.config == stored[name].config


def test_features_are_the_full_models_to_the_bit(checkpoint, whole, photos):
    encoder = load_encoder(str(checkpoint), kernels="reference", dtype="float32", device="cpu")
    paths = [photos / name for name in NAMES]
    for path, features in zip(paths, encoder.encode(paths), strict=True):
        (expected,) = whole.features([upright_rgb(path)])
        assert torch.equal(as_torch(features), expected), path.name


def test_every_kind_of_image_is_the_same_image(encoder, photos):
    path = photos / "turned.jpg"  # turned by its EXIF block
    with Image.open(path) as opened:
        kinds = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), opened, np.array(upright_rgb(path))]
        first, *others = encoder.encode(kinds)
    assert all(bits(one) == bits(first) for one in others)
    assert [bits(one) for one in encoder.encode(iter([path]))] == [bits(first)]
    transparent = Image.new("RGBA", (60, 60), (10, 200, 30, 0))
    white = np.full((60, 60, 3), 255, np.uint8)
    assert len({bits(one) for one in encoder.encode([transparent, white])}) == 1
    assert encoder.encode([]) == []


def test_a_bad_image_is_named(encoder, photos, tmp_path):
    torn = tmp_path / "torn.jpg"
    torn.write_bytes((photos / "rocket.jpg").read_bytes()[:2000])
    with Image.open(torn) as not_read_yet:
        for bad, name, reason in [
            (torn, r"\(.*torn\.jpg\)", "is a JPEG file that is cut off"), (str(torn), r"\(.*torn\.jpg\)", "cut off"),
            (torn.read_bytes(), "", "cut off"), (b"", "", "is empty"), (not_read_yet, "", "cannot be decoded"),
            (tmp_path / "none.jpg", r"\(.*none\.jpg\)", "there is no such file"), (tmp_path, r"\(.*\)", "is a folder"),
            (np.zeros((0, 5, 3), np.uint8), "", "has no pixels"), (np.zeros((1, 900, 3), np.uint8), "", "slimmer than"),
        ]:  # fmt: skip
            with pytest.raises(ItemError, match=rf"^images\[1\] ?{name}: .*{reason}"):
                encoder.encode([photos / "coffee.png", bad])


def test_a_file_without_its_last_bytes_is_encoded_with_a_warning(encoder):
    data = encoded(Image.linear_gradient("L").convert("RGB"), "JPEG")
    (whole,) = encoder.encode([data])
    with pytest.warns(
        UserWarning, match=r"images\[0\]: the file's last bytes are missing, and none of its pixels"
    ) as said:
        (cut,) = encoder.encode([data[:-2]])
    assert [one.filename for one in said] == [__file__]
    for name, tensor in whole.tensors.items():
        assert np.array_equal(tensor.raw, cut.tensors[name].raw)


def test_a_file_of_more_pixels_than_may_be_is_an_error(checkpoint):
    with load_encoder(checkpoint, device="cpu", max_image_pixels=99) as encoder:
        with pytest.raises(ItemError, match="over the limit of 99") as caught:
            encoder.encode([encoded(Image.new("RGB", (10, 10)))])
        assert caught.value.kind == "memory"


def test_what_is_no_list_of_images(encoder, photos):
    image = np.zeros((30, 30, 3), np.uint8)
    for single in (str(photos / "coffee.png"), photos / "coffee.png", b"\xff\xd8", image, Image.new("RGB", (9, 9))):
        with pytest.raises(UsageError, match=r"images: give a list of images, not a single one: encode\(\[image\]\)"):
            encoder.encode(single)
    for wrong, given in ((None, "None"), (5, "int 5"), ({"a": 1}, "a dict")):
        with pytest.raises(UsageError, match=f"images: give a list of images, not {given}"):
            encoder.encode(wrong)
    for wrong, given in ((None, "None"), (5, "int 5"), ([image], "a list"), (torch.zeros(3, 9, 9), "a Tensor")):
        with pytest.raises(UsageError, match=rf"images\[1\]: give a path, .*, not {given}"):
            encoder.encode([image, wrong])
    for wrong in (image.astype(np.float32), image[:, :, :1], image.transpose(2, 0, 1)):
        with pytest.raises(UsageError, match=r"images\[0\]: give a uint8 array \[height, width, 3\]"):
            encoder.encode([wrong])


def test_a_module_of_other_weights_than_the_encoders_is_refused(checkpoint, tmp_path):
    """The files were written again in the meantime."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    encoder = load_encoder(folder, device="cpu")
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor * 2 for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^{folder} has another vision encoder now .*load_encoder$"):
        _ = encoder.module


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_the_module_is_transformers_own(checkpoint, whole, kernels):
    encoder = load_encoder(checkpoint, kernels=kernels, device="cpu")
    assert isinstance(encoder.module, torch.nn.Module)
    assert encoder.module is encoder.module
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    theirs = whole.model.model.visual.state_dict()
    assert encoder.module.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder.module.state_dict().items())
    inputs = whole.processor.image_processor(images=[Image.new("RGB", (64, 64), "red")], return_tensors="pt")
    with torch.inference_mode():
        mine = encoder.module(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        expected = whole.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_memory_is_freed_when_it_is_dropped(checkpoint, kernels):
    encoder = load_encoder(checkpoint, kernels=kernels, device="cpu")
    inner = weakref.ref(encoder._encoder)
    gc.disable()  # nothing waits for the garbage collector
    try:
        del encoder
        assert inner() is None
    finally:
        gc.enable()


def test_as_a_context_it_is_closed(checkpoint):
    with load_encoder(checkpoint, device="cpu", dtype="bfloat16", max_pixels=50_000) as encoder:
        assert encoder.config.processor["max_pixels"] == 50_000
        assert f"<VisionEncoder of {checkpoint}: qwen2_vl, bfloat16 on cpu, kernels fused>" == repr(encoder)
        inner = weakref.ref(encoder._encoder)
    assert inner() is None
    assert repr(encoder).endswith("closed>")
    for use in (lambda: encoder.encode([]), lambda: encoder.module):
        with pytest.raises(UsageError, match="the encoder is closed"):
            use()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "model: give a checkpoint's folder or hub name, not None"),
        ({"model": 5}, "model: give a checkpoint's folder or hub name, not int 5"),
        ({"model": ""}, "model: give .*, not an empty text"),
        ({"device": 0}, "device: give a text, not int 0"),
        ({"device": "cuda0"}, "`device` cuda0: no such device"),
        ({"device": "cpu,cpu"}, "`device` cpu,cpu: no such device"),
        ({"dtype": torch.float32}, "dtype: give a text, not a dtype"),
        ({"dtype": "fp32"}, "`dtype` fp32: choose one of float32"),
        ({"kernels": "fast"}, "`kernels` fast: choose one of fused, reference"),
        ({"prepare_on": "gpu"}, "`prepare_on` gpu: choose one of cpu, device"),
        ({"min_pixels": 0}, "`min_pixels` must be at least 1, not 0"),
        ({"max_pixels": "1000"}, "max_pixels: give a whole number, not str '1000'"),
        ({"max_pixels": 1}, "`max_pixels` must be at least 784"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "`min_pixels` 9000 is more than `max_pixels` 8000"),
    ],
)
def test_wrong_arguments(checkpoint, arguments, message):
    arguments.setdefault("model", checkpoint)
    with pytest.raises(UsageError, match=message):
        load_encoder(arguments.pop("model"), **arguments)


def test_images_prepared_on_the_device_are_those_of_a_store_made_so(checkpoint, encoder, photos, tmp_path):
    path = photos / "coffee.png"
    options = ExtractOptions(model=str(checkpoint), patch_budget=1, prepare_on="device")
    extract_files([path], out=tmp_path / "embeds", options=options)
    store = open_store(tmp_path / "embeds")
    ((mine,), (other,)) = (
        one.encode([path]) for one in (load_encoder(checkpoint, device="cpu", prepare_on="device"), encoder)
    )
    assert [bits(mine)] == [bits(store.features(row)) for row in store]
    assert mine.config == store.config
    assert bits(mine) != bits(other)


def test_device_preparing_is_refused_where_there_is_none(family_checkpoint):
    with pytest.raises(UsageError, match="not for this glm4v; use `prepare_on=cpu`"):
        load_encoder(family_checkpoint("glm4v"), device="cpu", prepare_on="device")


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError, match="no model folder at"):
        load_encoder(Path(tmp_path / "none"))


def test_what_is_no_video_is_named(encoder, photos, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for bad, reason in (
        (photos / "coffee.png", "is no video; `encode` takes images"),
        (tmp_path / "text.mp4", "is no video; `encode` takes images"),
        (tmp_path / "none.mp4", "is no longer there|there is no such file"),
    ):
        with pytest.raises(ItemError, match=f"^{bad}: .*({reason})"):
            encoder.encode_video(bad)
    with pytest.raises(UsageError, match="video: give the path of a video, not int 5"):
        encoder.encode_video(5)


def test_a_video_needs_no_decoder_once_it_is_encoded(encoder, tmp_path):
    """A GIF is a video where one is asked for."""
    colours = [Image.new("RGB", (64, 64), (0, 0, number)) for number in range(9)]
    colours[0].save(tmp_path / "a.gif", save_all=True, append_images=colours[1:], duration=200)
    before = children()
    (features,) = encoder.encode_video(tmp_path / "a.gif")
    assert (features.kind, features.grid_thw[0]) == ("video", 2)
    with pytest.raises(ItemError):
        encoder.encode_video(__file__)
    assert children() == before
