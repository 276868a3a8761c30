"""What is run over every model family only when asked to: it takes minutes, and docs/models.md has what came of it."""

from __future__ import annotations

import os

import pytest

EVERY = "QVSPLIT_EVERY_MODEL"
further = pytest.mark.skipif(not os.environ.get(EVERY), reason=f"over every further family: set {EVERY}=1")
