"""EAGLE heads: their drafts are what a plain reading of the papers says, and change nothing but the speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tests.plugins.speculative.conftest import VOCAB_SIZE, Erratic, Models, make_config, make_engine, run, tiny_config
from tests.plugins.speculative.test_equivalence import make_requests
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from octavo import CheckpointError, ConfigError, SamplingParams, SpeculativeConfig
from octavo.request import Request
from octavo.speculation import Speculation
from octavo_speculative.eagle import feature_layers

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, SIZE, NUM_LAYERS, DRAFT_VOCAB = 32, 4, 2, 8, 48, 10, 24
EPS = 1e-6
Tensors = dict[str, torch.Tensor]


def layer_tensors(name: str, input_size: int, draw: torch.Generator) -> Tensors:
    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    return {
        f"{name}.self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, input_size),
        f"{name}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, input_size),
        f"{name}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, input_size),
        f"{name}.self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
        f"{name}.mlp.gate_proj.weight": weight(SIZE, HIDDEN),
        f"{name}.mlp.up_proj.weight": weight(SIZE, HIDDEN),
        f"{name}.mlp.down_proj.weight": weight(HIDDEN, SIZE),
        f"{name}.post_attention_layernorm.weight": 1.0 + weight(HIDDEN),
    }


def make_head(kind: str, seed: int = 0) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    tensors = {"embed_tokens.weight": torch.randn(VOCAB_SIZE, HIDDEN, generator=draw)}
    if kind == "eagle":
        tensors |= layer_tensors("layers.0", HIDDEN, draw) | layer_tensors("layers.1", HIDDEN, draw)
        tensors["layers.1.input_layernorm.weight"] = 1.0 + 0.1 * torch.randn(HIDDEN, generator=draw)
        tensors["fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN, generator=draw) * 0.3
        tensors["fc.bias"] = torch.randn(HIDDEN, generator=draw) * 0.1
        return tensors
    name = "midlayer" if kind == "eagle3" else "layers.0"
    tensors |= layer_tensors(name, 2 * HIDDEN, draw)
    for norm in (f"{name}.input_layernorm", f"{name}.hidden_norm", "norm"):
        tensors[f"{norm}.weight"] = 1.0 + 0.1 * torch.randn(HIDDEN, generator=draw)
    tensors["fc.weight"] = torch.randn(HIDDEN, 3 * HIDDEN, generator=draw) * 0.3
    tensors["lm_head.weight"] = torch.randn(DRAFT_VOCAB, HIDDEN, generator=draw)
    ids = torch.randperm(VOCAB_SIZE, generator=draw)[:DRAFT_VOCAB].sort().values
    tensors["d2t"] = ids - torch.arange(DRAFT_VOCAB)
    tensors["t2d"] = torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill(0, ids, True)
    if kind == "eagle3-without-embedding":
        del tensors["embed_tokens.weight"]
    return tensors


KINDS = ["eagle", "eagle3", "eagle3-without-embedding"]


def save_head(folder: Path, kind: str, tensors: Tensors | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = tiny_config(num_hidden_layers=2 if kind == "eagle" else 1, hidden_size=HIDDEN).to_dict()
    if kind != "eagle":
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(tensors or make_head(kind), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Models:
    """A target with layers enough for EAGLE-3, and the heads."""
    folder = tmp_path_factory.mktemp("eagle")
    torch.manual_seed(7)
    LlamaForCausalLM(tiny_config(num_hidden_layers=NUM_LAYERS)).save_pretrained(folder / "target")
    PreTrainedTokenizerFast.from_pretrained(models.target).save_pretrained(folder / "target")
    return Models(folder / "target", {kind: save_head(folder / kind, kind) for kind in KINDS})


class Reference:
    """The heads without caches, paging or fusion: everything is computed again for each draft."""

    def __init__(self, deep: Models, kind: str) -> None:
        self.target = LlamaForCausalLM.from_pretrained(deep.target, dtype=torch.float32)
        self.kind, self.tensors = kind, make_head(kind)
        self.rotary = LlamaRotaryEmbedding(self.target.config)

    @torch.no_grad()
    def draft(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        states = self.target.model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        if self.kind == "eagle":
            features = states[-1][0]
        else:
            joined = torch.cat([states[i][0] for i in (2, NUM_LAYERS // 2, NUM_LAYERS - 3)], dim=-1)
            features = F.linear(joined, self.tensors["fc.weight"])
        read, drafts = list(tokens[1:]), list[int]()
        for _ in range(num_drafts):
            token, output = self.step(read, features)
            drafts.append(token)
            read.append(token)
            features = torch.cat([features, output[None]])
        return drafts

    def step(self, tokens: list[int], features: torch.Tensor) -> tuple[int, torch.Tensor]:
        table = self.tensors.get("embed_tokens.weight", self.target.model.embed_tokens.weight)
        embedded = table[tokens]
        if self.kind == "eagle":
            x = F.linear(torch.cat([embedded, features], -1), self.tensors["fc.weight"], self.tensors["fc.bias"])
            x = self.layer("layers.0", x, x)
            x = self.layer("layers.1", self.norm("layers.1.input_layernorm", x), x)
            return int(self.target.lm_head(x[-1]).argmax()), x[-1]
        name = "midlayer" if self.kind == "eagle3" else "layers.0"
        normed = self.norm(f"{name}.hidden_norm", features)
        x = self.layer(name, torch.cat([self.norm(f"{name}.input_layernorm", embedded), normed], -1), features)
        best = int(F.linear(self.norm("norm", x[-1]), self.tensors["lm_head.weight"]).argmax())
        return best + int(self.tensors["d2t"][best]), x[-1]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN,), self.tensors[f"{name}.weight"], EPS)

    def layer(self, name: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        def project(which: str, value: torch.Tensor) -> torch.Tensor:
            return F.linear(value, self.tensors[f"{name}.{which}.weight"])

        length = len(x)
        query, key, value = (
            project(f"self_attn.{which}_proj", x).view(1, length, -1, HEAD_DIM).transpose(1, 2) for which in "qkv"
        )
        query, key = apply_rotary_pos_emb(query, key, *self.rotary(x, torch.arange(length)[None]))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        residual = residual + project("self_attn.o_proj", attended.transpose(1, 2).reshape(length, -1))
        x = self.norm(f"{name}.post_attention_layernorm", residual)
        return residual + project("mlp.down_proj", F.silu(project("mlp.gate_proj", x)) * project("mlp.up_proj", x))


def speculative(deep: Models, kind: str, **changes: Any) -> SpeculativeConfig:
    return SpeculativeConfig(
        **{"method": "eagle", "model": str(deep.drafts[kind]), "num_tokens": 3, "fixed": True, **changes}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 3}, {"block_size": 1, "enable_prefix_caching": False}],
    ids=["usual", "chunks", "small-blocks"],
)
def test_drafts_are_what_the_head_says(deep: Models, kind: str, options: dict[str, Any]) -> None:
    """Through chunks of prompts, rejected drafts, steps without drafts and a warm prefix cache."""
    engine = make_engine(make_config(deep, speculative(deep, kind), **options))
    made = engine._speculation
    assert isinstance(made, Speculation)
    made._controller = Erratic(3, 1)
    reference, draft, num_checked = Reference(deep, kind), made._drafter.draft, 0

    def checked(requests: Sequence[Request], limits: Sequence[int]) -> Any:
        nonlocal num_checked
        guesses = draft(requests, limits)
        for request, limit, drafts in zip(requests, limits, guesses, strict=True):
            if drafts is not None:
                assert drafts == reference.draft(request.tokens, limit)
                num_checked += limit
        return guesses

    made._drafter.draft = checked  # type: ignore[method-assign]
    requests = make_requests(3, 4, temperature=0.8, max_tokens=12)
    run(engine, requests)
    run(engine, requests)
    assert num_checked > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_blocks", "overlap"), [(40, True), (200, False)])
def test_output_is_the_same_with_and_without_a_head(deep: Models, kind: str, num_blocks: int, overlap: bool) -> None:
    requests = make_requests(5, 6, temperature=0.0, max_tokens=24)
    requests += [(prompt, SamplingParams(temperature=0.9, max_tokens=10, n=2, seed=1)) for prompt, _ in requests[:2]]
    options = {"num_blocks": num_blocks, "overlap": overlap}
    plain = run(make_engine(make_config(deep, **options)), requests)
    guessed = run(make_engine(make_config(deep, speculative(deep, kind), **options)), requests)
    assert guessed.outputs == plain.outputs
    assert guessed.num_draft_tokens > 20
    assert (plain.num_preemptions > 0) == (num_blocks == 40)


def test_a_head_that_knows_the_target_is_right(deep: Models, tmp_path: Path) -> None:
    """EAGLE with a head that repeats the feature: the target's own output head then says the token again."""
    tensors = make_head("eagle")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc.bias")):
            tensors[name] = torch.zeros_like(tensors[name])
    tensors["fc.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], dim=1)
    save_head(tmp_path, "eagle", tensors)
    heads = Models(deep.target, {"eagle": tmp_path})
    requests = make_requests(1, 4, temperature=0.0, max_tokens=60, ignore_eos=True)
    guessed = run(make_engine(make_config(heads, speculative(heads, "eagle", num_tokens=1))), requests)
    num_right = 0
    for output in guessed.outputs.values():
        tokens, place = output.token_ids, 1
        while place < len(tokens) - 1:  # no draft is made for the last one
            right = tokens[place] == tokens[place - 1]
            num_right += right
            place += 1 + right  # the token after a right draft comes with it
    assert guessed.num_accepted == num_right > 0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_dtype_is_refused(deep: Models) -> None:
    with pytest.raises(ConfigError, match="--speculative-dtype float16: a head computes with the target's"):
        make_engine(make_config(deep, speculative(deep, "eagle", dtype="float16")))


def test_a_head_is_named(deep: Models) -> None:
    with pytest.raises(ConfigError, match="speculation by eagle needs a model"):
        make_engine(make_config(deep, SpeculativeConfig(method="eagle")))


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"vocab_size": 41}])
def test_a_head_for_another_target_is_refused(deep: Models, tmp_path: Path, changes: dict[str, Any]) -> None:
    heads = Models(deep.target, {"eagle": save_head(tmp_path, "eagle", **changes)})
    with pytest.raises(ConfigError, match=f"the head's {next(iter(changes))} is .* belongs to another target"):
        make_engine(make_config(heads, speculative(heads, "eagle")))


def test_a_target_that_shows_nothing_is_refused(deep: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo_models.decoder import CausalDecoder

    monkeypatch.delattr(CausalDecoder, "embed")
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not show its hidden states"):
        make_engine(make_config(deep, speculative(deep, "eagle")))


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        (None, "'d2t', which says which, is not"),
        (torch.full((DRAFT_VOCAB,), VOCAB_SIZE), "does not map the head's ids"),
    ],
)
def test_a_vocabulary_that_leads_nowhere_is_refused(
    deep: Models, tmp_path: Path, d2t: torch.Tensor | None, message: str
) -> None:
    tensors = make_head("eagle3")
    del tensors["d2t"]
    if d2t is not None:
        tensors["d2t"] = d2t
    heads = Models(deep.target, {"eagle3": save_head(tmp_path, "eagle3", tensors)})
    with pytest.raises(CheckpointError, match=message):
        make_engine(make_config(heads, speculative(heads, "eagle3")))


def test_layers_of_hidden_states() -> None:
    assert feature_layers({}, 32) == (2, 16, 29)
    for named in ([2, 16, 29], [1, 15, 28]):  # as inputs and as outputs
        assert feature_layers({"eagle_config": {"eagle_aux_hidden_state_layer_ids": named}}, 32) == (2, 16, 29)
    with pytest.raises(ConfigError, match=r"hidden states of layers \[3, 16, 29\]"):
        feature_layers({"eagle_aux_hidden_state_layer_ids": [3, 16, 29]}, 32)
    with pytest.raises(ConfigError, match="a target of 6 layers is too short"):
        feature_layers({}, 6)
