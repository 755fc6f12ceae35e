"""Whole models on a GPU: as near to float32 as Transformers in the same dtype; the same to the last bit on demand."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.paging import PagedSequences
from torch import Tensor

from octavo.architectures import choose_model
from octavo.attention.registry import choose_backend
from octavo.client import drive
from octavo.config import EngineConfig
from octavo.engine import Engine
from octavo.interfaces import AttentionNeed, Placement
from octavo.layers.attention import ForwardContext
from octavo.layers.builder import Builder
from octavo.loader import CheckpointLoader
from octavo.messages import Command, Shutdown, StepOutputs, Submit, TokenLogprobs
from octavo.operations import Operations
from octavo.plugins import PluginHost, Selection, select
from octavo.request import SamplingParams
from octavo.startup import BUILTIN_KERNELS, build_engine, make_compilers, resolve

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
MAX_MODEL_LEN = 512
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "four heads share keys": ("Llama", {}),
    "every head its own": ("Llama", {"num_key_value_heads": 4}),
    "heads of 80": ("Llama", {"head_dim": 80}),
    "heads of 96": ("Llama", {"head_dim": 96, "num_key_value_heads": 2}),
    "heads of 128": ("Llama", {"head_dim": 128}),
    "biases": ("Qwen2", {}),
    "norms of heads": ("Qwen3", {"head_dim": 128}),
    "a window": ("Mistral", {"sliding_window": 40}),
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
}


def save(path: Path, family: str, **changes: Any) -> None:
    """A random model in bfloat16."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):  # zeros and ones would hide their absence
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)


def logits_of_transformers(path: Path, dtype: torch.dtype) -> Tensor:
    """[num_tokens, vocab_size] float32 of all the sequences of ragged(), one after another.

    The model is read anew for each dtype: converting one would round the frequencies of its rotary embedding too.
    """
    return logits_of(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


def logits_of(model: transformers.PreTrainedModel) -> Tensor:
    """As of :func:`logits_of_transformers`."""
    model = model.to(CUDA).eval()
    inputs = [torch.tensor([tokens], device=CUDA) for tokens in ragged().values()]
    return torch.cat([model(ids).logits[0] for ids in inputs]).float()


class GpuModel:
    """A model with its caches, through the kernels that the engine would choose."""

    def __init__(self, path: Path, kv_dtype: torch.dtype = torch.bfloat16) -> None:
        self.host = PluginHost(select(Selection.parse(None), {}))
        resolved = resolve(EngineConfig(model=str(path), device="cuda"))
        loader = CheckpointLoader(
            resolved.checkpoint.weights(),
            Placement(CUDA, torch.bfloat16),
            Operations(BUILTIN_KERNELS, self.host.kernels()),
        )
        build = Builder(loader, max_model_len=MAX_MODEL_LEN)
        self._model = choose_model(resolved.model_config, self.host.models())(resolved.model_config, build)
        specs = build.attention_specs
        need = AttentionNeed(
            device=CUDA,
            dtype=torch.bfloat16,
            kv_dtype=kv_dtype,
            block_size=16,
            head_dim=specs[0].head_dim,
            num_heads=specs[0].num_heads,
            num_kv_heads=specs[0].num_kv_heads,
            window=specs[0].window is not None,
        )
        self._backend = choose_backend(self.host.attention_backends().values(), need)
        assert self._backend.name in ("triton", "triton-hopper")
        shapes = [self._backend.kv_shape(spec, 128) for spec in specs]
        self._kv = [torch.zeros(shape, device=CUDA).to(kv_dtype) for shape in shapes]

    @torch.inference_mode()
    def run(self, steps: Sequence[Mapping[int, list[int]]]) -> dict[int, Tensor]:
        """Logits [num_tokens, vocab_size] of each sequence, computed over the steps."""
        sequences = PagedSequences(num_blocks=128, block_size=16)
        parts: dict[int, list[Tensor]] = {}
        for step in steps:
            batch = sequences.batch(step)
            tensors = {
                field.name: value.to(CUDA)
                for field in dataclasses.fields(batch)
                if isinstance(value := getattr(batch, field.name), Tensor)
            }
            batch = dataclasses.replace(batch, **tensors)
            context = ForwardContext(batch, self._backend, self._backend.plan(batch), self._kv)
            logits = self._model.logits(self._model.forward(batch.tokens, batch.positions, context))
            for name, rows in sequences.split(step, logits).items():
                parts.setdefault(name, []).append(rows)
        return {name: torch.cat(rows) for name, rows in parts.items()}


def ragged() -> dict[int, list[int]]:
    source = random.Random(0)
    return {name: source.choices(range(SHAPE["vocab_size"]), k=length) for name, length in enumerate((3, 33, 130, 300))}


def in_steps(sequences: Mapping[int, list[int]]) -> list[dict[int, list[int]]]:
    """A chunk of each prompt, then chunks beside single tokens, then single tokens."""
    cuts = {name: [0, len(s) // 2, len(s) // 2 + 1, len(s) - 1, len(s)] for name, s in sequences.items()}
    steps = [{name: s[cuts[name][i] : cuts[name][i + 1]] for name, s in sequences.items()} for i in range(4)]
    return [{name: tokens for name, tokens in step.items() if tokens} for step in steps]


def logits_of_ours(path: Path) -> Tensor:
    """As of :func:`logits_of_transformers`, over several steps."""
    steps, model = in_steps(ragged()), GpuModel(path)
    for compiler in make_compilers(model.host, CUDA, 8):
        with compiler:
            model.run(steps)
    return torch.cat(list(model.run(steps).values()))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_logits_are_as_near_to_float32_as_those_of_transformers(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    save(tmp_path, family, **changes)
    exact = logits_of_transformers(tmp_path, torch.float32)
    theirs = relative_error(logits_of_transformers(tmp_path, torch.bfloat16), exact)
    assert relative_error(logits_of_ours(tmp_path), exact) < 1.15 * theirs < 0.05


@torch.inference_mode()
def test_logits_of_a_real_model_are_as_near(smollm2: Path) -> None:
    resolved = resolve(EngineConfig(model=str(smollm2)))
    weights = resolved.checkpoint.weights()
    state = {name: weights.read(name) for name in weights.names()}

    def reference(dtype: torch.dtype) -> Tensor:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**resolved.model_config), dtype=dtype
        )
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        return logits_of(model)

    exact = reference(torch.float32)
    theirs = relative_error(reference(torch.bfloat16), exact)
    assert relative_error(logits_of_ours(smollm2), exact) < 1.15 * theirs < 0.05


@torch.inference_mode()
def test_an_8_bit_cache_changes_logits_little(tmp_path: Path) -> None:
    save(tmp_path, "Llama")
    ours = torch.cat(list(GpuModel(tmp_path, torch.float8_e4m3fn).run(in_steps(ragged())).values()))
    assert relative_error(ours, logits_of_transformers(tmp_path, torch.float32)) < 0.08


# --- the engine ------------------------------------------------------------------------------------------------------


def engine(model: Path, **options: Any) -> Engine:
    settings: dict[str, Any] = {
        "device": "cuda",
        "dtype": "bfloat16",
        "num_blocks": 256,
        "max_num_seqs": 6,
        "max_model_len": 256,
        "enforce_eager": True,
    }
    return build_engine(resolve(EngineConfig(model=str(model), **{**settings, **options})))


def generate(made: Engine, prompts: Mapping[str, list[int]], params: SamplingParams) -> dict[str, list[TokenLogprobs]]:
    """What each prompt is continued with, all queued at once; prompts are seeded by their names."""
    commands: list[list[Command]] = [[Submit(name, ids, params, seed=int(name)) for name, ids in prompts.items()]]
    found: dict[str, list[TokenLogprobs]] = {name: [] for name in prompts}

    def receive(timeout: float | None) -> list[Command]:
        if commands:
            return commands.pop()
        return [Shutdown()] if timeout is None else []

    def send(outputs: StepOutputs) -> None:
        for output in outputs.sequences:
            assert output.error is None, output.error
            found[output.request_id] += output.logprobs or []

    drive(made, receive, send)
    made.check()
    return found


TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Dear Sir or Madam,\n\nI am writing to you because the kettle that I bought from your shop last week",
    "Photosynthesis is the process by which green plants use sunlight, water and carbon dioxide to make",
)
PROMPTS = {str(i): [(7 * i + 3 * j) % 256 for j in range(length)] for i, length in enumerate([1, 5, 33, 64, 90, 120])}


def num_equal(ours: Sequence[TokenLogprobs], theirs: Sequence[TokenLogprobs]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((i for i, (one, other) in pairs if one.token_id != other.token_id), len(ours))


def noise(ours: Mapping[str, list[TokenLogprobs]], exact: Mapping[str, list[TokenLogprobs]]) -> float:
    """The root mean square error of a token's log-probability where its context is the same."""
    errors = [
        one.logprob - other.logprob
        for name in exact
        for one, other in list(zip(ours[name], exact[name], strict=True))[: num_equal(ours[name], exact[name])]
    ]
    assert len(errors) > 30
    return math.sqrt(statistics.fmean(error * error for error in errors))


@pytest.mark.parametrize("model", ["tiny_llama", "smollm2"])
def test_greedy_text_is_that_of_a_cpu_but_for_ties(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    prompts = PROMPTS
    if model == "smollm2":  # what it has never seen makes it waver among more tokens than have log-probabilities
        tokenizer = resolve(EngineConfig(model=str(path))).checkpoint.tokenizer()
        prompts = {str(i): list(tokenizer(text)["input_ids"]) for i, text in enumerate(TEXTS)}
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=20, ignore_eos=True)
    on_gpu = generate(engine(path), prompts, params)
    on_cpu = generate(engine(path, device="cpu"), prompts, params)
    exact = generate(engine(path, device="cpu", dtype="float32"), prompts, params)
    assert noise(on_gpu, exact) < 1.5 * noise(on_cpu, exact)
    # the difference of two log-probabilities has a standard deviation of sqrt(2) noise: four of them are a tie
    tie = 4 * math.sqrt(2) * noise(on_gpu, exact)
    for name in prompts:
        same = num_equal(on_gpu[name], exact[name])
        if same < len(exact[name]):  # from there on the texts differ
            likely = exact[name][same]
            chosen = dict(zip(likely.top_ids, likely.top_logprobs, strict=True))[on_gpu[name][same].token_id]
            assert likely.logprob - chosen < tie


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_batch_invariant_logits_are_the_same_whatever_the_batch(tiny_llama: Path, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=16, logprobs=5)
    together = generate(engine(tiny_llama, batch_invariant=True), PROMPTS, params)
    by_two = generate(engine(tiny_llama, batch_invariant=True, max_num_seqs=2), PROMPTS, params)
    graphs = generate(engine(tiny_llama, batch_invariant=True, enforce_eager=False), PROMPTS, params)
    alone = engine(tiny_llama, batch_invariant=True)
    for name, prompt in PROMPTS.items():
        expected = generate(alone, {name: prompt}, params)[name]
        assert together[name] == expected
        assert by_two[name] == expected
        assert graphs[name] == expected


def test_batch_invariant_logits_are_the_same_however_prompts_are_cut(tiny_llama: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=5)
    whole = generate(engine(tiny_llama, batch_invariant=True), PROMPTS, params)
    for budget in (16, 50):
        cut = engine(tiny_llama, batch_invariant=True, max_num_batched_tokens=budget)
        assert generate(cut, PROMPTS, params) == whole
