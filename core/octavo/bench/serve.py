"""``octavo bench serve``: load a running OpenAI-compatible server and report what its clients feel."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from octavo.bench import client, plot, report, workload
from octavo.bench.arrivals import arrival_times
from octavo.bench.datasets import BenchRequest, Tokenizer, as_text, random_requests
from octavo.bench.metrics import (
    LATENCIES,
    OBJECTIVES,
    RequestResult,
    parse_objectives,
    parse_percentiles,
    summarize,
)
from octavo.cli.options import json_object
from octavo.errors import ConfigError

WARMUP_SEED = 987654321  # other prompts than those that are measured, or the prefix cache would know them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options under the names that ``vllm bench serve`` gives them."""
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    server.add_argument(
        "--endpoint",
        default="/v1/completions",
        choices=("/v1/completions", "/v1/chat/completions"),
        help="(default: %(default)s)",
    )
    server.add_argument("--model", metavar="NAME", help="name in the requests (default: the first of /v1/models)")
    server.add_argument("--api-key", metavar="KEY", help="(default: the environment's OPENAI_API_KEY)")
    server.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="for one request (default: %(default)g)"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate", type=float, default=float("inf"), metavar="X", help="per second (default: inf, all at once)"
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="shape of the gamma-distributed gaps: 1 is Poisson, less is burstier (default: %(default)g)",
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at once (default: no limit)")
    load.add_argument("--num-warmups", type=int, default=1, metavar="N", help="unmeasured requests before (default: 1)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)")
    workload.add_arguments(parser)
    prompts = parser.add_argument_group("requests")
    prompts.add_argument(
        "--prompt-type",
        choices=("tokens", "text"),
        help="token ids, or text for servers that take none; text needs --tokenizer (default: tokens, text for chat)",
    )
    prompts.add_argument("--ignore-eos", action="store_true", help="generate every token that is asked for")
    prompts.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default: %(default)g, greedy)")
    prompts.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="object that joins every request's body"
    )
    prompts.add_argument(
        "--tokenizer", metavar="NAME", help="folder or hub name; for text prompts, ShareGPT and the vocabulary's size"
    )
    output = parser.add_argument_group("report")
    output.add_argument(
        "--percentile-metrics",
        default=",".join(LATENCIES),
        metavar="LIST",
        help="latencies to report, separated by commas (default: %(default)s)",
    )
    output.add_argument(
        "--metric-percentiles",
        default="50,90,95,99",
        metavar="LIST",
        help="percentiles to report, separated by commas (default: %(default)s)",
    )
    output.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"objectives in milliseconds, such as ttft:200 tpot:50; names: {', '.join(OBJECTIVES)}",
    )
    output.add_argument("--save-result", type=Path, metavar="FILE", help="write every figure as JSON")
    output.add_argument("--save-detailed", action="store_true", help="with every request's times in that file")
    output.add_argument("--plot", type=Path, metavar="FILE", help="write distributions and time lines as PNG")
    output.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Measure and report; exit status 1 when a request failed."""
    prompt_as: client.PromptType = args.prompt_type or ("tokens" if args.endpoint == "/v1/completions" else "text")
    objectives = parse_objectives(args.goodput)
    percentiles = parse_percentiles(args.metric_percentiles)
    metrics = _metrics(args.percentile_metrics)
    target = client.Target(
        base_url=args.base_url,
        endpoint=args.endpoint,
        model=args.model or "",
        api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
        ignore_eos=args.ignore_eos,
        temperature=args.temperature,
        prompt_as=prompt_as,
        timeout=args.timeout,
        extra=args.extra_body,
    )
    if args.plot is not None:
        plot.require_matplotlib()
    if args.save_detailed and args.save_result is None:
        raise ConfigError("--save-detailed needs --save-result FILE")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency must be at least 1, not {args.max_concurrency}")
    if args.num_warmups < 0:
        raise ConfigError(f"--num-warmups must be at least 0, not {args.num_warmups}")
    if not target.model:
        target = client.run_loop(client.first_model(target))
    tokenizer = workload.load_tokenizer(args.tokenizer) if args.tokenizer else None
    vocab_size = args.vocab_size or (len(tokenizer) if tokenizer is not None else workload.DEFAULT_VOCAB_SIZE)
    requests = workload.requests(args, vocab_size, tokenizer, args.seed)
    if args.dataset_name == "trace" and not args.ignore_eos:
        print("note: without --ignore-eos answers may end before the trace's output lengths", file=sys.stderr)
    warmups = random_requests(args.num_warmups, input_len=16, output_len=16, vocab_size=vocab_size, seed=WARMUP_SEED)
    if prompt_as == "text":
        requests, warmups = _texts(requests, tokenizer), _texts(warmups, tokenizer)
    arrivals = arrival_times(len(requests), args.request_rate, args.burstiness, args.seed)
    results, duration = client.run_loop(_measure(args, target, warmups, requests, arrivals))
    summary = summarize(results, duration, percentiles=percentiles, metrics=metrics, objectives=objectives)
    print(report.serving_table(summary))
    if args.save_result is not None:
        details = {"requests": _details(results)} if args.save_detailed else {}
        report.save(args.save_result, "bench serve", _arguments(args, target), summary | details)
        print(f"\nwrote {args.save_result}")
    if args.plot is not None:
        if summary["num_completed"]:
            plot.plot_serving(args.plot, results, f"{target.model} at {target.base_url}, {_load(args)}")
            print(f"wrote {args.plot}")
        else:
            print(f"{args.plot} is not written: no request completed", file=sys.stderr)
    return int(summary["num_failed"] > 0)


async def _measure(
    args: argparse.Namespace,
    target: client.Target,
    warmups: Sequence[BenchRequest],
    requests: Sequence[BenchRequest],
    arrivals: Sequence[float],
) -> tuple[list[RequestResult], float]:
    for warmup in warmups:
        result = await client.complete(target, target.completion(warmup), warmup.num_prompt_tokens)
        if not result.completed:
            raise ConfigError(f"the warm-up request failed, nothing was measured: {result.error}")
    with tqdm(total=len(requests), unit="request", disable=args.disable_tqdm or None) as progress:
        return await client.drive(
            target,
            requests,
            arrivals,
            max_concurrency=args.max_concurrency,
            on_finished=lambda result: _advance(progress),
        )


def _advance(progress: Any) -> None:
    progress.update(1)


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LATENCIES]
    if unknown:
        raise ConfigError(f"--percentile-metrics: '{unknown[0]}' is no latency; there are: {', '.join(LATENCIES)}")
    return names


def _texts(requests: Sequence[BenchRequest], tokenizer: Tokenizer | None) -> list[BenchRequest]:
    if tokenizer is None:
        raise ConfigError("text prompts need --tokenizer, a folder or hub name, to turn invented tokens into text")
    return as_text(requests, tokenizer)


def _load(args: argparse.Namespace) -> str:
    rate = "all at once" if args.request_rate == float("inf") else f"{args.request_rate:g} requests/s"
    return rate + (f", at most {args.max_concurrency} at once" if args.max_concurrency else "")


def _arguments(args: argparse.Namespace, target: client.Target) -> dict[str, Any]:
    """What was asked for, without the key; infinity is no JSON."""
    left_out = ("start", "debug", "api_key")
    given = {name: value for name, value in vars(args).items() if name not in left_out}
    return given | {
        "model": target.model,
        "prompt_type": target.prompt_as,
        "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate,
    }


def _details(results: Sequence[RequestResult]) -> list[dict[str, Any]]:
    start = min((result.sent_at for result in results), default=0.0)
    return [
        {
            "sent_s": result.sent_at - start,
            "ended_s": result.ended_at - start,
            "chunks_s": [time - start for time in result.chunk_times],
            "prompt_tokens": result.num_prompt_tokens,
            "output_tokens": result.num_output_tokens,
            "finish_reason": result.finish_reason,
            "error": result.error,
        }
        for result in results
    ]
