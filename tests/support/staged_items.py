"""Items as they leave the encoders of a cluster, in blocks, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from qvsplit.pipeline.cluster.packing import result_table
from qvsplit.pipeline.items import Result, Staged
from qvsplit.sources.files import FileInfo
from qvsplit.store.row import Row
from qvsplit.store.shard_writer import ShardWriter, encoded
from qvsplit.store.staging import Staging
from tests.support import rows
from tests.support.fake_source import entry

VIDEO_SCHEMA = rows.schema(config=rows.config(videos=rows.VIDEOS))


def image(name: str) -> pa.Table:
    """Give an image that was encoded."""
    pair = rows.item(name)
    one = encoded(*pair, rows.schema())
    return result_table(Result(entry(name), outcome=Staged((pair[0],), None, None, one.bytes)), [one])


def video(name: str, parts: int = 3, videos: dict[str, Any] = rows.VIDEOS) -> pa.Table:
    """Give a video that was encoded."""
    pairs = rows.parts(name, parts)
    every = [encoded(row, its, rows.schema(config=rows.config(videos=videos))) for row, its in pairs]
    outcome = Staged(tuple(row for row, _ in pairs), videos, None, sum(one.bytes for one in every))
    return result_table(Result(entry(name), outcome=outcome), every)


def staged_shard(staging: Staging, name: str, parts: int = 4) -> str:
    """Write a staged shard of one video; give its name."""
    shard = Staging.new_name()
    writer = ShardWriter(staging, shard, VIDEO_SCHEMA)
    for pair in rows.parts(name, parts):
        writer.add(*pair)
    writer.finish()
    return shard


def long_video(staging: Staging, name: str, parts: int = 4) -> pa.Table:
    """Give a video that has a shard of its own."""
    own = tuple(row for row, _ in rows.parts(name, parts))
    return other(name, Staged(own, rows.VIDEOS, staged_shard(staging, name, parts), 1 << 40))


def other(name: str, outcome: object, *, root: str = "/photos", is_read: bool = False) -> pa.Table:
    """Give an item without features."""
    info = FileInfo(rows.sha(name), 10, 5, "1") if is_read else None
    return result_table(Result(entry(name, root=root), info, outcome=outcome))


def block(*tables: pa.Table) -> pa.Table:
    """Give a block as Ray Data makes it of what an encoder gives."""
    return pa.concat_tables(tables)


def blocks(number: int, of: int = 3) -> list[pa.Table]:
    """Give so many blocks of images: `0-0.png`, `0-1.png`, …, `1-0.png`."""
    return [block(*(image(f"{first}-{one}.png") for one in range(of))) for first in range(number)]


NAMES = [f"{first}-{one}.png" for first in range(4) for one in range(3)]  # of `blocks(4)`


def paths(items: Sequence[Sequence[Row]]) -> list[str]:
    """Give the names of items by their rows."""
    return [its[0].path for its in items]
