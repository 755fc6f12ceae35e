"""The plugin ``quantize``: the command ``octavo quantize``, which makes quantized checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo import PluginInfo, hookimpl

METHODS = ("fp8", "awq", "gptq")

plugin = PluginInfo(api=(1, 1), summary="The command that makes quantized checkpoints")


@hookimpl
def octavo_commands() -> Mapping[str, Any]:
    return {"quantize": add_quantize}


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``octavo quantize``."""
    parser.description = "Make a quantized checkpoint in a format that other servers read, too."
    parser.add_argument("model", help="a folder or a name on the hub, not quantized")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--method", choices=METHODS, required=True, help="fp8 needs no calibration and no library")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale (awq, gptq)")
    parser.add_argument("--calibration", type=Path, help="a text file, one sample a line (awq, gptq)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from octavo_quant.command import run  # torch is needed to do it, not to describe it

    return run(arguments)
