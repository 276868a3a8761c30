"""What is run over every model family, or every pair of settings, only when asked to: it takes minutes.

docs/models.md has what came of the families.
"""

from __future__ import annotations

import os

import pytest

EVERY = "QVSPLIT_EVERY_MODEL"
further = pytest.mark.skipif(not os.environ.get(EVERY), reason=f"over every further family or setting: set {EVERY}=1")
