"""Where tests find the published weights of Virtual Taobao; they are never part of the project."""

from pathlib import Path

import pytest

WEIGHTS = Path(__file__).parents[1] / "../shared/data/virtual_taobao"


def weights() -> Path:
    """Their folder; skips where they are missing."""
    if not WEIGHTS.is_dir():
        pytest.skip("the weights are not on this machine: ../shared/data/virtual_taobao is missing")
    return WEIGHTS
