"""``octavo generate``: complete prompts offline, to the terminal or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.cli.sampling import add_sampling_options, sampling_params
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.outputs import RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where prompts come from, how to sample, where answers go."""
    group = parser.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    source.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="a prompt a line; in a .jsonl file a JSON object with 'prompt' a line; - reads standard input",
    )
    group.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    add_sampling_options(parser, max_tokens=128)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="samples for each prompt (default: 1)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on until the limit")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON object a prompt to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Complete every prompt; returns the exit status."""
    prompts = args.prompt or read_prompts(args.prompts_file)
    params = sampling_params(args, n=args.n, ignore_eos=args.ignore_eos)
    if args.output is not None and args.output.exists():
        raise ConfigError(f"{args.output} exists; name another file or remove it")
    from octavo.llm import LLM

    progress = len(prompts) > 1 and sys.stderr.isatty()
    with LLM.from_config(config) as llm:
        if args.chat:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            outputs = llm.chat(conversations, params, use_tqdm=progress)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=progress)
    records = [as_record(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    if args.output is not None:
        args.output.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    elif args.json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    else:
        print_answers(records)
    return 0


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, ``-`` for standard input; empty lines are left out.

    Raises:
        ConfigError: the file cannot be read, holds none, or a line of a .jsonl file has no text under ``prompt``.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{name} holds no prompt")
    if not name.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_prompt_of(name, number, line) for number, line in lines]


def as_record(prompt: str, output: RequestOutput) -> dict[str, Any]:
    """One prompt and its samples for programs."""
    return {
        "prompt": prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "outputs": [
            {
                "index": sample.index,
                "text": sample.text,
                "num_tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
            }
            for sample in output.outputs
        ],
    }


def print_answers(records: Sequence[dict[str, Any]]) -> None:
    """Answers for people: alone when there is one, else under their prompts."""
    alone = len(records) == 1 and len(records[0]["outputs"]) == 1
    for record in records:
        for sample in record["outputs"]:
            if not alone:
                label = f" [{sample['index']}]" if len(record["outputs"]) > 1 else ""
                print(f">>> {record['prompt']}{label}")
            print(sample["text"].strip("\n"))
            if not alone:
                print()


def _prompt_of(name: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}, line {number}: not a JSON object with 'prompt'") from error
    if not isinstance(prompt, str):
        raise ConfigError(f"{name}, line {number}: 'prompt' must be text")
    return prompt
