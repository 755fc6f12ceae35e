"""Where and with what a benchmark ran, its table for people and its JSON for later."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.bench.metrics import LATENCIES

DISTRIBUTIONS = ("octavo", "torch", "triton", "transformers", "numpy", "uvloop")


def environment() -> dict[str, Any]:
    """Date, versions, hardware and, within a git checkout, the commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(Path(__file__).parent),
        "python": platform.python_version(),
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and GPUs as the driver names them."""
    pages = {"memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {"cpu": _processor(), "cores": cores, **pages, "gpus": gpus.splitlines() if gpus else []}


def commit(folder: Path) -> str | None:
    """The commit of the checkout that ``folder`` is in, with ``+changes`` when files differ; None: no checkout."""
    head = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not head:
        return None
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def save(path: Path, command: str, arguments: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write one run as JSON: environment, arguments and every figure."""
    content = {"command": command, **environment(), "arguments": dict(arguments), "result": dict(result)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def serving_table(summary: Mapping[str, Any]) -> str:
    """The figures of ``octavo bench serve`` for people."""
    rows: list[tuple[str, str]] = [
        ("completed requests", f"{summary['num_completed']} of {summary['num_requests']}"),
        ("duration, s", f"{summary['duration_s']:.2f}"),
        ("input tokens", f"{summary['input_tokens']} ({summary['cached_tokens']} cached)"),
        ("output tokens", f"{summary['output_tokens']}"),
        ("peak concurrency, requests", f"{summary['peak_concurrency']}"),
        ("request throughput, 1/s", f"{summary['request_throughput']:.2f}"),
    ]
    if "goodput" in summary:
        rows.append(("goodput, 1/s", f"{summary['goodput']:.2f}"))
    rows += [
        ("output throughput, tok/s", f"{summary['output_throughput']:.2f}"),
        ("total throughput, tok/s", f"{summary['total_throughput']:.2f}"),
    ]
    lines = [f"{name:<28} {value}" for name, value in rows]
    shown = [name for name in LATENCIES if summary.get(name)]
    if shown:
        columns = [column.removesuffix("_ms") for column in summary[shown[0]]]
        lines += ["", f"{'latencies, ms':<28}" + "".join(f"{column:>10}" for column in columns)]
        for name in shown:
            label = f"{name.upper()}, {LATENCIES[name]}"
            lines.append(f"{label:<28}" + "".join(f"{value:>10.2f}" for value in summary[name].values()))
    if summary["num_counted_by_client"] and summary["num_completed"]:
        lines += [
            "",
            f"{summary['num_counted_by_client']} answers came without usage: their tokens are pieces received",
        ]
    if summary["num_failed"]:
        lines += ["", f"{summary['num_failed']} requests failed:"]
        lines += [f"{count:>7} x {reason}" for reason, count in summary["failures"].items()]
    return "\n".join(lines)


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
