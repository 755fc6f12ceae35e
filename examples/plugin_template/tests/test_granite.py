"""Granite in Octavo says what Granite in Transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

from octavo import LLM, ConfigError, SamplingParams

PROMPTS = [[5, 17, 3, 88, 41, 2, 2, 9], [60, 61], list(range(1, 40))]


def save(folder: Path, **changes: Any) -> GraniteForCausalLM:
    """A tiny random checkpoint in ``folder``, and its model in Transformers."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # far from uniform, so that a wrong factor shows
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):  # zeros and ones would hide their absence
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}])
def test_logprobs_and_greedy_tokens_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = save(tmp_path, **changes)
    params = SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0)
    with LLM(str(tmp_path), plugins="granite", dtype="float32", cpu_kv_cache_gib=0.01) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            expected = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
            logprobs = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
        assert output.prompt_logprobs is not None
        for position, found in enumerate(output.prompt_logprobs[1:]):
            assert found is not None
            assert found.token.logprob == pytest.approx(logprobs[position, prompt[position + 1]].item(), abs=1e-4)


def test_an_activation_that_it_does_not_compute_is_refused(tmp_path: Path) -> None:
    save(tmp_path, hidden_act="gelu")
    with pytest.raises(ConfigError, match="hidden_act 'gelu' of a Granite model is not supported"):
        LLM(str(tmp_path), plugins="granite", cpu_kv_cache_gib=0.01)
