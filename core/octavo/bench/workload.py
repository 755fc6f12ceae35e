"""From command-line options to the requests of a benchmark: shared by ``serve`` and ``throughput``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from octavo.bench.datasets import BenchRequest, Tokenizer, random_requests, sharegpt_requests, trace_requests
from octavo.errors import ConfigError

DEFAULT_VOCAB_SIZE = 32000  # no common model has fewer tokens, so ids below it exist everywhere
DEFAULT_NUM_PROMPTS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked."""
    dataset = parser.add_argument_group("dataset")
    dataset.add_argument(
        "--dataset-name", choices=("random", "sharegpt", "trace"), default="random", help="(default: %(default)s)"
    )
    dataset.add_argument(
        "--num-prompts",
        type=int,
        metavar="N",
        help=f"requests (default: {DEFAULT_NUM_PROMPTS}, or the whole file of trace and sharegpt)",
    )
    dataset.add_argument("--dataset-path", type=Path, metavar="FILE", help="of sharegpt or trace")
    dataset.add_argument(
        "--random-input-len", type=int, default=1024, metavar="N", help="tokens (default: %(default)s)"
    )
    dataset.add_argument(
        "--random-output-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)"
    )
    dataset.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="lengths vary by this share either way, 0 to below 1 (default: %(default)g)",
    )
    dataset.add_argument(
        "--random-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens that all prompts begin with, beside their own (default: %(default)s)",
    )
    dataset.add_argument(
        "--sharegpt-output-len", type=int, metavar="N", help="tokens to generate (default: as long as the answer)"
    )
    dataset.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"invented token ids stay below this (default: as many as are known, else {DEFAULT_VOCAB_SIZE})",
    )


def requests(args: argparse.Namespace, vocab_size: int, tokenizer: Tokenizer | None, seed: int) -> list[BenchRequest]:
    """The requests that the options describe; ``seed`` decides what is random.

    Raises:
        ConfigError: a file or the tokenizer that the dataset needs is missing, or a number is out of range.
    """
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ConfigError(f"--num-prompts must be at least 1, not {args.num_prompts}")
    if args.dataset_name == "random":
        return random_requests(
            args.num_prompts or DEFAULT_NUM_PROMPTS,
            input_len=args.random_input_len,
            output_len=args.random_output_len,
            range_ratio=args.random_range_ratio,
            prefix_len=args.random_prefix_len,
            vocab_size=vocab_size,
            seed=seed,
        )
    if args.dataset_path is None:
        raise ConfigError(f"--dataset-name {args.dataset_name} needs --dataset-path FILE")
    if args.dataset_name == "trace":
        return trace_requests(args.dataset_path, args.num_prompts, vocab_size=vocab_size)
    if tokenizer is None:
        raise ConfigError("--dataset-name sharegpt needs --tokenizer, a folder or hub name, to count tokens")
    return sharegpt_requests(
        args.dataset_path, args.num_prompts, tokenizer, output_len=args.sharegpt_output_len, seed=seed
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name, as Transformers loads it.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--tokenizer {name}: {error}") from error
