"""Tiny random checkpoints of every model family on disk, and transformers' full model to hold answers against."""

from __future__ import annotations

from tests.support.families.building import TinyFamily, make_checkpoint
from tests.support.families.more import MORE
from tests.support.families.others import OTHERS
from tests.support.families.qwen import QWEN

__all__ = ["ALL", "FAMILIES", "MORE", "TinyFamily", "make_checkpoint"]

FAMILIES: dict[str, TinyFamily] = {family.model_type: family for family in QWEN} | OTHERS
ALL: dict[str, TinyFamily] = FAMILIES | MORE
