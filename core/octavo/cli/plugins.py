"""``octavo plugins``: what is installed, what it provides, whether it works, and how to start another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from octavo.cli import starter
from octavo.errors import OctavoError, PluginError
from octavo.hooks import API_VERSION, CAPABILITIES, Provider
from octavo.plugins import DEFAULT_PLUGINS, PluginHost, PluginRecord, discover

PROVIDER_HOOKS = (
    "octavo_models",
    "octavo_weight_formats",
    "octavo_quantizations",
    "octavo_attention_backends",
    "octavo_kernels",
    "octavo_kernel_compilers",
    "octavo_kernel_benchmarks",
    "octavo_prefix_caches",
    "octavo_scheduling_policies",
    "octavo_drafters",
    "octavo_logits_processors",
)
"""Hooks whose results are classes that ``doctor`` tries to import."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands; each sets ``action``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, action: Any, summary: str, *, prints_data: bool = True) -> argparse.ArgumentParser:
        leaf: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
        leaf.set_defaults(action=action)
        leaf.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if prints_data:
            leaf.add_argument("--json", action="store_true", help="print JSON, for programs")
        return leaf

    command("list", list_plugins, "every installed plugin, from metadata; imports none")
    info = command("info", show_plugin, "what one plugin provides; imports it")
    info.add_argument("name", metavar="NAME", help="the plugin's name, as in 'octavo plugins list'")
    command("doctor", check_plugins, "import each plugin and everything it names; tells what is broken or lacking")
    command("matrix", show_matrix, "which plugin works with which capability")
    new = command("new", start_plugin, "write a complete package to start a plugin from", prints_data=False)
    new.add_argument("name", metavar="NAME", help="the plugin's name: lower-case letters, digits and hyphens")
    new.add_argument("--into", type=Path, metavar="FOLDER", help="where to write (default: ./octavo-NAME)")


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; returns the exit status."""
    status: int = args.action(args)
    return status


def list_plugins(args: argparse.Namespace) -> int:
    """Name, distribution, version, and whether it is selected by default."""
    records = [record for records in discover().values() for record in records]
    rows = [{**msgspec.to_builtins(record), "default": record.name in DEFAULT_PLUGINS} for record in records]
    if args.json:
        return _print_json(rows)
    table: list[Sequence[str]] = [("NAME", "DISTRIBUTION", "VERSION", "DEFAULT", "MODULE")]
    table += [
        (row["name"], row["distribution"], row["version"], "yes" if row["default"] else "", row["module"])
        for row in rows
    ]
    _print_table(table)
    return 0


def show_plugin(args: argparse.Namespace) -> int:
    """Summary, API range, what it does not work with, and what it provides through each hook."""
    descriptions = [_describe(record) for record in _installed(args.name)]
    if args.json:
        return _print_json(descriptions)
    for description in descriptions:
        low, high = description["api"]
        print(f"{description['name']}: {description['summary']}")
        print(f"  distribution   {description['distribution']} {description['version']}")
        print(f"  module         {description['module']}")
        print(f"  plugin API     {low} to {high} (this Octavo: {API_VERSION})")
        print(f"  default        {'yes' if description['default'] else 'no'}")
        print(f"  incompatible   {', '.join(description['incompatible']) or 'with nothing'}")
        for hook, names in description["provides"].items():
            print(f"  {hook}")
            for name in names:
                print(f"    {name}")
        if not description["provides"]:
            print("  provides nothing")
    return 0


def check_plugins(args: argparse.Namespace) -> int:
    """Each plugin on its own; exit status 1 when one is broken. Lacking an optional module is no fault."""
    reports = [_examine(record) for records in discover().values() for record in records]
    broken = sum(report["status"] == "broken" for report in reports)
    if args.json:
        _print_json(reports)
        return int(broken > 0)
    for report in reports:
        print(f"{report['name']} ({report['distribution']} {report['version']}): {report['status']}")
        for line in report["problems"]:
            print(f"  broken   {line}")
        for line in report["lacking"]:
            print(f"  lacking  {line}")
    print(f"{len(reports)} plugins, {broken} broken")
    return int(broken > 0)


def show_matrix(args: argparse.Namespace) -> int:
    """Plugin by capability, as the plugins declare it."""
    matrix: dict[str, Mapping[str, bool]] = {}
    for records in discover().values():
        for record in records:
            matrix |= PluginHost((record,)).matrix()
    if args.json:
        return _print_json(matrix)
    table: list[Sequence[str]] = [("", *CAPABILITIES)]
    table += [
        (name, *("yes" if row[capability] else "no" for capability in CAPABILITIES)) for name, row in matrix.items()
    ]
    _print_table(table)
    return 0


def start_plugin(args: argparse.Namespace) -> int:
    """Write the starter package and say what to do next."""
    taken = discover().get(args.name, [])
    if taken:
        raise PluginError(
            f"a plugin called '{args.name}' is installed already ({taken[0].distribution}); use another name"
        )
    folder = starter.write(args.name, args.into)
    print(f"wrote {folder}")
    print(f"  pip install -e {folder}")
    print(f"  octavo plugins info {args.name}")
    print(f"  pytest {folder}")
    return 0


def _installed(name: str) -> Sequence[PluginRecord]:
    installed = discover()
    if name not in installed:
        raise PluginError(f"plugin '{name}' is not installed; installed: {', '.join(installed) or 'none'}")
    return installed[name]


def _describe(record: PluginRecord) -> dict[str, Any]:
    host = PluginHost((record,))
    info = host.infos[record.name]
    return {
        **msgspec.to_builtins(record),
        "default": record.name in DEFAULT_PLUGINS,
        "summary": info.summary,
        "api": list(info.api),
        "incompatible": list(info.incompatible),
        "provides": dict(sorted(host.provided_by(record.name).items())),
    }


def _examine(record: PluginRecord) -> dict[str, Any]:
    """Import one plugin and resolve every class that it names."""
    problems: list[str] = []
    lacking: list[str] = []
    try:
        host = PluginHost((record,))
        for hook in PROVIDER_HOOKS:
            for _, provider in host.items(hook):
                problem, lacks = _try(provider)
                problems += [f"{hook}: {problem}"] if problem else []
                lacking += [f"{hook}: '{provider.name}' is passed over, {reason}" for reason in lacks]
    except OctavoError as error:
        problems.append(str(error))
    return {
        **msgspec.to_builtins(record),
        "status": "broken" if problems else "ok",
        "problems": problems,
        "lacking": lacking,
    }


def _try(provider: Provider) -> tuple[str | None, list[str]]:
    lacks = provider.lacking()
    if not lacks:
        try:
            provider.resolve()
        except OctavoError as error:
            return str(error), []
    return None, lacks


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2))
    return 0


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
