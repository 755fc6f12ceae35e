"""Paged attention in C says the same as the torch backend, however sequences are cut, mixed and laid out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.attention.torch_backend import TorchAttention
from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionBackend, AttentionNeed, AttentionSpec
from octavo.layers.attention import Attention
from octavo.layers.norm import RMSNorm, TorchRMSNorm
from octavo.layers.rotary import RotaryEmbedding
from octavo.operations import NormNeed
from octavo_cpu.attention import CPUAttention

CPU = torch.device("cpu")
MAX_POSITION = 512
NEED = AttentionNeed(
    device=CPU,
    dtype=torch.float32,
    kv_dtype=torch.float32,
    block_size=16,
    head_dim=32,
    num_heads=4,
    num_kv_heads=2,
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def make_layer(
    need: AttentionNeed, *, window: int | None, soft_cap: float | None, norm: bool, rotary: bool
) -> Attention:
    spec = AttentionSpec(
        layer=0,
        num_heads=need.num_heads,
        num_kv_heads=need.num_kv_heads,
        head_dim=need.head_dim,
        scale=need.head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
    )
    norms = [None, None]
    if norm:
        kernel = TorchRMSNorm(NormNeed(CPU, need.dtype, need.head_dim))
        norms = [RMSNorm(torch.rand(need.head_dim).to(need.dtype) + 0.5, 1e-6, kernel) for _ in range(2)]
    config = {"rope_theta": 10000.0, "max_position_embeddings": MAX_POSITION}
    table = RotaryEmbedding.from_config(config, need.head_dim, MAX_POSITION, CPU) if rotary else None
    return Attention(spec, table, *norms)


def make_batch(rows: list[tuple[int, int]], block_tables: torch.Tensor, block_size: int) -> ForwardBatch:
    """``rows`` are (tokens computed before, tokens of this step); ``block_tables`` one row each."""
    positions = torch.cat([torch.arange(start, start + count) for start, count in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([count for _, count in rows]))
    blocks = block_tables[owner, positions // block_size].long()
    counts = [count for _, count in rows]
    lengths = [start + count for start, count in rows]
    return ForwardBatch(
        tokens=torch.zeros_like(positions),
        positions=positions,
        query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=block_tables,
        slots=blocks * block_size + positions % block_size,
        logit_rows=torch.zeros(0, dtype=torch.int64),
        max_query_len=max(counts),
        max_seq_len=max(lengths),
        num_decodes=sum(count == 1 for count in counts),
        query_lens=counts,
        context_lens=lengths,
    )


def run(
    backend: AttentionBackend, layer: Attention, need: AttentionNeed, qkv: list[torch.Tensor], steps: list[list[int]]
) -> torch.Tensor:
    """Outputs of all sequences after each step, each step computing ``steps[i][j]`` further tokens of sequence j."""
    num_blocks = -(-MAX_POSITION // need.block_size)
    pool = torch.randperm(len(qkv) * num_blocks, generator=torch.Generator().manual_seed(1))
    tables = pool.view(len(qkv), num_blocks).to(torch.int32)
    # what was in the cache before must not matter: anything, even not a number
    kv = torch.full(backend.kv_shape(layer.spec, len(pool)), float("nan"), dtype=need.kv_dtype)
    done = [0] * len(qkv)
    outputs = []
    for counts in steps:
        taken = [index for index, count in enumerate(counts) if count]
        batch = make_batch([(done[i], counts[i]) for i in taken], tables[taken], need.block_size)
        fused = torch.cat([qkv[i][done[i] : done[i] + counts[i]] for i in taken])
        outputs.append(backend.forward(layer, fused, kv, batch, backend.plan(batch)))
        done = [before + count for before, count in zip(done, counts, strict=True)]
    return torch.cat(outputs)


def random_qkv(need: AttentionNeed, steps: list[list[int]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = (need.num_heads + 2 * need.num_kv_heads) * need.head_dim
    totals = [sum(counts) for counts in zip(*steps, strict=True)]
    return [torch.randn(total, width, generator=generator).to(need.dtype) for total in totals]


@st.composite
def schedules(draw: st.DrawFn) -> list[list[int]]:
    """Steps of a few sequences; a step may leave a sequence out, but never all of them."""
    num_sequences = draw(st.integers(1, 4))
    count = st.one_of(st.just(1), st.integers(0, 40), st.sampled_from([15, 16, 17, 130]))
    steps = draw(st.lists(st.lists(count, min_size=num_sequences, max_size=num_sequences), min_size=1, max_size=3))
    return [counts if any(counts) else [1] * num_sequences for counts in steps]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=schedules(),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (8, 1), (14, 2)]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    block_size=st.sampled_from([16, 32, 256]),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ]
    ),
    window=st.sampled_from([None, 1, 20, 150]),
    soft_cap=st.sampled_from([None, 5.0]),
    norm=st.booleans(),
    rotary=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_says_the_same_as_the_torch_backend(
    num_threads: int,
    steps: list[list[int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    window: int | None,
    soft_cap: float | None,
    norm: bool,
    rotary: bool,
    seed: int,
) -> None:
    need = replace(
        NEED,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtypes[0],
        kv_dtype=dtypes[1],
    )
    layer = make_layer(need, window=window, soft_cap=soft_cap, norm=norm, rotary=rotary)
    qkv = random_qkv(need, steps, seed)
    mine = run(CPUAttention(need), layer, need, qkv, steps)
    # the oracle in float32: in bfloat16 it rounds more often than the kernel does
    exact_need = replace(need, dtype=torch.float32, kv_dtype=torch.float32)
    for module in (layer.query_norm, layer.key_norm):
        if module is not None:
            module.weight = module.weight.float()
    exact = run(TorchAttention(exact_need), layer, exact_need, [x.float() for x in qkv], steps)
    torch.testing.assert_close(mine.float(), exact, atol=TOLERANCE[need.dtype], rtol=TOLERANCE[need.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_takes_what_is_rotated_already(dtype: torch.dtype) -> None:
    need = replace(NEED, dtype=dtype, kv_dtype=dtype)
    layer = make_layer(need, window=None, soft_cap=None, norm=True, rotary=True)
    steps = [[20, 1, 7]]
    (batch,) = [make_batch([(0, 20), (0, 1), (0, 7)], torch.arange(6, dtype=torch.int32).view(3, 2), 16)]
    fused = torch.cat(random_qkv(need, steps, 0))
    backend = CPUAttention(need)
    kv = torch.zeros(backend.kv_shape(layer.spec, 6), dtype=dtype)
    plan = backend.plan(batch)
    at_once = backend.forward(layer, fused, kv, batch, plan)
    query, key, value = layer.split_norm_rotate(fused, batch.positions)
    apart = backend.attend(query, key, value, layer.spec, torch.zeros_like(kv), batch, plan)
    torch.testing.assert_close(apart, at_once, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 199), window=st.sampled_from([None, 50]))
def test_a_result_does_not_depend_on_how_the_prompt_was_cut(cut: int, window: int | None) -> None:
    layer = make_layer(NEED, window=window, soft_cap=None, norm=False, rotary=True)
    qkv = random_qkv(NEED, [[200]], 0)
    whole = run(CPUAttention(NEED), layer, NEED, qkv, [[200]])
    cut_up = run(CPUAttention(NEED), layer, NEED, qkv, [[cut], [200 - cut]])
    assert torch.equal(whole, cut_up)


def test_a_result_does_not_depend_on_its_neighbours() -> None:
    layer = make_layer(NEED, window=None, soft_cap=None, norm=False, rotary=True)
    steps = [[50, 70], [1, 3]]
    qkv = random_qkv(NEED, steps, 0)
    together = run(CPUAttention(NEED), layer, NEED, qkv, steps)
    alone = run(CPUAttention(NEED), layer, NEED, qkv[:1], [[50], [1]])
    assert torch.equal(together[:50], alone[:50])
    assert torch.equal(together[120], alone[50])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cuda")}, "runs on a CPU, not on cuda"),
        ({"dtype": torch.float16}, "not in torch.float16"),
        ({"kv_dtype": torch.float8_e4m3fn}, "not in torch.float8_e4m3fn"),
        ({"block_size": 8}, "block size that is a multiple of 16, not 8"),
        ({"head_dim": 40}, "head dimension that is a multiple of 16 up to 256, not 40"),
        ({"head_dim": 512}, "up to 256, not 512"),
    ],
)
def test_says_what_is_missing(changes: dict[str, object], reason: str) -> None:
    assert CPUAttention.missing(NEED) == []
    (lack,) = CPUAttention.missing(replace(NEED, **changes))
    assert reason in lack


def test_a_position_beyond_the_rotary_table_is_refused() -> None:
    layer = make_layer(NEED, window=None, soft_cap=None, norm=False, rotary=True)
    table = torch.arange(MAX_POSITION // 16 + 1, dtype=torch.int32).view(1, -1)
    batch = make_batch([(MAX_POSITION, 1)], table, 16)
    backend = CPUAttention(NEED)
    kv = torch.zeros(backend.kv_shape(layer.spec, table.numel()))
    with pytest.raises(IndexError, match="position 512 is beyond the rotary table of 512"):
        backend.forward(layer, torch.zeros(1, 256), kv, batch, backend.plan(batch))
