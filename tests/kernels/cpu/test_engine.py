"""The engine over these kernels says the same as Transformers, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.config import EngineConfig
from octavo.messages import Submit
from octavo.request import SamplingParams
from octavo.startup import build_engine, resolve

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=96,
        intermediate_size=208,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # far from ties
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_greedy_tokens_equal_those_of_transformers(checkpoint: Path) -> None:
    engine = build_engine(
        resolve(
            EngineConfig(
                model=str(checkpoint), dtype="float32", device="cpu", num_blocks=64, max_num_seqs=4, num_threads=1
            )
        )
    )
    assert engine.info.attention_backend == "cpu"
    prompts = [torch.randint(3, 160, (length,)).tolist() for length in (1, 5, 16, 33, 70)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Submit(str(index), prompt, params, seed=0))
    found: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while engine.has_work:
        for output in engine.settle(engine.launch()).sequences:
            found[output.request_id].extend(output.token_ids)

    reference = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[str(index)] == expected[0, len(prompt) :].tolist()
