"""``octavo bench throughput``: how many tokens a second an engine makes offline, with everything queued at once."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tqdm import tqdm

from octavo.bench import report, workload
from octavo.bench.datasets import BenchRequest, random_requests
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.request import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM

WARMUP_SEED = 987654321


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The workload, and whether to compare with Transformers."""
    workload.add_arguments(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--hf", action="store_true", help="compare with Transformers' generate in the same run")
    group.add_argument(
        "--hf-batch-size", type=int, default=16, metavar="N", help="prompts in its static batches (default: 16)"
    )
    group.add_argument("--save-result", type=Path, metavar="FILE", help="write every figure as JSON")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure and report; returns the exit status."""
    if args.hf_batch_size < 1:
        raise ConfigError(f"--hf-batch-size must be at least 1, not {args.hf_batch_size}")
    from octavo.llm import LLM

    progress = not args.disable_tqdm and sys.stderr.isatty()
    tokenizer = workload.load_tokenizer(config.tokenizer or config.model) if args.dataset_name == "sharegpt" else None
    with LLM.from_config(config) as llm:
        size = min(args.vocab_size or llm.client.info.vocab_size, llm.client.info.vocab_size)
        requests = workload.requests(args, size, tokenizer, config.seed or 0)
        warmup = random_requests(1, input_len=16, output_len=16, vocab_size=size, seed=WARMUP_SEED)
        generate(llm, warmup, progress=False)
        seconds, num_output = generate(llm, requests, progress=progress)
        info = llm.client.info
    result: dict[str, Any] = {"engine": msgspec.to_builtins(info), "octavo": figures(requests, num_output, seconds)}
    print(table("octavo", result["octavo"]))
    if args.hf:
        seconds, num_output = generate_with_transformers(
            config, requests, args.hf_batch_size, info.dtype, info.device, progress=progress
        )
        result["transformers"] = figures(requests, num_output, seconds)
        result["ratio"] = result["octavo"]["output_throughput"] / result["transformers"]["output_throughput"]
        print(table(f"transformers, batches of {args.hf_batch_size}", result["transformers"]))
        print(f"\nOctavo makes {result['ratio']:.2f} times as many tokens a second.")
    if args.save_result is not None:
        arguments = {name: value for name, value in vars(args).items() if name not in ("start", "debug")}
        report.save(args.save_result, "bench throughput", arguments, result)
        print(f"wrote {args.save_result}")
    return 0


def generate(llm: LLM, requests: Sequence[BenchRequest], *, progress: bool) -> tuple[float, int]:
    """Seconds to complete all requests, greedily and to their full lengths, and output tokens made."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True) for request in requests
    ]
    prompts = [list(request.token_ids or ()) for request in requests]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=progress)
    seconds = time.perf_counter() - started
    return seconds, sum(len(sample.token_ids) for output in outputs for sample in output.outputs)


def generate_with_transformers(
    config: EngineConfig, requests: Sequence[BenchRequest], batch_size: int, dtype: str, device: str, *, progress: bool
) -> tuple[float, int]:
    """The same work by Transformers in static batches, padded on the left, in order. A batch runs until its longest
    answer is done; only the tokens that were asked for count.

    Raises:
        ConfigError: Transformers cannot load the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from octavo.loader import resolve_model_path

    dummy = config.load_format == "dummy"
    path = resolve_model_path(config.model, config.revision, weights=not dummy)
    kind = getattr(torch, dtype.removeprefix("torch."))
    try:
        if dummy:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=kind)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--hf: Transformers cannot load {path}: {error}") from error
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # every answer to its full length
    model.generate(input_ids=torch.ones(1, 16, dtype=torch.long, device=device), max_new_tokens=16, pad_token_id=0)
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in tqdm(batches, unit="batch", disable=not progress):
            longest = max(request.num_prompt_tokens for request in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.long, device=device)
            mask = torch.zeros_like(tokens)
            for row, request in enumerate(batch):
                tokens[row, longest - request.num_prompt_tokens :] = torch.tensor(list(request.token_ids or ()))
                mask[row, longest - request.num_prompt_tokens :] = 1
            num_new = max(request.num_output_tokens for request in batch)
            made = model.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0
            )
            made.cpu()  # wait for the device
    return time.perf_counter() - started, sum(request.num_output_tokens for request in requests)


def figures(requests: Sequence[BenchRequest], num_output: int, seconds: float) -> dict[str, float]:
    """What is reported of one run."""
    num_input = sum(request.num_prompt_tokens for request in requests)
    return {
        "num_requests": len(requests),
        "duration_s": seconds,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "request_throughput": len(requests) / seconds,
        "output_throughput": num_output / seconds,
        "total_throughput": (num_input + num_output) / seconds,
    }


def table(name: str, result: dict[str, float]) -> str:
    """One run for people."""
    return "\n".join(
        [
            name,
            f"  requests              {result['num_requests']}",
            f"  input, output tokens  {result['input_tokens']}, {result['output_tokens']}",
            f"  duration              {result['duration_s']:.2f} s",
            f"  requests              {result['request_throughput']:.2f} /s",
            f"  output                {result['output_throughput']:.2f} tok/s",
            f"  input and output      {result['total_throughput']:.2f} tok/s",
        ]
    )
