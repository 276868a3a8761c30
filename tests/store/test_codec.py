"""Byte planes: every value comes back bit for bit, and none that is not finite passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvsplit.runtime.dtypes import DTYPE_BYTES
from qvsplit.store import codec
from tests.support import rows


@given(st.binary(max_size=400), st.sampled_from([1, 2, 4]))
def test_planes_come_back(data, itemsize):
    raw = np.frombuffer(data[: len(data) // itemsize * itemsize], np.uint8)
    assert np.array_equal(codec.from_planes(codec.to_planes(raw, itemsize), itemsize), raw)


def test_planes_of_more_than_one_cache_load_come_back(monkeypatch):
    monkeypatch.setattr(codec, "_WORDS_AT_A_TIME", 7)
    raw = np.random.default_rng(0).integers(0, 256, 4 * 100, np.uint8)
    assert np.array_equal(codec.from_planes(codec.to_planes(raw, 4), 4), raw)


def test_the_most_significant_bytes_come_first():
    assert codec.to_planes(np.array([0x0102, 0x0304], "<u2").view(np.uint8), 2) == bytes([1, 3, 2, 4])
    assert codec.to_planes(np.array([0x01020304, 0x05060708], "<u4").view(np.uint8), 4) == bytes(
        [1, 5, 2, 6, 3, 7, 4, 8]
    )


@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_values_come_back_as_they_were(dtype):
    raw = rows.values(5, dtype)
    blob = codec.encode(raw, dtype)
    assert len(blob) == raw.nbytes
    assert np.array_equal(codec.decode(memoryview(blob), dtype, 5), raw)


def test_int8_has_its_values_first_and_then_the_scales_in_planes():
    raw = rows.values(3, "int8")
    blob = codec.encode(raw, "int8")
    assert blob[: 3 * rows.WIDTH] == raw[:, : rows.WIDTH].tobytes()
    assert blob[3 * rows.WIDTH :] == codec.to_planes(np.ascontiguousarray(raw[:, rows.WIDTH :]), 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_is_seen(dtype, bad):
    raw, itemsize = rows.values(3, dtype).copy(), DTYPE_BYTES[dtype]
    assert codec.all_finite(codec.to_planes(raw, itemsize), dtype)
    whole = codec.to_planes(raw, itemsize)
    raw[1, 3 * itemsize : 4 * itemsize] = rows.as_stored(np.array([bad], np.float32), dtype).view(np.uint8)
    assert not codec.all_finite(codec.to_planes(raw, itemsize), dtype)
    with pytest.raises(ValueError, match="finite"):
        codec.encode(raw, dtype)
    with pytest.raises(ValueError, match="finite"):
        codec.decode(memoryview(codec.to_planes(raw, itemsize)), dtype, 3)
    assert codec.decode(memoryview(whole), dtype, 3).shape == raw.shape


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_finite_values_pass(dtype):
    largest = {"float32": 0x7F7FFFFF, "float16": 0x7BFF, "bfloat16": 0x7F7F}[dtype]
    itemsize = DTYPE_BYTES[dtype]
    words = np.array([largest, largest | 1 << 8 * itemsize - 1], f"<u{itemsize}").view(np.uint8)
    assert codec.all_finite(codec.to_planes(words, itemsize), dtype)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_seen(bad):
    raw = rows.values(6, "int8").copy()
    raw[3, rows.WIDTH :] = np.array([bad], np.float32).view(np.uint8)
    with pytest.raises(ValueError, match="finite"):
        codec.encode(raw, "int8")
