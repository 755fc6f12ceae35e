"""Write what benchmarks/results/ holds as tables into README.md, between its markers.

    python benchmarks/report.py            # write
    python benchmarks/report.py --check    # exit status 1 when it would change something

Of each kind of measurement the newest figures are shown, with the commit and the machine that they come from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin (make report) -->", "<!-- measured: end -->"

Result = Mapping[str, Any]


def cpu(result: Result) -> Iterator[str]:
    """benchmarks/cpu.py: engine to column to speed; the best of each engine's dtypes, and Octavo's share of it."""
    rows: dict[str, dict[str, float]] = {}
    for name, speeds in result["results"].items():
        engine = rows.setdefault(name.removesuffix(" float32").removesuffix(" bfloat16"), {})
        for column, speed in speeds.items():
            engine[column] = max(speed, engine.get(column, 0.0))
    columns = list(rows["octavo"])
    yield f"**{result['model']}, {result['hardware']['cpu']}**, {result['unit']}, best dtype of each:"
    yield ""
    yield from table(
        ["", *columns],
        [
            *([f"{engine}", *(f"{speeds[column]:.0f}" for column in columns)] for engine, speeds in rows.items()),
            *(
                [f"octavo / {engine}", *(f"{rows['octavo'][column] / speeds[column]:.1f}×" for column in columns)]
                for engine, speeds in rows.items()
                if engine != "octavo"
            ),
        ],
    )


def server_path(result: Result) -> Iterator[str]:
    """benchmarks/server_path.py: what the server's processes spend beside the engine driven alone."""
    settings, results = result["settings"], result["results"]
    shape = f"{settings['streams']} streams of {settings['prompt_len']} + {settings['output_len']} tokens"
    yield f"**The server, {result['model']} in {settings['dtype']}, {result['hardware']['cpu']}**, {shape}:"
    yield ""
    alone = results["engine alone, CPU seconds"]
    yield from table(
        ["", "CPU seconds", "of the engine alone"],
        [
            ["the engine driven alone", f"{alone:.2f}", ""],
            [
                "the engine's process, with the server",
                f"{results['engine with the server, CPU seconds']:.2f}",
                f"{results['engine with the server / alone']:.0%}",
            ],
            [
                "the API's process",
                f"{results['API process, CPU seconds']:.2f}",
                f"{results['API process / engine alone']:.0%}",
            ],
        ],
    )


def kernels(result: Result) -> Iterator[str]:
    """benchmarks/kernels.py: whole decode steps beside the time that reading the bytes takes."""
    yield f"**Kernels of a whole decode step, 8B Llama shapes in bf16, {result['hardware']}**:"
    yield ""
    yield from table(
        ["rows × context", "measured, ms", "floor by bytes, ms", "share of the floor"],
        [
            [
                row["size"].replace("x", "×"),
                f"{row['time'] / 1000:.2f}",
                f"{row['floor'] / 1000:.2f}",
                f"{row['floor'] / row['time']:.0%}",
            ]
            for row in result["results"]
            if row["kernel"] == "decode step"
        ],
    )


def gpu(result: Result) -> Iterator[str]:
    """benchmarks/gpu.py: the engine beside what vLLM 0.26 reached on the same kind of card, at the same work."""
    yield f"**The engine, 8B Llama shape in bf16 with random weights, {card(result)}**:"
    yield ""
    yield from beside_vllm(result)


def quantized_models(result: Result) -> Iterator[str]:
    """benchmarks/quantized.py models: the same with 4-bit and FP8 weights."""
    yield f"**Quantized weights, the same shape, {card(result)}**:"
    yield ""
    yield from beside_vllm(result)


def card(result: Result) -> str:
    return str(result["hardware"]["gpus"][0].partition(",")[0])


def beside_vllm(result: Result) -> Iterator[str]:
    rows = []
    for row in result["result"]["rows"]:
        digits = 0 if row["unit"] == "tok/s" else 1
        # what vLLM was not asked for is not a number
        cells = [
            "" if number is None or math.isnan(number) else f"{number:,.{digits}f}"
            for number in (row["octavo"], row["vllm"])
        ]
        rows.append([row["name"], *cells, row["unit"]])
    yield from table(["", "Octavo", "vLLM 0.26", "unit"], rows)


def speculation(result: Result) -> Iterator[str]:
    """benchmarks/speculation.py: by how much a draft model speeds up decoding, by how often it is right."""
    speedups = {
        (row["acceptance"], row["batch"]): f"{row['speedup']:.2f}× ({row['run_speedup']:.2f})"
        for row in result["result"]["rows"]
    }
    acceptances = sorted({acceptance for acceptance, _ in speedups})
    batches = sorted({batch for _, batch in speedups})
    num_tokens = result["arguments"]["num_tokens"]
    yield (
        f"**Speculation, the same shape, {card(result)}**: decoding with a draft model of three layers and up to "
        f"{num_tokens} drafts, as fast as without, by the share of drafts that are right; an answer on average, in "
        "brackets the last one of all:"
    )
    yield ""
    yield from table(
        ["accepted", *("1 sequence" if batch == 1 else f"{batch} sequences" for batch in batches)],
        [[f"{acceptance:.1f}", *(speedups[acceptance, batch] for batch in batches)] for acceptance in acceptances],
    )


def server_rates(result: Result) -> Iterator[str]:
    """benchmarks/server.py rates: latencies of the server by how many requests arrive."""
    yield f"**The server, the same shape, {card(result)}**, vLLM 0.26 in brackets:"
    yield ""
    rows = []
    for row in result["result"]["rates"]:
        rate = float(row["rate"])
        figures = [row[kind][point] for kind in ("ttft", "itl") for point in ("p50_ms", "p99_ms")]
        cells = [
            f"{ours:,.{digits}f} ({theirs:,.{digits}f})"
            for ours, theirs, digits in zip(
                [*figures, row["output_throughput"]], VLLM_RATES[rate], (1, 1, 1, 1, 0), strict=True
            )
        ]
        rows.append(["all at once" if rate == math.inf else f"{rate:g}", *cells])
    yield from table(
        ["requests a second", "TTFT p50, ms", "p99", "between tokens p50, ms", "p99", "output tokens a second"], rows
    )


def prefix(result: Result) -> Iterator[str]:
    """benchmarks/prefix.py: requests that begin alike, at once; and throughput by how much prompts share."""
    figures, sizes = result["result"], result["result"]["sizes"]
    yield (
        f"**Prefix caching, the same shape**, {sizes['num_together']} requests at once that share "
        f"{sizes['prefix_len']} tokens, seconds:"
    )
    yield ""
    yield from table(
        ["", *figures["together_seconds"]],
        [
            ["octavo", *(f"{seconds:.2f}" for seconds in figures["together_seconds"].values())],
            ["vLLM 0.26", *VLLM_TOGETHER_SECONDS],
        ],
    )
    yield ""
    yield (
        f"Output tokens a second of {sizes['num_shared']} prompts of {sizes['shared_prompt_len']} tokens, "
        "by the share that all have in common:"
    )
    yield ""
    yield from table(
        ["share", "with the cache", "without", ""],
        [
            [f"{row['shared_percent']}%", f"{cached:,.0f}", f"{plain:,.0f}", f"{cached / plain:.2f}×"]
            for row in figures["shared"]
            for cached, plain in ((row["with_tokens_per_second"], row["without_tokens_per_second"]),)
        ],
    )


VLLM_TOGETHER_SECONDS = ("0.48", "0.41", "6.77")
VLLM_RATES = {
    10.0: (20.0, 51.9, 5.2, 11.5, 1763),
    20.0: (22.6, 50.2, 5.5, 19.4, 3153),
    40.0: (30.8, 65.5, 6.4, 22.5, 6421),
    math.inf: (5348, 12860, 15.4, 45.1, 10314),
}

KINDS: Mapping[str, Callable[[Result], Iterator[str]]] = {
    "cpu": cpu,
    "cpu_llamacpp": cpu,
    "gpu": gpu,
    "kernels": kernels,
    "models_awq": quantized_models,
    "models_fp8": quantized_models,
    "models_gptq": quantized_models,
    "prefix": prefix,
    "server_path": server_path,
    "server_rates": server_rates,
    "speculation_table": speculation,
}
"""The first word of a file's name says which benchmark it comes from."""

IN_PARTS: Mapping[str, set[str]] = {"gpu": {"rows"}, "prefix": {"together_seconds", "shared"}}
"""Benchmarks that are run in parts, and what a table shows of them: what the newest file lacks is taken from those
before it."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def newest_first(folder: Path) -> dict[str, list[tuple[Path, Result]]]:
    """Kind to its files, the newest first, by the date inside."""
    found: dict[str, list[tuple[Path, Result]]] = {}
    for file in sorted(folder.glob("*.json"), reverse=True):
        kind = file.name.partition("-")[0]
        if kind in KINDS:
            found.setdefault(kind, []).append((file, json.loads(file.read_text(encoding="utf-8"))))
    for files in found.values():
        files.sort(key=lambda file: str(file[1]["date"]), reverse=True)
    return found


def joined(files: Sequence[tuple[Path, Result]], shown: set[str]) -> tuple[Result, list[tuple[Path, Result]]]:
    """What the first file has, and what only those after it have of what is ``shown``; with the files it is from."""
    (_, first), *others = files
    used, found = list(files[:1]), dict(first["result"])
    for file, result in others:
        rows = found.get("rows", [])
        names = {row["name"] for row in rows}
        more = {name: value for name, value in result["result"].items() if name in shown and name not in found}
        if new_rows := [row for row in result["result"].get("rows", ()) if row["name"] not in names]:
            more["rows"] = [*new_rows, *rows]
        if more:
            used.append((file, result))
            found |= more
    return {**first, "result": found}, used


def tables(folder: Path) -> str:
    """Everything that stands between the markers."""
    parts = []
    for kind, files in sorted(newest_first(folder).items()):
        result, used = joined(files, IN_PARTS[kind]) if kind in IN_PARTS else (files[0][1], files[:1])
        lines = [*KINDS[kind](result)]
        for file, source in used:
            versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
            lines += ["", f"`{file.name}`: commit {source['commit']}, {source['date'][:10]}; {versions}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def replaced(document: str, content: str) -> str:
    """The document with ``content`` between its markers.

    Raises:
        ValueError: it does not have both markers, in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document must have the lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when not up to date")
    arguments = parser.parse_args(words)
    document = DOCUMENT.read_text(encoding="utf-8")
    wanted = replaced(document, tables(RESULTS))
    if wanted == document:
        return 0
    if arguments.check:
        print(f"{DOCUMENT.name} does not show what {RESULTS.relative_to(ROOT)} holds: make report", file=sys.stderr)
        return 1
    DOCUMENT.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
