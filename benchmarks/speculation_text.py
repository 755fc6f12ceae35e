"""Speculation on text that is edited, with a real model on one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/speculation_text.py FOLDER [--save FILE]

FOLDER holds SmolLM2-135M-Instruct, or another Llama with a chat template, in Hugging Face's format. Guesses come from
n-grams of the text so far, and from a draft model made of its own first layers, which was not trained for that. Prompts
come one at a time, greedily. The speed-up is in CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from octavo.bench import report
from octavo.config import EngineConfig, SpeculativeConfig
from octavo.messages import Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

PROMPTS = Path(__file__).parent / "traces" / "text_editing.json"


@dataclass
class Counts:
    """What all prompts brought together."""

    outputs: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0  # of the processor, from the first token of each prompt
    num_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0


def first_layers(model: Path, num_layers: int, folder: Path) -> Path:
    """A draft model of the first layers, with the embedding, the last norm and the tokenizer."""
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    with safe_open(model / "model.safetensors", "pt") as source:
        names = [name for name in source.keys() if _layer(name) < num_layers]  # noqa: SIM118 - not a mapping
        save_file({name: source.get_tensor(name) for name in names}, folder / "model.safetensors")
    return folder


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def run(
    model: Path, prompts: Sequence[list[int]], args: argparse.Namespace, speculative: SpeculativeConfig | None
) -> Counts:
    """Every prompt after the other on one engine."""
    config = EngineConfig(
        model=str(model),
        dtype=args.dtype,
        device="cpu",
        max_model_len=1024,
        max_num_seqs=4,
        num_threads=1,
        enable_prefix_caching=False,
        speculative=speculative or SpeculativeConfig(),
    )
    engine, counts = build_engine(resolve(config)), Counts()
    params = SamplingParams(temperature=0.0, max_tokens=args.output_tokens, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.submit(Submit(str(number), prompt, params, seed=0))
        counts.outputs.append([])
        while engine.has_work:
            started, decoding = time.process_time(), bool(counts.outputs[-1])
            outputs = engine.settle(engine.launch())
            if decoding:
                counts.seconds += time.process_time() - started
                counts.num_tokens += outputs.stats.num_output_tokens
            for output in outputs.sequences:
                counts.outputs[-1] += output.token_ids
            counts.num_drafts += outputs.stats.num_drafts
            counts.num_draft_tokens += outputs.stats.num_draft_tokens
            counts.num_accepted += outputs.stats.num_accepted_tokens
    return counts


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-tokens", type=int, default=4, help="drafts at most (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=96, help="for each prompt (default: %(default)s)")
    parser.add_argument("--draft-layers", type=int, nargs="+", default=[4, 15], help="of draft models")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    prompts = []
    for task in json.loads(PROMPTS.read_text(encoding="utf-8")):
        chat = [{"role": "user", "content": f"{task['instruction']}\n\n{task['text']}"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    plain = run(args.model, prompts, args, None)
    print(f"{len(prompts)} prompts, plain: {plain.seconds / plain.num_tokens * 1e3:.1f} ms a token")
    print(f"{'drafts by':<18}{'':<10}{'accepted':>9}{'length':>8}{'drafted':>9}{'same':>6}{'speed-up':>10}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        methods: dict[str, dict[str, Any]] = {"ngram": {"method": "ngram"}}
        for num_layers in args.draft_layers:
            folder = Path(temporary) / str(num_layers)
            folder.mkdir()
            draft = first_layers(args.model, num_layers, folder)
            methods[f"first {num_layers} layers"] = {"model": str(draft), "dtype": args.dtype}
        for name, options in methods.items():
            for fixed in (True, False):
                speculative = SpeculativeConfig(num_tokens=args.num_tokens, fixed=fixed, **options)
                counts = run(args.model, prompts, args, speculative)
                row = {
                    "drafts_by": name,
                    "number": "fixed" if fixed else "adaptive",
                    "accepted": counts.num_accepted / max(1, counts.num_draft_tokens),
                    "acceptance_length": 1.0 + counts.num_accepted / max(1, counts.num_drafts),
                    "drafted_per_token": counts.num_draft_tokens / counts.num_tokens,
                    "same_outputs": sum(a == b for a, b in zip(plain.outputs, counts.outputs, strict=True)),
                    "speedup": plain.seconds / plain.num_tokens * counts.num_tokens / counts.seconds,
                }
                rows.append(row)
                print(
                    f"{name:<18}{row['number']:<10}{row['accepted']:>9.2f}{row['acceptance_length']:>8.2f}"
                    f"{row['drafted_per_token']:>9.2f}{row['same_outputs']:>6}{row['speedup']:>10.2f}",
                    flush=True,
                )
    if args.save is not None:
        arguments = {"dtype": args.dtype, "num_tokens": args.num_tokens, "output_tokens": args.output_tokens}
        result = {"plain_ms": plain.seconds / plain.num_tokens * 1e3, "rows": rows}
        report.save(args.save, "benchmarks/speculation_text.py", arguments, result)


if __name__ == "__main__":
    main()
