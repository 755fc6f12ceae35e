"""The build hook: compiles the CPU kernels and tags the wheel for the platform when that worked."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelBuildHook(BuildHookInterface[Any]):
    """Without a compiler the wheel is pure, and the kernels say at start-up why they cannot be used."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root, "kernels", "octavo_cpu")
        libraries = runpy.run_path(str(folder / "build.py"))["build"]()
        build_data["artifacts"] += ["kernels/octavo_cpu/kernels-*.so", "kernels/octavo_cpu/build_error.txt"]
        if libraries:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"  # called through ctypes: any Python will do


def _platform() -> str:
    """This machine's own tag; a manylinux tag would promise more than was checked."""
    platforms = (tag.platform for tag in sys_tags())
    return next(platform for platform in platforms if not platform.startswith(("manylinux", "musllinux")))
