"""A checkpoint on disk: its configuration, its family, and which file holds which tensor.

Reads JSON and safetensors headers only: no tensor, no torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvsplit.checkpoints.adapter import Adapter
from qvsplit.checkpoints.families import Family, settings_of
from qvsplit.checkpoints.files import INDEX_FILE, read_json
from qvsplit.checkpoints.tensors import TensorPlace, described, is_computed_in, read_header, torch_dtype_name
from qvsplit.errors import ModelError, some_of

Half = Literal["encoder", "language", "both"]
# fields of config.json beside its sections that say nothing of features
_NOT_VISION = frozenset({
    "architectures", "auto_map", "dtype", "torch_dtype", "initializer_range", "model_type", "pad_token_id",
    "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size", "_name_or_path", "_attn_implementation",
})  # fmt: skip
_TOKENS = ("_token_id", "_token_index", "_token")
# and of the image processor's config
_NOT_PIXELS = frozenset({"auto_map", "processor_class", "feature_extractor_type", "_valid_processor_keys"})
_HALF_NAMES: Mapping[Half, str] = {"encoder": "vision encoder", "language": "language model", "both": "tensors"}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint. Files of the half that was not asked for may be absent.

    Attributes:
        folder: Where its files lie.
        name: The hub name, or the folder as an absolute path.
        revision: The commit hash on the hub; None for a folder.
        config: The content of config.json.
        files: The file name of every tensor, by the tensor's name.
        family: What its `model_type` is.
        adapter: The PEFT adapter that is merged into it when it is loaded.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    family: Family = field(repr=False)
    adapter: Adapter | None = None

    @property
    def label(self) -> str:
        """What answers, for people: the name, and the adapter's."""
        return self.name if self.adapter is None else f"{self.name} with adapter {self.adapter.label}"

    @property
    def encoder_names(self) -> list[str]:
        """List the names of the vision encoder's tensors; none where all are of both halves."""
        names = [name for name in self.files if self.family.is_encoders(name)]
        return names if not all(map(self.family.is_language_models, names)) else []

    @property
    def language_names(self) -> list[str]:
        """List the names of the language model's tensors; none where all are of both halves."""
        names = [name for name in self.files if self.family.is_language_models(name)]
        return names if not all(map(self.family.is_encoders, names)) else []

    def tensor_names(self, half: Half) -> list[str]:
        """List the names of the tensors of `half`."""
        if half == "both":
            return list(self.files)
        return self.encoder_names if half == "encoder" else self.language_names

    def file_names(self, half: Half) -> list[str]:
        """List the names of the safetensors files that hold `half`, sorted."""
        return sorted({self.files[name] for name in self.tensor_names(half)})

    def has(self, half: Half) -> bool:
        """Say whether every file of `half` is on this disk, and there is at least one."""
        names = self.file_names(half)
        return bool(names) and all((self.folder / name).is_file() for name in names)

    @property
    def _model_config(self) -> Mapping[str, Any]:
        """The config of the full model: of an Omni checkpoint the thinker's part."""
        config: Mapping[str, Any] = self.config.get("thinker_config", self.config)
        return config

    @property
    def quantisation(self) -> Mapping[str, Any] | None:
        """How the checkpoint was quantised, as config.json says where transformers looks for it; None if it was not."""
        config = self._model_config
        sections = [self.config, config, *(config.get(name) for name in ("text_config", "decoder", "generator"))]
        found = [one.get("quantization_config") for one in sections if isinstance(one, dict | Mapping)]
        return next((one for one in found if isinstance(one, dict)), None)

    @property
    def vision_config(self) -> Mapping[str, Any]:
        """Give the `vision_config` of config.json."""
        section = self._model_config.get("vision_config")
        return section if isinstance(section, dict) else {}

    @property
    def processor_config(self) -> Mapping[str, Any]:
        """Give the image processor's settings, from today's file or the hub's older one; empty if there is neither."""
        nested = read_json(self.folder / "processor_config.json", optional=True).get("image_processor")
        if isinstance(nested, dict):
            return nested
        return read_json(self.folder / "preprocessor_config.json", optional=True)

    @property
    def video_processor_config(self) -> Mapping[str, Any]:
        """Give the video processor's settings, from the file that transformers reads them from; empty if none has."""
        nested = read_json(self.folder / "processor_config.json", optional=True).get("video_processor")
        if isinstance(nested, dict):
            return nested
        own = read_json(self.folder / "video_preprocessor_config.json", optional=True)
        return own or read_json(self.folder / "preprocessor_config.json", optional=True)

    @property
    def width(self) -> int | None:
        """Values a token that the language model takes, as config.json says; None where it does not."""
        width = self._model_config.get("text_config", self._model_config).get("hidden_size")
        return width if isinstance(width, int) else None

    @property
    def tensors_a_token(self) -> int:
        """How many tensors the encoder gives, as config.json says: `pooler_output`, and levels of features if any."""
        levels = self.vision_config.get("deepstack_visual_indexes")
        return 1 + (len(levels) if isinstance(levels, list) else 0)

    @property
    def vision_settings(self) -> Mapping[str, Any]:
        """Give what of config.json decides features.

        For a family that names its fields, these under today's names; else `vision_config` as the file has it, and
        what stands beside the sections of its halves: which layer is taken, how many tokens an image has.
        """
        if self.family.vision_settings is not None:
            return settings_of(self.vision_config, self.family.vision_settings)
        config = self._model_config
        beside = {
            name: value
            for name, value in config.items()
            if not isinstance(value, dict) and name not in _NOT_VISION and not name.endswith(_TOKENS)
        }
        # in the older layout the language model's fields stand beside those
        return {"vision_config": self.vision_config, "beside": beside if "text_config" in config else {}}

    @property
    def processor_settings(self) -> Mapping[str, Any]:
        """Give what of the image processor's config decides features: the fields that the family names, else all."""
        if self.family.processor_settings is not None:
            return settings_of(self.processor_config, self.family.processor_settings)
        return {name: value for name, value in self.processor_config.items() if name not in _NOT_PIXELS}

    @property
    def pixel_limits(self) -> tuple[int, int]:
        """Give the fewest and the most pixels that the checkpoint's own processor resizes to."""
        config = self.processor_config
        size = config.get("size")
        size = size if isinstance(size, dict) else {}
        low = config.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        high = config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        return int(low), int(high)

    def places(self, names: list[str]) -> dict[str, TensorPlace]:
        """Find where the named tensors lie, from their files' headers. ModelError for a damaged or missing file."""
        places: dict[str, TensorPlace] = {}
        for file_name in sorted({self.files[name] for name in names}):
            header = read_header(self.folder / file_name)
            wanted = [name for name in names if self.files[name] == file_name]
            missing = [name for name in wanted if name not in header]
            if missing:
                raise ModelError(
                    f"{self.folder / file_name} has no tensor {some_of(missing)}, which {INDEX_FILE} says it holds; "
                    "download the checkpoint again"
                )
            places |= {name: header[name] for name in wanted}
        return places

    def encoder_places(self) -> dict[str, TensorPlace]:
        """Find where the encoder's tensors lie, by their names in the checkpoint.

        Raises:
            ModelError: There is no encoder, or there are two; or a file is damaged or missing.
        """
        names = self.encoder_names
        if not names:
            raise ModelError(f"{self.folder} holds no vision encoder; it is needed to encode images")
        if len({self.family.bare_name(name) for name in names}) < len(names):
            raise ModelError(f"{self.folder} holds two vision encoders under different prefixes; keep one")
        return self.places(names)

    def plain_encoder_places(self) -> dict[str, TensorPlace]:
        """Do as `encoder_places`, and raise ModelError, too, where tensors are stored as numbers that need a scale."""
        places = self.encoder_places()
        self.check_plain(places)
        return places

    def check_plain(self, places: Mapping[str, TensorPlace]) -> None:
        """Raise ModelError where the encoder's tensors, at `places`, are stored as numbers that need a scale."""
        wrong = [place for place in places.values() if not is_computed_in(place.dtype)]
        if wrong:
            raise ModelError(
                f"{self.name}: its vision encoder itself is quantised ({described(wrong)}), and its features are none "
                "of the model's that it was made from; name that model as `model`, or a quantised one whose encoder is "
                "kept as it was"
            )

    def stored_dtype(self, half: Half) -> str:
        """Give torch's name of the dtype that most of `half` is stored in, as far as it is computed in as it is stored.

        ModelError if there is nothing in it, or if it is the encoder and quantised.
        """
        sizes: dict[str, int] = {}
        places = self.plain_encoder_places() if half == "encoder" else self.places(self.tensor_names(half))
        plain = [place for place in places.values() if is_computed_in(place.dtype)]
        for place in plain or places.values():
            sizes[place.dtype] = sizes.get(place.dtype, 0) + place.size
        if not sizes:
            raise ModelError(f"{self.folder} holds no {_HALF_NAMES[half]}")
        return torch_dtype_name(max(sizes, key=lambda dtype: sizes[dtype]))
