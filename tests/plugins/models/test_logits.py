"""Every variant of every family computes what Transformers computes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.plugins.models.conftest import MAX_MODEL_LEN, TINY, PagedModel, load

Save = Callable[..., tuple[Path, transformers.PreTrainedModel]]

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}
FAMILIES = ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3")
WINDOWED = {"use_sliding_window": True, "sliding_window": 5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{family}-rope-{kind}": (family, {"rope_parameters": rope})
        for family in FAMILIES
        for kind, rope in ROPE.items()
    },
    **{f"{family}-tied": (family, {"tie_word_embeddings": True}) for family in FAMILIES},
    **{f"{family}-kv-heads-{n}": (family, {"num_key_value_heads": n}) for family in FAMILIES for n in (1, 4)},
    **{f"{family}-head-dim-12": (family, {"head_dim": 12}) for family in FAMILIES},
    **{f"{family}-one-layer": (family, {"num_hidden_layers": 1}) for family in FAMILIES},
    **{f"{family}-eps": (family, {"rms_norm_eps": 0.1}) for family in FAMILIES},
    "Llama-no-head-dim": ("Llama", {"head_dim": None}),
    "Llama-attention-bias": ("Llama", {"attention_bias": True}),
    "Llama-mlp-bias": ("Llama", {"mlp_bias": True}),
    "Llama-all-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Mistral-window-5": ("Mistral", {"sliding_window": 5}),
    "Mistral-window-1": ("Mistral", {"sliding_window": 1}),
    "Mistral-window-null": ("Mistral", {"sliding_window": None}),
    "Mistral-window-5-yarn": ("Mistral", {"sliding_window": 5, "rope_parameters": ROPE["yarn"]}),
    "Ministral-mixed-layers": (
        "Ministral",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "Qwen2-window-unused": ("Qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
    "Qwen3-attention-bias": ("Qwen3", {"attention_bias": True}),
    **{
        f"{family}-window-from-layer-{layer}": (family, {**WINDOWED, "max_window_layers": layer})
        for family in ("Qwen2", "Qwen3")
        for layer in (0, 1, 3)
    },
    **{
        f"{family}-layer-types": (
            family,
            {**WINDOWED, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        )
        for family in ("Qwen2", "Qwen3")
    },
}


def ragged_sequences(seed: int = 0) -> dict[int, list[int]]:
    """Four sequences, from shorter than a block to the longest that the model takes."""
    random_source = random.Random(seed)
    lengths = (3, 17, 26, MAX_MODEL_LEN)
    return {name: random_source.choices(range(TINY["vocab_size"]), k=n) for name, n in enumerate(lengths)}


def in_two_steps(sequences: Mapping[int, list[int]], cuts: Mapping[int, int]) -> list[dict[int, list[int]]]:
    """The sequences' tokens, cut in two; an empty part takes no row in its step."""
    first = {name: tokens[: cuts[name]] for name, tokens in sequences.items()}
    second = {name: tokens[cuts[name] :] for name, tokens in sequences.items()}
    return [{name: tokens for name, tokens in step.items() if tokens} for step in (first, second)]


def our_logits(model: PagedModel, steps: list[dict[int, list[int]]]) -> dict[int, torch.Tensor]:
    parts: dict[int, list[torch.Tensor]] = {}
    for step in steps:
        for name, logits in model.step(step).items():
            parts.setdefault(name, []).append(logits)
    return {name: torch.cat(logits) for name, logits in parts.items()}


def check(path: Path, reference: transformers.PreTrainedModel, **overrides: Any) -> None:
    """Ragged sequences in one shuffled cache, cut over two steps, give the reference's logits at every token."""
    model, loader, build = load(path, **overrides)
    sequences = ragged_sequences()
    steps = in_two_steps(sequences, {0: 3, 1: 0, 2: 25, 3: 9})  # whole, all later, one token left, chunked
    logits = our_logits(PagedModel(model, build), steps)
    for name, tokens in sequences.items():
        expected = reference(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits[name], expected, rtol=1e-4, atol=1e-4)
    assert loader.unread() == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, save: Save) -> None:
    family, changes = VARIANTS[variant]
    check(*save(family, **changes))


@pytest.mark.parametrize("variant", [*FAMILIES, "Llama-one-layer"])
def test_a_step_that_keeps_some_tokens_gives_their_logits(variant: str, save: Save) -> None:
    family, changes = VARIANTS.get(variant, (variant, {}))
    path, _ = save(family, **changes)
    model, _, build = load(path)
    all_tokens, last_tokens = PagedModel(model, build), PagedModel(model, build)
    for step in in_two_steps(ragged_sequences(), {0: 3, 1: 0, 2: 25, 3: 9}):
        expected = torch.stack([logits[-1] for logits in all_tokens.step(step).values()])
        torch.testing.assert_close(last_tokens.last(step), expected, rtol=1e-5, atol=1e-5)


def test_a_sharded_checkpoint(save: Save) -> None:
    path, reference = save("Llama", shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    assert (path / "model.safetensors.index.json").exists()
    check(path, reference)


@pytest.mark.parametrize("kind", [kind for kind in ROPE if kind != "default"])
def test_the_older_spelling_of_the_configuration(kind: str, save: Save) -> None:
    path, reference = save("Llama", rope_parameters=ROPE[kind])
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {("type" if kind in ("linear", "dynamic") else "rope_type"): rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    (path / "config.json").write_text(json.dumps(config))
    check(path, reference)


def test_settings_that_old_configurations_leave_out(save: Save) -> None:
    path, reference = save(
        "Llama", num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    config = json.loads((path / "config.json").read_text())
    for name in ("num_key_value_heads", "head_dim", "rope_parameters", "attention_bias", "mlp_bias", "hidden_act"):
        del config[name]
    (path / "config.json").write_text(json.dumps(config))
    check(path, reference)


def test_the_dynamic_rope_is_stretched_once_for_the_longest_context(save: Save) -> None:
    """Transformers stretches when a context outgrows the trained one; we know the longest from the start."""
    path, reference = save("Llama", rope_parameters=ROPE["dynamic"], max_position_embeddings=MAX_MODEL_LEN // 2)
    model, _, build = load(path)
    tokens = ragged_sequences()[3]
    expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(our_logits(PagedModel(model, build), [{0: tokens}])[0], expected, rtol=1e-4, atol=1e-4)
