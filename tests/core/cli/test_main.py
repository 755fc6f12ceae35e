"""The command starts quickly, explains errors in one line, and lets plugins join."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.core.cli.conftest import Install

from octavo.cli import COMMANDS, main

COMMAND_PLUGIN = """
from octavo import OptionGroup, PluginInfo, hookimpl

plugin = PluginInfo(api=(1, 1), summary="Adds a command")

def greet(parser):
    parser.add_argument("name")
    parser.set_defaults(run=lambda args: print("hello", args.name) or 3)

@hookimpl
def octavo_commands():
    return {"%s": greet}
"""


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What ``octavo WORDS`` says on stderr when it ends with status 2, in its first line."""
    try:
        status = main(words)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("words", [["--help"], ["plugins", "list"], ["bench", "serve", "--help"], ["chat", "--help"]])
def test_starting_imports_neither_torch_nor_transformers(words: list[str]) -> None:
    code = (
        "import sys, octavo.cli\n"
        "try: octavo.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(path.split()[0] in text for path in COMMANDS)


def test_help_of_a_group_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("serve", "throughput", "latency"))


def test_an_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "generate", "--prompt", "x", "--max-model-length", "5")
    assert error.startswith("octavo: error: unknown option --max-model-length; did you mean --max-model-len?\n")
    assert "octavo generate --help" in error


def test_an_option_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --max-model-len?" in fails(capsys, "generate", "--prompt", "x", "--max-model-le", "5")


def test_one_word_too_many_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'twice' is one argument too many" in fails(capsys, "generate", "model", "--prompt", "x", "twice")


def test_a_configuration_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "generate", "m", "--prompt", "x", "--block-size", "17")
    assert error == "octavo: error: block_size must be a power of two, not 17\n"


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(Exception, match="power of two"):
        main(["generate", "m", "--prompt", "x", "--block-size", "17", "--debug"])


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in fails(capsys)
    assert "invalid choice: 'severe'" in fails(capsys, "severe")


def test_listed_plugins_add_commands(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("greeter", COMMAND_PLUGIN % "greet")
    assert "invalid choice" in fails(capsys, "greet", "you")  # not selected, not imported
    assert main(["greet", "you", "--plugins", "greeter"]) == 3
    assert capsys.readouterr().out == "hello you\n"


def test_a_plugin_cannot_replace_a_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("greeter", COMMAND_PLUGIN % "chat")
    assert "provides the command 'chat'" in fails(capsys, "chat", "--plugins", "greeter")


def test_a_broken_plugin_stops_the_program_and_says_how_to_go_on(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("greeter", "import nowhere")
    error = fails(capsys, "generate", "--prompt", "x", "--plugins", "greeter")
    assert error.startswith("octavo: error: plugin 'greeter' of acme-greeter 1.2 cannot be imported")
    assert "no:greeter" in error
