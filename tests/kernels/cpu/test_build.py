"""Compiling the kernels on installation: what happens with, without and with a broken compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo_cpu.library
from octavo.operations import LinearNeed
from octavo_cpu import build
from octavo_cpu.linear import PackedLinear


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The package's sources somewhere else, with nothing compiled."""
    ignored = shutil.ignore_patterns("*.so", "*.txt", "__pycache__")
    return Path(shutil.copytree(build.HERE, tmp_path / "octavo_cpu", ignore=ignored))


def run_build(folder: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("CC", compiler)
    return subprocess.run([sys.executable, "build.py"], cwd=folder, capture_output=True, text=True, check=False)


def fake_compiler(folder: Path, script: str) -> str:
    compiler = folder / "fake-cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_every_variant_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake_compiler(folder, 'while [ "$1" != -o ]; do shift; done; touch "$2"')
    result = run_build(folder, monkeypatch, compiler)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == sorted(str(path) for path in folder.glob("kernels-*.so"))
    assert (folder / "kernels-baseline.so").exists()
    assert not (folder / "build_error.txt").exists()


def test_a_compiler_that_fails_is_quoted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_build(folder, monkeypatch, fake_compiler(folder, "echo 'vectors.h: no such luck' >&2; exit 1"))
    assert result.returncode != 0
    assert "(baseline) could not be compiled" in result.stderr
    assert "vectors.h: no such luck" in (folder / "build_error.txt").read_text()


def test_without_a_compiler_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kernels-baseline.so").touch()
    os.utime(folder / "kernels-baseline.so", (0, 0))
    run_build(folder, monkeypatch, "/no/such/compiler")
    assert not (folder / "kernels-baseline.so").exists(), "a library of older sources must not stay"
    assert "no C compiler was found when octavo was installed; install gcc" in (folder / "build_error.txt").read_text()


def test_a_library_that_is_newer_than_its_sources_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake_compiler(folder, 'while [ "$1" != -o ]; do shift; done; echo made >>"$2"')
    for _ in range(2):
        assert run_build(folder, monkeypatch, compiler).returncode == 0
    assert (folder / "kernels-baseline.so").read_text() == "made\n"


def test_kernels_pass_the_reason_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octavo_cpu.library, "library_path", lambda variant: folder / f"kernels-{variant}.so")
    monkeypatch.setattr(octavo_cpu.library, "ERROR_FILE", folder / "build_error.txt")
    need = LinearNeed(torch.device("cpu"), torch.float32, 64, 64)
    (lack,) = PackedLinear.missing(need)
    assert "were not compiled when octavo was installed; run `python -m octavo_cpu.build`" in lack
    (folder / "build_error.txt").write_text("the compiler said no\n")
    assert PackedLinear.missing(need) == ["the compiler said no"]
