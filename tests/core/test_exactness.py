"""The real default model says, token for token, what Transformers says with the same weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.engines import run, submit
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.config import EngineConfig
from octavo.default_model import local_default_model
from octavo.request import SamplingParams
from octavo.startup import build_engine, make_text, resolve
from octavo.text import TextProcessor

NUM_PROMPTS, NUM_TOKENS = 64, 64
OPENINGS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    '{"name": "Ada", "born":',
    "Der schnelle braune Fuchs",
    "List three reasons to learn the piano:\n1.",
    "In 1969, astronauts",
    "SELECT name FROM",
    "日本の首都は",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at",
    "The following table shows the results: 3.14, 2.71, 1.41,",
    "🙂 means happy, 😢 means",
    "import numpy as np\n\ndef softmax(x):",
    "To be, or not to be,",
]


@pytest.fixture(scope="module")
def model() -> Path:
    path = local_default_model()
    if path is None:
        pytest.skip("the default model is not on this machine; 'python -m octavo.default_model' fetches it")
    return path


def prompts_of(text: TextProcessor) -> list[list[int]]:
    """Sixty-four: the openings plain, as a question in a chat, after some other text, and cut in odd places."""
    pick = random.Random(0)
    prompts: list[list[int]] = []
    for number, opening in enumerate(OPENINGS):
        prompts.append(text.encode(opening))
        prompts.append(text.encode_chat([{"role": "user", "content": f"Go on: {opening}"}]))
        prompts.append(text.encode(" ".join(pick.sample(OPENINGS, 3 + number % 4)) + opening))
        prompts.append(text.encode(opening)[: 1 + number % 5])
    assert len(prompts) == NUM_PROMPTS
    return prompts


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_transformers(model: Path) -> None:
    """One forward pass over prompt and answer says what greedy generation would have taken at every place."""
    resolved = resolve(
        EngineConfig(
            model=str(model), dtype="float32", device="cpu", max_num_seqs=32, max_model_len=512, cpu_kv_cache_gib=1.0
        )
    )
    prompts = prompts_of(make_text(resolved))
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    engine = build_engine(resolved)
    samples = run(engine, [submit(str(i), prompt, params) for i, prompt in enumerate(prompts)])
    del engine

    reference = LlamaForCausalLM(LlamaConfig(**resolved.model_config)).eval()
    weights = resolved.checkpoint.weights()
    found = reference.load_state_dict({name: weights.read(name).float() for name in weights.names()}, strict=False)
    reference.tie_weights()
    assert found.unexpected_keys == []
    assert set(found.missing_keys) <= {"lm_head.weight"}
    for i, prompt in enumerate(prompts):
        sample = samples[str(i), 0]
        tokens = [*prompt, *sample.tokens]
        assert len(sample.tokens) == NUM_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert sample.tokens == logits.argmax(-1).tolist(), f"prompt {i}"
        expected = logits.log_softmax(-1).amax(-1).tolist()
        assert [item.logprob for item in sample.logprobs] == pytest.approx(expected, abs=1e-4)
