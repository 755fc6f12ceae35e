"""``octavo bench latency``: the time of one batch, and of one decode step within it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from tqdm import tqdm

from octavo.bench import report
from octavo.bench.datasets import BenchRequest, random_requests
from octavo.bench.metrics import distribution, parse_percentiles
from octavo.bench.throughput import WARMUP_SEED, generate
from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape of the batch and how often it runs."""
    group = parser.add_argument_group("benchmark")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: 8)")
    group.add_argument("--input-len", type=int, default=32, metavar="N", help="tokens (default: 32)")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens (default: 128)")
    group.add_argument(
        "--short-output-len",
        type=int,
        default=1,
        metavar="N",
        help="tokens of the short run that is subtracted to find the time of a decode step (default: 1)",
    )
    group.add_argument("--num-iters", type=int, default=10, metavar="N", help="measured rounds (default: 10)")
    group.add_argument("--num-iters-warmup", type=int, default=2, metavar="N", help="rounds before (default: 2)")
    group.add_argument("--metric-percentiles", default="50,90,99", metavar="LIST", help="(default: %(default)s)")
    group.add_argument("--save-result", type=Path, metavar="FILE", help="write every figure as JSON")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure and report; returns the exit status."""
    percentiles = parse_percentiles(args.metric_percentiles)
    if not 1 <= args.short_output_len < args.output_len:
        raise ConfigError(
            f"--short-output-len must be at least 1 and below --output-len ({args.output_len}), "
            f"not {args.short_output_len}"
        )
    for name in ("batch_size", "num_iters"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    from octavo.llm import LLM

    batches: list[float] = []
    steps: list[float] = []
    with LLM.from_config(config) as llm:
        for iteration in tqdm(
            range(-args.num_iters_warmup, args.num_iters), disable=args.disable_tqdm or None, unit="round"
        ):
            prompts = random_requests(
                args.batch_size,
                input_len=args.input_len,
                output_len=args.output_len,
                vocab_size=llm.client.info.vocab_size,
                seed=WARMUP_SEED + iteration,  # prompts that no earlier round has left in the prefix cache
            )
            batch, step = _round(llm, prompts, args.short_output_len)
            if iteration >= 0:
                batches.append(batch)
                steps.append(step)
        info = llm.client.info
    result = {"batch": distribution(batches, percentiles), "decode_step": distribution(steps, percentiles)}
    print(
        f"{args.batch_size} prompts of {args.input_len} tokens, {args.output_len} tokens out, {args.num_iters} rounds"
    )
    print(f"{'ms':<24}" + "".join(f"{name.removesuffix('_ms'):>10}" for name in result["batch"]))
    for name, label in (("batch", "whole batch"), ("decode_step", "decode, per step")):
        print(f"{label:<24}" + "".join(f"{value:>10.2f}" for value in result[name].values()))
    if args.save_result is not None:
        arguments = {name: value for name, value in vars(args).items() if name not in ("start", "debug")}
        report.save(args.save_result, "bench latency", arguments, {"engine": msgspec.to_builtins(info), **result})
        print(f"wrote {args.save_result}")
    return 0


def _round(llm: LLM, prompts: list[BenchRequest], short_len: int) -> tuple[float, float]:
    """Seconds for the batch with new prompts, and for one decode step: (long - short) / difference in tokens, of runs
    that find the same prompts computed alike."""
    long_len = prompts[0].num_output_tokens
    short = [BenchRequest(prompt.num_prompt_tokens, short_len, prompt.token_ids) for prompt in prompts]
    batch, _ = generate(llm, prompts, progress=False)
    long_seconds, _ = generate(llm, prompts, progress=False)
    short_seconds, _ = generate(llm, short, progress=False)
    return batch, (long_seconds - short_seconds) / (long_len - short_len)
