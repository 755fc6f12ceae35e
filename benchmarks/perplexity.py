"""What quantization costs in quality: perplexity of checkpoints of one model on a fixed text, in windows of tokens.

    python benchmarks/perplexity.py bf16=FOLDER awq=FOLDER … [--output benchmarks/results/perplexity-NAME.json]

The first is what the others are compared with. ``texts/prose.txt`` is this project's documentation of one day as plain
paragraphs, under the project's licence, and the same ever since.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cpu import commit, hardware, versions

from octavo.config import EngineConfig
from octavo.engine import Engine
from octavo.loader import HuggingFaceFolder
from octavo.messages import Submit, TokenLogprobs
from octavo.quantization import quantization_settings
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

TEXT = Path(__file__).parent / "texts" / "prose.txt"


@dataclass(frozen=True)
class Quality:
    """Of one checkpoint: over ``num_tokens`` predicted tokens, ``agreement`` with the first one's likeliest tokens."""

    perplexity: float
    agreement: float
    num_tokens: int
    quantization: str
    weight_bytes: int


def predictions(engine: Engine, windows: list[list[int]]) -> tuple[list[float], list[int]]:
    """The log-probability of each token but a window's first, and the token that was likeliest there."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    for index, window in enumerate(windows):
        engine.submit(Submit(str(index), window, params, seed=0))
    found: dict[int, list[TokenLogprobs | None]] = {}
    while engine.has_work:
        for output in engine.settle(engine.launch()).sequences:
            if output.prompt_logprobs is not None:
                found[int(output.request_id)] = output.prompt_logprobs
    positions = [position for index in range(len(windows)) for position in found[index] if position is not None]
    return [position.logprob for position in positions], [position.top_ids[0] for position in positions]


def measure(folder: Path, text: str, arguments: argparse.Namespace, first: list[int]) -> tuple[Quality, list[int]]:
    """``first`` are the tokens that the first checkpoint holds likeliest; empty for itself."""
    checkpoint = HuggingFaceFolder(folder)
    tokens = checkpoint.tokenizer()(text)["input_ids"]
    windows = [tokens[start : start + arguments.window] for start in range(0, len(tokens) - 1, arguments.window)]
    config = EngineConfig(
        model=str(folder),
        dtype=arguments.dtype,
        device="cpu",
        max_model_len=arguments.window + 16,
        kv_cache_dtype=arguments.kv_cache_dtype,
        enable_prefix_caching=False,
        num_threads=1,
    )
    engine = build_engine(resolve(config))
    logprobs, likeliest = predictions(engine, windows)
    same = [one == other for one, other in zip(likeliest, first or likeliest, strict=True)]
    found = quantization_settings(checkpoint)
    quality = Quality(
        perplexity=math.exp(-sum(logprobs) / len(logprobs)),
        agreement=sum(same) / len(same),
        num_tokens=len(logprobs),
        quantization="none" if found is None else found[0],
        weight_bytes=engine.info.weight_bytes,
    )
    return quality, likeliest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--window", type=int, default=512, help="tokens that are predicted from each other")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    text = TEXT.read_text(encoding="utf-8")
    results: dict[str, Quality] = {}
    first: list[int] = []
    for named in arguments.checkpoints:
        name, _, folder = named.partition("=")
        results[name], likeliest = measure(Path(folder), text, arguments, first)
        first = first or likeliest
    best = next(iter(results.values())).perplexity
    print(f"{'':16}{'perplexity':>12}{'change':>9}{'same choice':>13}{'weights MB':>12}")
    for name, quality in results.items():
        change = f"{quality.perplexity / best - 1:+.1%}"
        size = f"{quality.weight_bytes / 1e6:.0f}"
        print(f"{name:16}{quality.perplexity:12.3f}{change:>9}{quality.agreement:13.1%}{size:>12}")
    if arguments.output is not None:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "text": TEXT.name,
            "settings": {key: getattr(arguments, key) for key in ("window", "dtype", "kv_cache_dtype")},
            "results": {name: asdict(quality) for name, quality in results.items()},
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
