"""The columns and the metadata of a shard, format 1: what a writer declares, and what a reader makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvsplit.errors import ConfigError, StoreDamaged
from qvsplit.store.config import ExtractionConfig, Provenance, made_by_newer
from qvsplit.store.features import POOLER_OUTPUT, TensorSpec

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
METADATA_KEY = b"qvsplit"
MAX_METADATA_BYTES = 1 << 20
MAX_TENSORS = 64
DICTIONARY_COLUMNS = ("root", "kind", "status", "error", "error_kind", "warnings", "placeholder", "inputs", "media")


@dataclass(frozen=True)
class ShardSchema:
    """What a shard declares in its metadata.

    Attributes:
        config: The extraction config of all its rows.
        tensors: The columns of features.
        provenance: Where its rows came from; several entries where shards of several runs were merged.
    """

    config: ExtractionConfig
    tensors: tuple[TensorSpec, ...]
    provenance: tuple[Provenance, ...]

    @property
    def width(self) -> int:
        """Values a token of `pooler_output`."""
        return next(spec.width for spec in self.tensors if spec.name == POOLER_OUTPUT)

    def to_json(self) -> dict[str, Any]:
        """Give it as it stands in the metadata, but for the format."""
        return {
            "config": self.config.to_json(),
            "tensors": [spec.to_json() for spec in self.tensors],
            "provenance": [one.to_json() for one in self.provenance],
        }

    @classmethod
    def from_json(cls, content: Any, where: str) -> ShardSchema:
        """Read it from metadata. StoreDamaged if it is none, ConfigError if a newer version made it."""
        if not isinstance(content, dict):
            raise StoreDamaged(f"{where} has no usable metadata")
        listed, provenance = content.get("tensors"), content.get("provenance")
        if not isinstance(listed, list) or not listed or len(listed) > MAX_TENSORS or not isinstance(provenance, list):
            raise StoreDamaged(f"{where} does not declare its tensors and provenance")
        schema = cls(
            config=ExtractionConfig.from_json(content.get("config"), where),
            tensors=tuple(TensorSpec.from_json(one, where) for one in listed),
            provenance=tuple(Provenance.from_json(one) for one in provenance) or (Provenance.from_json(None),),
        )
        keys = [spec.key for spec in schema.tensors]
        if POOLER_OUTPUT not in keys or len(set(keys)) < len(keys):
            raise StoreDamaged(f"{where} declares no {POOLER_OUTPUT}, or a tensor twice")
        levels = {spec.level for spec in schema.tensors} - {None}
        if levels != set(range(len(levels))):
            raise StoreDamaged(f"{where} declares levels of a tensor with a gap between them")
        if any(spec.key == POOLER_OUTPUT and spec.dtype != schema.config.storage_dtype for spec in schema.tensors):
            raise StoreDamaged(f"{where} declares {POOLER_OUTPUT} of another dtype than its extraction config")
        return schema


def read_metadata(text: bytes, where: str) -> ShardSchema:
    """Read the value of the metadata's key `qvsplit`.

    Raises:
        ValueError: It is not what a writer of any version writes.
        StoreDamaged: It is incomplete.
        ConfigError: A newer version wrote it.
    """
    if len(text) > MAX_METADATA_BYTES:
        raise ValueError("its metadata are longer than any writer's")
    content = json.loads(text)
    if isinstance(content, dict) and "recipe" in content:
        raise ConfigError(f"{where} was made before format {FORMAT_VERSION}; extract into a new store")
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ValueError("its metadata name no format")
    if content["format"] > FORMAT_VERSION:
        raise made_by_newer(where, f"format {content['format']}; this one reads up to {FORMAT_VERSION}")
    if content["format"] != FORMAT_VERSION:
        raise ValueError(f"its metadata name format {content['format']}")
    return ShardSchema.from_json(content, where)


def row_columns() -> Mapping[str, pa.DataType]:
    """Give the columns of a row, in order."""
    import pyarrow as pa

    return {
        "root": pa.string(),
        "path": pa.string(),
        "part": pa.int32(),
        "start": pa.float64(),
        "end": pa.float64(),
        "generation": pa.int64(),
        "sha256": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "version": pa.string(),
        "kind": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "duration": pa.float64(),
        "taken_at": pa.string(),
        "status": pa.string(),
        "error": pa.string(),
        "error_kind": pa.string(),
        "warnings": pa.string(),
        "grid_thw": pa.list_(pa.int32(), 3),
        "n_tokens": pa.int32(),
        "placeholder": pa.string(),
        "inputs": pa.string(),
        "media": pa.string(),
        "has_features": pa.bool_(),
    }


def arrow_schema(schema: ShardSchema) -> pa.Schema:
    """Give all columns, those of features last, with the metadata."""
    import pyarrow as pa

    columns = dict(row_columns()) | {spec.column: pa.large_binary() for spec in schema.tensors}
    content = json.dumps({"format": FORMAT_VERSION, **schema.to_json()}, sort_keys=True).encode()
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()]).with_metadata({METADATA_KEY: content})


def check_columns(found: pa.Schema, schema: ShardSchema, where: str) -> None:
    """Hold a file's columns against its metadata. ValueError where they differ, ConfigError for unknown ones."""
    expected = arrow_schema(schema)
    if unknown := [name for name in found.names if name not in expected.names]:
        raise made_by_newer(where, f"the unknown column {unknown[0]}")
    same_types = (found.field(name).type == expected.field(name).type for name in expected.names)
    if found.names != expected.names or not all(same_types):
        raise ValueError(f"its columns are not those of format {FORMAT_VERSION}")
