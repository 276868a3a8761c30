"""Tiny random checkpoints of every model family on disk, and transformers' full model to hold answers against."""

from __future__ import annotations

import importlib.util

from tests.support.families.building import TinyFamily, make_checkpoint
from tests.support.families.qwen import QWEN

__all__ = ["FAMILIES", "TinyFamily", "make_checkpoint"]

FAMILIES: dict[str, TinyFamily] = {family.model_type: family for family in QWEN}
if importlib.util.find_spec("tests.support.families.others"):
    others = importlib.import_module("tests.support.families.others").OTHERS
    FAMILIES |= {family.model_type: family for family in others}
