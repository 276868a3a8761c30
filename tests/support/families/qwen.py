"""The Qwen-VL line, the Omni models and GLM-4.1V."""

from __future__ import annotations

from tests.support.families.building import TinyFamily

QWEN: list[TinyFamily] = []
