"""Values to bytes of a column and back: byte planes, all bytes of the highest significance first.

The high bytes of neighbouring values are alike and compress, the low bytes do not (docs/format.md). Knows nothing of
files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvsplit.runtime.dtypes import DTYPE_BYTES, SCALE_BYTES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The exponent's bits, all set in an infinity or NaN
_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
_WORDS_AT_A_TIME = 1 << 16


def to_planes(raw: npt.NDArray[np.uint8], itemsize: int) -> memoryview:
    """Turn little-endian values into byte planes, the most significant first. The only copy that is made of them."""
    import numpy as np

    return np.ascontiguousarray(raw.reshape(-1, itemsize).T[::-1]).reshape(-1).data


def from_planes(planes: bytes | memoryview, itemsize: int) -> npt.NDArray[np.uint8]:
    """Invert `to_planes`; the result is flat. Shifts whole words, a cache's worth at a time."""
    import numpy as np

    split = np.frombuffer(planes, np.uint8).reshape(itemsize, -1)
    words = np.empty(split.shape[1], f"<u{itemsize}")
    for begin in range(0, len(words), _WORDS_AT_A_TIME):
        some = words[begin : begin + _WORDS_AT_A_TIME]
        some[:] = split[0, begin : begin + _WORDS_AT_A_TIME]
        for plane in split[1:]:
            some <<= 8
            some |= plane[begin : begin + _WORDS_AT_A_TIME]
    raw: npt.NDArray[np.uint8] = words.view(np.uint8)
    return raw


def encode(raw: npt.NDArray[np.uint8], dtype: str) -> bytes | memoryview:
    """Turn `StoredTensor.raw` into the bytes of its column; of int8 all values, then the scales' byte planes.

    Raises:
        ValueError: A value, or a scale, is not finite.
    """
    import numpy as np

    if dtype == "int8":
        scales = to_planes(np.ascontiguousarray(raw[:, -SCALE_BYTES:]), SCALE_BYTES)
        blob: bytes | memoryview = np.ascontiguousarray(raw[:, :-SCALE_BYTES]).tobytes() + bytes(scales)
    else:
        blob = to_planes(raw, DTYPE_BYTES[dtype])
    _check_finite(blob, dtype, len(raw))
    return blob


def decode(blob: memoryview, dtype: str, n_tokens: int) -> npt.NDArray[np.uint8]:
    """Invert `encode`: uint8 [n_tokens, bytes a token]. ValueError if a value, or a scale, is not finite."""
    import numpy as np

    _check_finite(blob, dtype, n_tokens)
    if dtype == "int8":
        values, scales = blob[: -SCALE_BYTES * n_tokens], blob[-SCALE_BYTES * n_tokens :]
        halves = (np.frombuffer(values, np.uint8), from_planes(scales, SCALE_BYTES))
        return np.concatenate([half.reshape(n_tokens, -1) for half in halves], axis=1)
    return from_planes(blob, DTYPE_BYTES[dtype]).reshape(n_tokens, -1)


def _check_finite(blob: bytes | memoryview, dtype: str, n_tokens: int) -> None:
    sound = all_finite(blob[-SCALE_BYTES * n_tokens :], "float32") if dtype == "int8" else all_finite(blob, dtype)
    if not sound:
        raise ValueError("has values that are not finite")


def all_finite(planes: bytes | memoryview, dtype: str) -> bool:
    """Say whether no value of these byte planes is an infinity or NaN.

    Their exponents have all bits set. Most of those bits are in the first plane, which is nearly always all that has
    to be looked at.
    """
    import numpy as np

    split = np.frombuffer(planes, np.uint8).reshape(DTYPE_BYTES[dtype], -1)
    high, low = (_EXPONENT[dtype] >> 8 * place & 0xFF for place in (DTYPE_BYTES[dtype] - 1, DTYPE_BYTES[dtype] - 2))
    suspect = (split[0] & high) == high
    return not bool(suspect.any() and (split[1][suspect] & low == low).any())
