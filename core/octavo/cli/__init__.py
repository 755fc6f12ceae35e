"""The command ``octavo``.

Starting it is quick: only the module of the command that was asked for is imported, and nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from octavo import __version__
from octavo.cli.options import engine_config, engine_parser
from octavo.errors import OctavoError, PluginError
from octavo.plugins import PluginHost, Selection, select

USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command. Its module has ``add_arguments(parser)`` and ``run(args)``, or ``run(args, config)`` when it
    always needs an engine; both return the exit status."""

    module: str
    summary: str
    engine: Literal["always", "maybe", "never"] = "never"


COMMANDS: Mapping[str, Command] = {
    "serve": Command("octavo.cli.serve", "serve a model to OpenAI clients over HTTP", engine="always"),
    "generate": Command("octavo.cli.generate", "complete prompts offline", engine="always"),
    "chat": Command("octavo.cli.chat", "talk to a model in the terminal", engine="maybe"),
    "bench serve": Command("octavo.bench.serve", "latency and throughput of a running server"),
    "bench throughput": Command("octavo.bench.throughput", "tokens a second, offline", engine="always"),
    "bench latency": Command("octavo.bench.latency", "time of one batch, offline", engine="always"),
    "bench kernels": Command("octavo.bench.kernels", "each kernel against its reference and the device's limits"),
    "plugins": Command("octavo.cli.plugins", "list, inspect, check and start plugins"),
}

GROUPS: Mapping[str, str] = {"bench": "measure an engine or a server"}
"""First words that stand before several commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user can mend is told in one line, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    early = _early_options(words)
    try:
        args = _parser(words, early).parse_args(words)
        status: int = args.start(args)
        sys.stdout.flush()
        return status
    except OctavoError as error:
        if early.debug:
            raise
        print(f"octavo: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


class Parser(argparse.ArgumentParser):
    """Tells errors in one line, and the nearest option when one is unknown."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"octavo: error: {message}\nSee '{self.prog} --help'.\n")

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"'{word}' is one argument too many"
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"unknown option {flag}" + (f"; did you mean {near[0]}?" if near else "")


def _early_parser() -> argparse.ArgumentParser:
    """The options that decide which other options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugins", metavar="LIST", help="plugins to use beside the defaults, separated by commas")
    parser.add_argument(
        "--prefer", action="append", default=[], metavar="NAME=DISTRIBUTION", help="who wins when two provide one name"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _early_options(words: Sequence[str]) -> argparse.Namespace:
    try:
        return _early_parser().parse_known_args(words)[0]
    except argparse.ArgumentError:  # a value is missing: the full parser says so
        return argparse.Namespace(plugins=None, prefer=[], debug="--debug" in words)


def _parser(words: Sequence[str], early: argparse.Namespace) -> Parser:
    """The parser for this command line: all commands by name, the arguments of the one that ``words`` ask for."""
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = Parser(prog="octavo", description="Octavo: a plugin-based serving framework for large language models.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups: dict[str, Any] = {"": commands}
    # "octavo plugins" must work when a plugin does not: it imports none before it is asked to
    host = None if words[:1] == ["plugins"] else _host(early)
    for path, command in COMMANDS.items():
        group, _, name = path.rpartition(" ")
        if group not in groups:
            parent = commands.add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = parent.add_subparsers(title="commands", metavar="COMMAND", required=True)
        asked = list(words[: path.count(" ") + 1]) == path.split()
        parents = [everywhere]
        if asked and command.engine != "never":
            parents.append(engine_parser(host.items("octavo_options") if host else ()))
        leaf = groups[group].add_parser(name, help=command.summary, description=command.summary, parents=parents)
        if asked:
            _fill(leaf, command)
    for name, add_arguments in (host.mappings("octavo_commands") if host else {}).items():
        if name in COMMANDS or name in GROUPS:
            raise PluginError(f"a plugin provides the command '{name}', which Octavo has itself; leave the plugin out")
        leaf = groups[""].add_parser(name, parents=[_early_parser()])
        add_arguments(leaf)
        leaf.set_defaults(start=_plugin_start)
    return parser


def _fill(parser: Parser, command: Command) -> None:
    module = importlib.import_module(command.module)
    module.add_arguments(parser)
    start: Callable[[argparse.Namespace], int] = module.run
    if command.engine == "always":
        start = lambda args: module.run(args, engine_config(args))  # noqa: E731
    parser.set_defaults(start=start)


def _plugin_start(args: argparse.Namespace) -> int:
    return int(args.run(args) or 0)


def _host(early: argparse.Namespace) -> PluginHost:
    """The plugins whose options and commands belong to this command line: the defaults and the listed ones."""
    prefer = dict(pair.split("=", 1) for pair in early.prefer if "=" in pair)
    return PluginHost(select(Selection.parse(early.plugins), {}, prefer=prefer), prefer=prefer)
