"""The footer checksum, which Parquet itself lacks."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvsplit.store.footer import CHECKSUM_BYTES, CHECKSUM_MAGIC, NotAShard, insert_checksum, read_footer


@pytest.fixture
def plain() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"x": list(range(100))}), stream)
    return stream.getvalue()


@pytest.fixture
def data(plain) -> bytes:
    stream = io.BytesIO(plain)
    assert insert_checksum(stream) == len(plain) + CHECKSUM_BYTES == len(stream.getvalue())
    return stream.getvalue()


def test_it_lies_before_the_footer_where_no_parquet_reader_looks(plain, data):
    length = int.from_bytes(plain[-8:-4], "little")
    footer = plain[-8 - length : -8]
    assert data[: -8 - length - CHECKSUM_BYTES] == plain[: -8 - length]
    assert data.endswith(CHECKSUM_MAGIC + hashlib.sha256(footer).digest() + plain[-8 - length :])
    assert read_footer(io.BytesIO(data)) == footer
    assert pq.read_table(io.BytesIO(data)).equals(pq.read_table(io.BytesIO(plain)))


def test_a_changed_byte_is_caught_wherever_it_is(data):
    length = int.from_bytes(data[-8:-4], "little")
    for place in range(len(data) - 8 - length - CHECKSUM_BYTES, len(data)):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(ValueError):  # noqa: PT011 - of any kind
            read_footer(io.BytesIO(bytes(broken)))


def test_a_file_cut_short_is_caught_at_any_length(data):
    for length in range(len(data)):
        with pytest.raises(ValueError):  # noqa: PT011 - of any kind
            read_footer(io.BytesIO(data[:length]))


def test_other_files_are_told_apart_from_damaged_ones(plain, data):
    with pytest.raises(NotAShard, match="not a Parquet file"):
        read_footer(io.BytesIO(b"path,question\n" * 50))
    with pytest.raises(NotAShard, match="without a footer checksum"):
        read_footer(io.BytesIO(plain))
    with pytest.raises(ValueError, match="cut short or overwritten") as caught:
        read_footer(io.BytesIO(data[:-1]))
    assert not isinstance(caught.value, NotAShard)


def test_a_stream_that_gives_few_bytes_at_a_time_is_read_to_the_end(data):
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 5))

    assert read_footer(Slow(data)) == read_footer(io.BytesIO(data))
