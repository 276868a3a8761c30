"""Bytes of a token, by storage dtype."""

from __future__ import annotations

import pytest

from qvsplit.runtime.dtypes import STORAGE_DTYPES, token_bytes


@pytest.mark.parametrize(("dtype", "length"), [("float32", 64), ("bfloat16", 32), ("float16", 32), ("int8", 20)])
def test_bytes_of_a_token_of_sixteen_values(dtype, length):
    assert token_bytes(dtype, 16) == length
    assert dtype in STORAGE_DTYPES
