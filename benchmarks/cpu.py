"""Decode and prefill on one CPU thread, beside Transformers and llama.cpp in the same run.

    OMP_NUM_THREADS=1 python benchmarks/cpu.py                    # SmolLM2-135M's shape with random weights
    OMP_NUM_THREADS=1 python benchmarks/cpu.py --model FOLDER     # a checkpoint in Hugging Face's format
    OMP_NUM_THREADS=1 python benchmarks/cpu.py --model FOLDER --quantized gptq=FOLDER fp8=FOLDER
    OMP_NUM_THREADS=1 python benchmarks/cpu.py --gguf FILE        # adds llama.cpp, where llama-cpp-python is installed

llama.cpp runs the file in each of --gguf-types, into which llama.cpp itself converts it. For a fair comparison build it
for the machine: CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python.

Everything is CPU seconds of this process (a shared machine changes them less than the wall clock), greedy, with
end-of-sequence ignored. Decoding is from --prompt-len to --prompt-len + --output-len tokens of context, all sequences
together; the prompt's share is not counted. The best of --repeats is taken for everyone.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.config import DType, EngineConfig
from octavo.engine import Engine
from octavo.messages import Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


class Octavo:
    """Drives the engine in this process, without text."""

    def __init__(self, model: Path, dtype: DType, dummy: bool) -> None:
        self._name = 0
        config = EngineConfig(
            model=str(model),
            dtype=dtype,
            device="cpu",
            load_format="dummy" if dummy else "auto",
            max_model_len=2048,
            max_num_seqs=64,
            enable_prefix_caching=False,
            num_threads=1,
        )
        self._engine: Engine = build_engine(resolve(config))

    def _submit(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for prompt in prompts:
            self._name += 1
            self._engine.submit(Submit(str(self._name), list(prompt), params, seed=0))

    def _step(self) -> int:
        outputs = self._engine.settle(self._engine.launch())
        return sum(len(output.token_ids) for output in outputs.sequences)

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Tokens per second after every sequence has its first token."""
        self._submit(prompts, num_tokens)
        known = 0
        while known < len(prompts):
            known += self._step()
        started, first = time.process_time(), known
        while self._engine.has_work:
            known += self._step()
        return (known - first) / (time.process_time() - started)

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """All of it, prompts and output."""
        self._submit(prompts, num_tokens)
        while self._engine.has_work:
            self._step()

    def prefill(self, prompt: Sequence[int]) -> float:
        """Prompt tokens per second, the first new token included."""
        started = time.process_time()
        self.run([prompt], 1)
        return len(prompt) / (time.process_time() - started)


class Transformers:
    """``generate`` with a static batch, as most people call it."""

    def __init__(self, model: Path, dtype: DType, dummy: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = getattr(torch, dtype)
        if dummy:
            self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=kind).eval()
        else:
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=kind).eval()

    def _seconds(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        ids = torch.tensor(prompts)
        started = time.process_time()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.process_time() - started

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        first = self._seconds(prompts, 1)
        return len(prompts) * (num_tokens - 1) / (self._seconds(prompts, num_tokens) - first)

    def prefill(self, prompt: Sequence[int]) -> float:
        return len(prompt) / self._seconds([prompt], 1)


class LlamaCpp:
    """llama.cpp through ``llama_cpp``'s low-level calls: one batch of all sequences per step, greedy."""

    def __init__(self, file: Path, kind: str, folder: Path) -> None:
        api = self._api = importlib.import_module("llama_cpp")
        self._silence = api.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        api.llama_log_set(self._silence, None)
        if kind not in file.stem:
            settings = api.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
            converted = folder / f"{kind}.gguf"
            if api.llama_model_quantize(str(file).encode(), str(converted).encode(), settings):
                raise RuntimeError(f"llama.cpp cannot convert {file} to {kind}")
            file = converted
        self._model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def _context(self, num_sequences: int, length: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = num_sequences * length, num_sequences
        settings.n_batch = settings.n_ubatch = max(512, num_sequences)
        settings.n_threads = settings.n_threads_batch = 1
        return self._api.llama_init_from_model(self._model, settings)

    def _run(self, context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if self._api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        self._api.llama_batch_free(batch)

    def _greedy(self, context: Any, index: int) -> int:
        logits = self._api.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())

    def decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        context = self._context(len(prompts), len(prompts[0]) + num_tokens)
        newest = []
        for sequence, prompt in enumerate(prompts):
            last = len(prompt) - 1
            self._run(context, [(token, i, sequence, i == last) for i, token in enumerate(prompt)])
            newest.append(self._greedy(context, last))
        started = time.process_time()
        for step in range(num_tokens - 1):
            position = len(prompts[0]) + step
            self._run(context, [(token, position, sequence, True) for sequence, token in enumerate(newest)])
            newest = [self._greedy(context, index) for index in range(len(prompts))]
        seconds = time.process_time() - started
        self._api.llama_free(context)
        return len(prompts) * (num_tokens - 1) / seconds

    def prefill(self, prompt: Sequence[int]) -> float:
        context = self._context(1, len(prompt) + 1)
        tokens = [(token, i, 0, i == len(prompt) - 1) for i, token in enumerate(prompt)]
        self._run(context, tokens)  # a new context's memory is touched for the first time: that does not count
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
        started = time.process_time()
        self._run(context, tokens)
        self._greedy(context, len(prompt) - 1)
        seconds = time.process_time() - started
        self._api.llama_free(context)
        return len(prompt) / seconds


def measure(engine: Octavo | Transformers | LlamaCpp, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """The best tokens per second of one repeat of everything, by what was measured."""
    generator = torch.Generator().manual_seed(seed)

    def prompts(count: int, length: int) -> list[list[int]]:
        rows: list[list[int]] = torch.randint(1000, 40000, (count, length), generator=generator).tolist()
        return rows

    found = {
        f"decode, batch {batch}": engine.decode(prompts(batch, arguments.prompt_len), arguments.output_len)
        for batch in arguments.batches
    }
    found[f"prefill, {arguments.prefill_len} tokens"] = engine.prefill(prompts(1, arguments.prefill_len)[0])
    return found


def hardware() -> dict[str, Any]:
    """What the numbers depend on."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def versions() -> dict[str, str]:
    """Of everything that was measured."""
    found = {"python": platform.python_version()}
    for name in ("octavo", "torch", "transformers", "llama-cpp-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured; marked when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: SmolLM2-135M's shape with random weights")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--quantized", nargs="+", default=[], metavar="NAME=FOLDER", help="served in bfloat16, too")
    parser.add_argument("--gguf-types", nargs="+", default=["BF16", "Q4_0"], help="in which types (default: BF16 Q4_0)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefill-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="measure Octavo alone")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder)
            (model / "config.json").write_text(json.dumps(SMOLLM2_135M))
        dummy = arguments.model is None
        makers: dict[str, Callable[[], Octavo | Transformers | LlamaCpp]] = {}
        for dtype in arguments.dtypes:
            makers[f"octavo {dtype}"] = functools.partial(Octavo, model, dtype, dummy)
            if not arguments.no_peers:
                makers[f"transformers {dtype}"] = functools.partial(Transformers, model, dtype, dummy)
        for named in arguments.quantized:
            name, _, quantized = named.partition("=")
            makers[f"octavo {name}"] = functools.partial(Octavo, Path(quantized), "bfloat16", False)
        if arguments.gguf is not None and importlib.util.find_spec("llama_cpp") is None:
            print("llama.cpp is left out: llama-cpp-python is not installed", file=sys.stderr)
        elif arguments.gguf is not None:
            for kind in arguments.gguf_types:
                makers[f"llama.cpp {kind}"] = functools.partial(LlamaCpp, arguments.gguf, kind, Path(folder))
        engines = {name: make() for name, make in makers.items()}
        best: dict[str, dict[str, float]] = {name: {} for name in engines}
        for repeat in range(arguments.repeats):  # in turn, so that a busy minute hits all of them
            for name, engine in engines.items():
                for what, speed in measure(engine, arguments, repeat).items():
                    best[name][what] = max(speed, best[name].get(what, 0.0))
                print(f"{repeat + 1}/{arguments.repeats} {name}", file=sys.stderr)
            if arguments.output is not None:
                save(arguments, best, repeat + 1)
    report(best)


def save(arguments: argparse.Namespace, best: dict[str, dict[str, float]], num_repeats: int) -> None:
    """What has been measured so far: a long run that is cut off leaves its repeats behind."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "model": str(arguments.model.name) if arguments.model else "SmolLM2-135M's shape, random weights",
        "settings": {
            **{key: getattr(arguments, key) for key in ("prompt_len", "output_len", "prefill_len")},
            "repeats": num_repeats,
        },
        "unit": "tokens per CPU second, one thread",
        "results": best,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def report(best: dict[str, dict[str, float]]) -> None:
    """A table of tokens per second, and of Octavo's best over each peer."""
    columns = list(next(iter(best.values())))
    print(f"{'tokens per CPU second':28}" + "".join(f"{column:>20}" for column in columns))
    for name, row in best.items():
        print(f"{name:28}" + "".join(f"{row[column]:20.1f}" for column in columns))
    octavo = {column: max(row[column] for name, row in best.items() if name.startswith("octavo")) for column in columns}
    for name, row in best.items():
        if not name.startswith("octavo"):
            print(f"{'octavo / ' + name:28}" + "".join(f"{octavo[column] / row[column]:19.2f}x" for column in columns))


if __name__ == "__main__":
    main()
