"""What the documents say is true: figures come from files, links lead somewhere, examples run."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from benchmarks import report

from octavo.cli import COMMANDS, serve
from octavo.cli.options import engine_parser
from octavo.hooks import Hooks
from octavo.plugins import PluginHost, PluginRecord
from octavo.request import Request, SamplingParams
from octavo.server.schemas import ChatBody, CompletionBody

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
README = (ROOT / "README.md").read_text()


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_shows_the_newest_measurements() -> None:
    assert report.main(["--check"]) == 0


def test_of_each_kind_the_newest_file_is_shown_whatever_it_is_called(tmp_path: Path) -> None:
    for name, date, speed in (("cpu-a.json", "2026-02-02", 20.0), ("cpu-b.json", "2026-01-01", 10.0)):
        result = {
            "date": date,
            "commit": "abc",
            "hardware": {"cpu": "A CPU"},
            "versions": {"torch": "2.13"},
            "model": "a model",
            "unit": "tokens a second",
            "results": {
                "octavo float32": {"decode": speed / 2},
                "octavo bfloat16": {"decode": speed},
                "x": {"decode": 5.0},
            },
        }
        (tmp_path / name).write_text(json.dumps(result))
    text = report.tables(tmp_path)
    assert "| octavo | 20 |" in text
    assert "| octavo / x | 4.0× |" in text
    assert "`cpu-a.json`: commit abc, 2026-02-02; torch 2.13." in text
    assert "cpu-b" not in text


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the lines"):
        report.replaced(f"{report.END} {report.BEGIN}", "x")


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_files_that_are_named_exist(document: Path) -> None:
    names = re.findall(r"`((?:core|kernels|plugins|tests|docs|examples|benchmarks)/[\w./-]+)`", document.read_text())
    assert [name for name in names if not (ROOT / name).exists() and not (document.parent / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_that_are_shown_exist(document: Path) -> None:
    known = {name.split()[0] for name in COMMANDS} | {"quantize"}
    shown = set(re.findall(r"^ *octavo ([a-z]+)", document.read_text(), re.MULTILINE))
    assert shown <= known


def test_make_targets_that_are_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"^ *make ([a-z]+)|`make ([a-z]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{target[0] or target[1]}:", makefile, re.MULTILINE), (document, target)


def test_names_that_the_manual_for_plugin_authors_refers_to_exist() -> None:
    references = re.findall(r":(?:class|mod):`~?(octavo[\w.]*)`", inspect.getsource(Hooks))
    assert references
    for reference in references:
        module, _, name = reference.rpartition(".")
        try:
            importlib.import_module(reference)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), name), reference


def test_the_plugin_in_twenty_lines_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (block for block in code(README, "python") if block.startswith("# octavo_shortest.py"))
    assert len(source.splitlines()) <= 21
    metadata = tomllib.loads(code(README, "toml")[0])
    (tmp_path / "octavo_shortest.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    ((name, module),) = metadata["project"]["entry-points"]["octavo.plugins"].items()
    host = PluginHost([PluginRecord(name, metadata["project"]["name"], metadata["project"]["version"], module)])
    policy = host.scheduling_policies()["shortest"].resolve()()
    short, long = (Request("r", [1] * n, SamplingParams(), seed=0, max_total_tokens=9) for n in (2, 5))
    assert policy.key(short) < policy.key(long)
    assert policy.victim([short, long]) is long


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "plugins").glob("*.md")), ids=named)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Blocks that begin with a comment naming a file are that file; all others are run in order, in one program."""
    program = []
    for block in code(page.read_text(), "python"):
        name = re.match(r"# ([\w./]+\.py)\n", block)
        if name:
            file = tmp_path / name[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
            program.append(f"import {name[1].removesuffix('.py').replace('/', '.')}\n")
        else:
            program.append(block)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_about_serving_names_every_option_of_the_server_and_every_field() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    missing = [flag for flag in options if flag not in page and flag not in ("--help", "--log-level")]
    assert missing == []
    fields = {*ChatBody.__struct_fields__, *CompletionBody.__struct_fields__} - {"best_of"}
    assert [field for field in fields if f"`{field}`" not in page] == []
    known = {flag for action in engine_parser()._actions for flag in action.option_strings} | set(options)
    assert [flag for flag in re.findall(r"`(--[a-z-]+)", page) if flag not in known and flag != "--help"] == []
