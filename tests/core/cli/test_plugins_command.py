"""``octavo plugins`` tells what is installed without importing it, and what is wrong without failing itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.core.cli.conftest import Install

from octavo.cli import main

GOOD = """
from octavo import PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=(1, 1), summary="Good", incompatible=("speculation",))

@hookimpl
def octavo_scheduling_policies():
    return [Provider("good", "octavo.request:Request"), Provider("other", "x:Y", requires=("not_there",))]
"""
NAMES_NOTHING = GOOD.replace("octavo.request:Request", "octavo.request:Missing")
EXPLODES = "raise SystemError('imported')"


def output(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(words) == status
    return capsys.readouterr().out


def test_list_reads_metadata_only(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("bad", EXPLODES)
    rows = json.loads(output(capsys, "plugins", "list", "--json"))
    assert {"name": "bad", "distribution": "acme-bad", "version": "1.2", "module": "acme_bad", "default": False} in rows
    assert {row["name"]: row["default"] for row in rows}["models"]
    lines = output(capsys, "plugins", "list").splitlines()
    assert lines[0].split() == ["NAME", "DISTRIBUTION", "VERSION", "DEFAULT", "MODULE"]
    assert ["bad", "acme-bad", "1.2", "acme_bad"] in [line.split() for line in lines]


def test_info_tells_what_one_plugin_provides(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("good", GOOD)
    install("bad", EXPLODES)  # is not imported
    (description,) = json.loads(output(capsys, "plugins", "info", "good", "--json"))
    assert description["provides"] == {"octavo_scheduling_policies": ["good", "other"]}
    assert description["api"] == [1, 1]
    assert description["incompatible"] == ["speculation"]
    text = output(capsys, "plugins", "info", "good")
    assert "good: Good" in text
    assert "acme-good 1.2" in text
    assert "octavo_scheduling_policies" in text


def test_info_of_an_unknown_plugin_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "info", "nope"]) == 2
    assert "plugin 'nope' is not installed; installed: awq" in capsys.readouterr().err


def test_doctor_finds_what_is_broken_and_goes_on(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("good", GOOD)
    install("bad", EXPLODES)
    install("hollow", NAMES_NOTHING)
    reports = {r["name"]: r for r in json.loads(output(capsys, "plugins", "doctor", "--json", status=1))}
    assert reports["good"]["status"] == "ok"
    assert reports["good"]["lacking"] == [
        "octavo_scheduling_policies: 'other' is passed over, the module 'not_there' is not installed"
    ]
    assert reports["bad"]["status"] == "broken"
    assert "SystemError: imported" in reports["bad"]["problems"][0]
    assert "octavo.request:Missing" in reports["hollow"]["problems"][0]
    text = output(capsys, "plugins", "doctor", status=1)
    assert "bad (acme-bad 1.2): broken" in text
    assert text.splitlines()[-1].endswith("plugins, 2 broken")


def test_matrix_shows_what_works_together(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("good", GOOD)
    matrix = json.loads(output(capsys, "plugins", "matrix", "--json"))
    assert matrix["good"]["speculation"] is False
    assert matrix["good"]["overlap"] is True
    (row,) = [line for line in output(capsys, "plugins", "matrix").splitlines() if line.startswith("good ")]
    assert row.split().count("no") == 1


def test_new_writes_a_package_whose_own_test_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert f"wrote {folder}" in output(capsys, "plugins", "new", "my-order", "--into", str(folder))
    info = tmp_path / "octavo_my_order-0.1.0.dist-info"  # what installing the package leaves behind
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: octavo-my-order\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[octavo.plugins]\nmy-order = octavo_my_order.plugin\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert 'my-order = "octavo_my_order.plugin"' in (folder / "pyproject.toml").read_text()


def test_new_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("kept")
    assert main(["plugins", "new", "mine", "--into", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("name", "reason"), [("Mine", "cannot be a plugin's name"), ("a--b", "cannot be"), ("awq", "is installed already")]
)
def test_new_refuses_names_that_cannot_be(name: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "new", name]) == 2
    assert reason in capsys.readouterr().err
