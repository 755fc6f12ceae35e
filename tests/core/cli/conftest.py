"""Plugins that exist for one test, and a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.core.bench.conftest import write_tiny_model

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(name, source)`` makes a distribution ``acme-NAME`` 1.2 whose plugin is a module with that source."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install_plugin(name: str, source: str) -> None:
        module = f"acme_{name.replace('-', '_')}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[octavo.plugins]\n{name} = {module}\n")

    return install_plugin


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("model"))
