"""What tests on a GPU share."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.default_model import local_default_model


@pytest.fixture
def smollm2() -> Path:
    """The default model, a real one."""
    path = local_default_model()
    if path is None:
        pytest.skip("the default model is not on this machine; 'python -m octavo.default_model' fetches it")
    return path
