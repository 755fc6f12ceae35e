"""The whole path: greedy tokens of ``LLM`` equal those of Transformers' ``generate``, in each family."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.plugins.models.conftest import TINY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from octavo import LLM, SamplingParams

Save = Callable[..., tuple[Path, transformers.PreTrainedModel]]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": 6}),
    "Ministral": ("Ministral", {"sliding_window": 6}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {}),
}
NUM_TOKENS = 20


def save_tokenizer(path: Path) -> None:
    """Words "t0", "t1", …: one for each row of the vocabulary."""
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(TINY["vocab_size"])}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(variant: str, save: Save) -> None:
    family, changes = VARIANTS[variant]
    path, reference = save(family, **changes)
    save_tokenizer(path)
    source = random.Random(0)
    prompts = [source.choices(range(TINY["vocab_size"]), k=length) for length in (1, 5, 16, 17, 40)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    # less room than the longest prompt takes: it is computed in parts, beside the others
    options: dict[str, Any] = {"dtype": "float32", "block_size": 4, "num_blocks": 64, "max_num_batched_tokens": 16}
    with LLM(str(path), max_num_seqs=4, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor([prompt])
        expected = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),  # else it is guessed from the padding token
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(output.outputs[0].token_ids) == expected[0, len(prompt) :].tolist()
