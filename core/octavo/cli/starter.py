"""The package that ``octavo plugins new`` writes: complete, small, and passing its own test."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from octavo import __version__
from octavo.errors import ConfigError
from octavo.hooks import API_VERSION, ENTRY_POINT_GROUP

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "octavo-$name"
version = "0.1.0"
description = "The Octavo plugin $name"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["octavo>=$version"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."$group"]
$name = "$module.plugin"

[tool.hatch.build.targets.wheel]
packages = ["$module"]
""",
    "README.md": """\
# octavo-$name

A plugin for Octavo.

    pip install -e '.[test]'
    octavo plugins info $name
    octavo serve MODEL --plugins $name
    pytest

The hooks that it can implement, and what each returns, are described in `octavo.hooks`.
""",
    "$module/__init__.py": """\
\"\"\"The Octavo plugin $name.\"\"\"
""",
    "$module/plugin.py": """\
\"\"\"What Octavo sees of this plugin. Keep imports light: it is imported whenever the plugin is selected.\"\"\"

from __future__ import annotations

from collections.abc import Sequence

from octavo import PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=($api, $api), summary="The order in which short prompts go first")


@hookimpl
def octavo_scheduling_policies() -> Sequence[Provider]:
    \"\"\"Used with ``--scheduling-policy $name``.\"\"\"
    return [Provider("$name", "$module.policy:ShortestFirst")]
""",
    "$module/policy.py": """\
\"\"\"An example to replace: short prompts are admitted before long ones.\"\"\"

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from octavo.request import Request


class ShortestFirst:
    \"\"\"See ``octavo.interfaces.SchedulingPolicy``.\"\"\"

    name: ClassVar[str] = "$name"

    def key(self, request: Request) -> tuple[float, ...]:
        return (float(request.num_prompt),)

    def victim(self, running: Sequence[Request]) -> Request:
        return running[-1]
""",
    "tests/test_plugin.py": """\
\"\"\"What the plugin promises.\"\"\"

from __future__ import annotations

from octavo import SamplingParams
from octavo.plugins import PluginHost, discover
from octavo.request import Request


def request(num_prompt: int) -> Request:
    return Request("r", [1] * num_prompt, SamplingParams(), seed=0, max_total_tokens=num_prompt + 16)


def test_octavo_finds_the_plugin_and_its_policy() -> None:
    host = PluginHost(tuple(discover()["$name"]))
    policy = host.scheduling_policies()["$name"].resolve()()
    assert policy.key(request(1)) < policy.key(request(2))


def test_the_last_admitted_request_gives_way() -> None:
    host = PluginHost(tuple(discover()["$name"]))
    policy = host.scheduling_policies()["$name"].resolve()()
    first, last = request(1), request(2)
    assert policy.victim([first, last]) is last
""",
}


def write(name: str, folder: Path | None = None) -> Path:
    """Write the starter of plugin ``name`` into ``folder`` (``None``: ``octavo-NAME`` here); returns the folder.

    Raises:
        ConfigError: the name cannot be a plugin's, or the folder exists and is not empty; nothing is overwritten.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot be a plugin's name: use lower-case letters, digits and single hyphens")
    folder = folder or Path(f"octavo-{name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; name another folder with --into")
    words = {
        "name": name,
        "module": f"octavo_{name.replace('-', '_')}",
        "api": str(API_VERSION),
        "group": ENTRY_POINT_GROUP,
        "version": __version__,
    }
    for file, content in FILES.items():
        path = folder / Template(file).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(content).substitute(words), encoding="utf-8")
    return folder
