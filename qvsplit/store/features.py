"""Features as they are stored: named tensors under one extraction config, and what a prompt needs beside them.

Needs NumPy only, and that only where values are looked at; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qvsplit.errors import StoreDamaged
from qvsplit.runtime.dtypes import DTYPE_BYTES, SCALE_BYTES, STORAGE_DTYPES, token_bytes
from qvsplit.store.config import ExtractionConfig, made_by_newer
from qvsplit.store.row import Runs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

POOLER_OUTPUT = "pooler_output"
DEEPSTACK_FEATURES = "deepstack_features"
POOLER_COLUMN = "embeds"
LIST = "list"
CONTAINERS = ("tensor", LIST, "tuple")
MAX_WIDTH = 1 << 20
MAX_LEVELS = 64
_UNSIGNED = {4: "<u4", 2: "<u2"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the encoder's output, as a store declares it.

    Attributes:
        name: The field of the model's output: `pooler_output`, or `deepstack_features`, which has levels.
        level: Which of its levels; None for a field that has none.
        dtype: The storage dtype.
        width: Values a token.
        container: What the field holds in the model's output: one tensor, or a list or tuple with one an item.
    """

    name: str
    dtype: str
    width: int
    container: str = LIST
    level: int | None = None

    @property
    def key(self) -> str:
        """The name by which `Features` has it: that of the field, with the level behind it."""
        return self.name if self.level is None else f"{self.name}_{self.level}"

    @property
    def column(self) -> str:
        """The column that holds it."""
        return POOLER_COLUMN if self.name == POOLER_OUTPUT else self.key

    @property
    def token_bytes(self) -> int:
        """Bytes of one token before compression."""
        return token_bytes(self.dtype, self.width)

    def to_json(self) -> dict[str, Any]:
        """Give it as it stands in a shard's metadata."""
        return {"column": self.column, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, where: str) -> TensorSpec:
        """Read it from a shard's metadata. StoreDamaged if it is none; ConfigError for what is unknown here."""
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            raise StoreDamaged(f"{where} does not declare its tensors")
        if content["name"] not in (POOLER_OUTPUT, DEEPSTACK_FEATURES):
            raise made_by_newer(where, f"the unknown tensor {content['name']!r}")
        if unknown := content.keys() - {"name", "level", "column", "dtype", "width", "container"}:
            raise made_by_newer(where, f"a tensor has the unknown field {min(unknown)}")
        for name, known in (("dtype", STORAGE_DTYPES), ("container", CONTAINERS)):
            if isinstance(content.get(name), str) and content[name] not in known:
                raise made_by_newer(where, f"the unknown {name} {content[name]!r}")
        level, width = content.get("level"), content.get("width")
        wrong = StoreDamaged(f"{where} declares a tensor that cannot be")
        if content.get("dtype") not in STORAGE_DTYPES or content.get("container") not in CONTAINERS:
            raise wrong
        if type(width) is not int or not 1 <= width <= MAX_WIDTH:
            raise wrong
        if not (level is None if content["name"] == POOLER_OUTPUT else _is_level(level)):
            raise wrong
        spec = cls(content["name"], content["dtype"], width, content["container"], level)
        if content.get("column") != spec.column:
            raise wrong
        return spec


def containers_of(specs: Sequence[TensorSpec], config: ExtractionConfig, kind: str = "image") -> dict[str, str]:
    """Give what the fields held in the encoder's output for items of this kind, where that was no list."""
    declared = {spec.key: spec.container for spec in specs}
    if kind == "video":
        own = (config.videos or {}).get("containers", {})
        declared = {key: own.get(key, LIST) for key in declared}
    return {key: container for key, container in declared.items() if container != LIST}


def _is_level(level: Any) -> bool:
    return type(level) is int and 0 <= level < MAX_LEVELS


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one item: `raw` is uint8 [n_tokens, width · bytes a value], little-endian, C order.

    With dtype int8 it is [n_tokens, width + 4]: a token's values, and the float32 that they are to be multiplied by.
    """

    raw: npt.NDArray[np.uint8]
    dtype: str

    @property
    def n_tokens(self) -> int:
        """Tokens, the first dimension."""
        return int(self.raw.shape[0])

    @property
    def width(self) -> int:
        """Values a token."""
        width = int(self.raw.shape[1])
        return width - SCALE_BYTES if self.dtype == "int8" else width // DTYPE_BYTES[self.dtype]

    @property
    def size(self) -> int:
        """Values."""
        return self.n_tokens * self.width

    def numpy(self) -> npt.NDArray[np.float32] | npt.NDArray[np.float16]:
        """Give the values, [n_tokens, width]: float32, or float16 where stored so; bfloat16 widens exactly."""
        import numpy as np

        if self.dtype == "int8":
            scales = np.ascontiguousarray(self.raw[:, -SCALE_BYTES:]).view("<f4")
            values: npt.NDArray[np.float32] = self.raw[:, :-SCALE_BYTES].view(np.int8) * scales
            return values
        words = self.raw.view(_UNSIGNED[DTYPE_BYTES[self.dtype]])
        if self.dtype == "bfloat16":
            words = words.astype(np.uint32) << 16
        return words.view(np.float16) if self.dtype == "float16" else words.view(np.float32)

    def torch(self) -> Any:
        """Give the values as torch's, [n_tokens, width], on the CPU: bit for bit as stored, int8 in float32."""
        from qvsplit.runtime.tensors import as_torch

        return as_torch(self.numpy() if self.dtype == "int8" else self.raw, self.dtype)


@dataclass(frozen=True)
class Features:
    """What an encoder gave for one item, or one part of it, and what the language model needs beside it.

        features = store.features("coffee.png")
        features["pooler_output"]  # a NumPy array [n_tokens, width]; features.torch() has torch's tensors

    Attributes:
        config: The extraction config they were made under: no language model takes another encoder's features.
        tensors: By the names of the model's own output: `pooler_output`, `deepstack_features_0` …
        grid_thw: Patches in time, height and width, where the family has such a grid.
        placeholder: The text that stands for the item in a prompt, as runs of (text, count).
        inputs: Other small inputs of the language model: name → dtype, shape, values.
        shapes: The tensors' shapes in the encoder's output, where these are not [n_tokens, width].
        containers: What the fields held in the encoder's output, where that was no list: see `TensorSpec`.
        left_out: Names of tensors of the item that were not read: no language model takes it without them.
        kind: `image` or `video`.
    """

    config: ExtractionConfig
    tensors: Mapping[str, StoredTensor]
    grid_thw: tuple[int, int, int] | None
    placeholder: Runs
    inputs: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    containers: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    kind: str = "image"

    def __getitem__(self, name: str) -> npt.NDArray[np.float32] | npt.NDArray[np.float16]:
        """Give the values of the tensor of this name, in the shape of the encoder's output; see `StoredTensor.numpy`.

        `tensors` has the bytes as they are stored.
        """
        if name not in self.tensors:
            raise KeyError(f"no tensor {name!r}; there are {', '.join(self.tensors)}")
        values = self.tensors[name].numpy()
        return values.reshape(self.shapes[name]) if name in self.shapes else values

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.tensors)

    def keys(self) -> KeysView[str]:
        """Give the tensors' names: `dict(features)` has them all as NumPy arrays."""
        return self.tensors.keys()

    def torch(self) -> dict[str, Any]:
        """Give every tensor as torch's, on the CPU, bit for bit in the stored dtype; of int8 in float32."""
        tensors = {}
        for name, values in self.flat_torch().items():
            tensors[name] = values.reshape(self.shapes[name]) if name in self.shapes else values
        return tensors

    def flat_torch(self) -> dict[str, Any]:
        """Give every tensor as `torch` does, but as it is stored: [n_tokens, width]."""
        return {name: stored.torch() for name, stored in self.tensors.items()}

    def __repr__(self) -> str:
        """Say what it holds."""
        tensors = ", ".join(
            f"{name} {stored.n_tokens}×{stored.width} {stored.dtype}" for name, stored in self.tensors.items()
        )
        return f"<Features by {self.config.family}: {tensors}>"

    @property
    def n_tokens(self) -> int:
        """Tokens of the item: the rows of every tensor."""
        return next(iter(self.tensors.values())).n_tokens
