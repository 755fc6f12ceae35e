"""How weights lie for Hopper's tensor cores, how work is cut, and what is chosen; products run in ``tests/gpu``.

The kernel itself needs its device: Gluon has no interpreter. Here a stand-in decodes what the kernel is given, from
the layout that PTX describes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from tests.kernels.triton.test_hopper_attention import Pointer, load, store

from octavo_kernels import hopper_packed, hopper_stream
from octavo_kernels.hopper_linear import (
    HopperFp8,
    HopperPacked,
    fp8_order,
    fp8_tiling,
    int4_tiling,
    pack_fragments,
    packed_tiling,
)
from octavo_kernels.hopper_stream import STEP, TILE, first_unit, program_of
from octavo_quant.fp8_linear import ReferenceFp8
from octavo_quant.fp8_weight import Activation, Fp8Need, Fp8Weight
from octavo_quant.packed import PackedNeed, PackedWeight
from octavo_quant.packed_linear import ReferencePacked

SHARED_MEMORY = 227 * 1024
"""Bytes of a Hopper processor that programs may use."""


class StandIn:
    """Takes the place of the kernel: reads its arguments as it does and multiplies in float32."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **constants: self.run(grid[0], arguments, constants)

    def run(self, num_programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        out, partial, arrivals, x, words, params, scales, bias, num_tokens, num_rows, num_tiles, exponent = arguments
        in_features, group, block_m = constants["K"], constants["GROUP"], constants["BLOCK_M"]
        assert x.is_contiguous()
        assert x.shape == (num_tokens, in_features)
        assert num_tokens <= constants["TOKEN_TILES"] * block_m
        assert num_tiles == -(-num_rows // TILE) * constants["TOKEN_TILES"] <= arrivals.numel()
        assert 1 <= num_programs <= num_tiles * (in_features // STEP)
        assert partial.shape == (num_programs, TILE, block_m)
        if constants["FP8"]:
            weight = self.fp8_weight(words.view(torch.float8_e4m3fn))
            if group:
                lacking = {torch.bfloat16: 2.0**120, torch.float16: 2.0**8}[x.dtype]
                weight *= self.by_group(params, x.dtype, low=True, group=group)[:num_rows] / lacking
            else:
                weight *= scales[:, None]
            assert exponent & 0xFFFF == exponent >> 16
        else:
            weight = self.int4_weight(words, params, x.dtype, group)[:num_rows]
        y = x.float() @ weight.T
        out.copy_(y + bias.float() if constants["BIAS"] else y)

    def int4_weight(self, words: Tensor, params: Tensor, dtype: torch.dtype, group: int) -> Tensor:
        low, high = (self.by_group(params, dtype, low=low, group=group) for low in (True, False))
        values = self.fragments(words)
        if dtype == torch.bfloat16:  # odd outputs lie four bits higher, below the exponent of 2 ** -126
            values[1::2] *= 16
            return ((values.double() * 2.0**-133 * low + high) * 2.0**23).float()
        return (values + 1024 - high) * low

    def fragments(self, words: Tensor) -> Tensor:
        """4-bit values [outputs, inputs]: registers of ``wgmma`` m64k16 by thread (PTX ISA, figure of matrix A)."""
        tiles, steps = words.shape[:2]
        values = torch.zeros(tiles * TILE, steps * STEP)
        thread = torch.arange(128)
        for half in range(2):
            for block in range(2):
                mine = words[:, :, half, block].reshape(tiles, steps, 128, 4).long()
                for j in range(4):
                    for register in range(4):
                        for of_pair in range(2):
                            row = 16 * (thread // 32) + 2 * (thread % 32 // 4) + register % 2
                            column = 16 * j + 8 * (register // 2) + 2 * (thread % 4) + of_pair
                            nibble = mine[..., j] >> (4 * register + 16 * of_pair) & 15
                            place = values.view(tiles, 2, 64, steps, 2, 64)[:, block, :, :, half]
                            place[:, row, :, column] = nibble.permute(2, 0, 1).float()
        return values

    def fp8_weight(self, values: Tensor) -> Tensor:
        weight = torch.empty(values.shape)
        weight.view(len(values), -1, 64)[..., fp8_order(values.device)] = values.float().view(len(values), -1, 64)
        return weight

    def by_group(self, params: Tensor, dtype: torch.dtype, *, low: bool, group: int) -> Tensor:
        """One of the two parameters of each weight: [outputs, inputs]."""
        tiles, groups = params.shape[:2]
        half = (params if low else params >> 16).to(torch.int16).view(dtype).float()
        rows = half.view(tiles, groups, 2, 2, 32).permute(0, 3, 4, 2, 1).reshape(tiles * TILE, groups)
        return rows.repeat_interleave(group, dim=1)


class PackedStandIn(StandIn):
    """The same for the kernel with two groups of warps."""

    def run(self, num_programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        out, partial, arrivals, x, words, params, bias, num_tokens, num_rows, token_tiles = arguments
        in_features, block_m = constants["K"], constants["BLOCK_M"]
        num_tiles = -(-num_rows // TILE) * token_tiles
        assert x.block_shape == [block_m, 64]
        assert x.base.shape == (num_tokens, in_features)
        assert (token_tiles - 1) * block_m < num_tokens <= token_tiles * block_m
        assert 2 * num_tiles <= arrivals.numel()
        assert 1 <= num_programs <= num_tiles * (in_features // STEP)
        assert partial.shape == (num_programs, TILE, block_m)
        assert words.block_shape == [64, 32]  # of a tile, those of a step
        words = words.base.view(-1, in_features // STEP, 2, 2, 512)
        weight = self.int4_weight(words, params, x.base.dtype, constants["GROUP"])[:num_rows]
        y = x.base.float() @ weight.T
        out.copy_(y + bias.float() if constants["BIAS"] else y)


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    monkeypatch.setattr(hopper_stream, "_stream", StandIn())
    monkeypatch.setattr(hopper_packed, "_multiply_packed", PackedStandIn())
    with device:  # writing weights out is a kernel even here
        yield


def packed(
    num_in: int, num_out: int, group_size: int, dtype: torch.dtype = torch.float16, *, ordered: bool = True
) -> tuple[PackedNeed, PackedWeight]:
    groups = torch.arange(num_in) // group_size
    shape = (num_in // group_size, num_out)
    weight = PackedWeight.pack(
        torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8),
        (torch.rand(shape) + 0.1).half() / num_in**0.5,
        torch.randint(0, 16, shape),
        groups if ordered else groups[torch.randperm(num_in)],
        4,
    )
    return PackedNeed(weight.scales.device, dtype, num_in, num_out, 4, group_size, False, not ordered), weight


def fp8(num_in: int, num_out: int, block: tuple[int, int] | None, dtype: torch.dtype) -> tuple[Fp8Need, Fp8Weight]:
    weight = Fp8Weight.online(torch.randn(num_out, num_in))
    scales, rows, columns = weight.scales, 1, num_in
    if block is not None:
        rows, columns = block
        scales = (torch.rand(-(-num_out // rows), -(-num_in // columns)) + 0.5) / 448
    weight = Fp8Weight(weight.values, scales, rows, columns, "none")
    return Fp8Need(scales.device, dtype, num_in, num_out, "none", rows, columns), weight


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("num_tokens", [0, 1, 9, 17, 65, 385, 1024, 1025])
@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(256, 72, 64), (384, 264, 128), (256, 128, 256)])
def test_4_bit_weights_meet_every_number_of_tokens(num_tokens: int, num_in: int, num_out: int, group_size: int) -> None:
    need, weight = packed(num_in, num_out, group_size, ordered=group_size != 128)
    x, bias = torch.randn(num_tokens, num_in).half(), torch.randn(num_out).half()
    expected = ReferencePacked(need, weight, bias).apply(x)
    torch.testing.assert_close(HopperPacked(need, weight, bias).apply(x), expected, atol=8e-3, rtol=8e-3)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("largest_scale", [1e-6, 1.0, 6e4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_4_bit_weights_in_bfloat16_are_off_by_the_rounding_of_what_is_added_at_most(
    largest_scale: float, symmetric: bool
) -> None:
    need, weight = packed(256, 136, 64, dtype=torch.bfloat16)
    scales = weight.scales.float() * (largest_scale / weight.scales.float().max())
    weight = replace(weight, scales=scales.bfloat16(), zeros=None if symmetric else weight.zeros)
    layer = HopperPacked(need, weight, None)
    y = layer.apply(torch.eye(256).bfloat16()).float().T
    error = (y - weight.dequantize(torch.float32)).abs()
    scale = weight.scales.float().T.repeat_interleave(64, dim=1)
    zero = 8 if symmetric else weight.zeros.float().T.repeat_interleave(64, dim=1)
    added = 0.0 if symmetric else zero * 2**-8
    assert (error <= scale * (added + 15 * 2**-8)).all()


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [None, (128, 128), (64, 256)])
def test_fp8_weights_meet_tokens(dtype: torch.dtype, block: tuple[int, int] | None) -> None:
    need, weight = fp8(512, 136, block, dtype)
    x, bias = torch.randn(5, 512).to(dtype), torch.randn(136).to(dtype)
    expected = ReferenceFp8(need, weight, bias).apply(x)
    torch.testing.assert_close(HopperFp8(need, weight, bias).apply(x), expected, atol=0.2, rtol=1e-2)


@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize(
    ("num_tokens", "activation", "rounds"), [(32, "token", False), (33, "token", True), (33, "none", False)]
)
def test_more_than_32_tokens_are_rounded_where_the_checkpoint_allows_it(
    num_tokens: int, activation: Activation, rounds: bool
) -> None:
    need, weight = fp8(256, 48, None, torch.bfloat16)
    x = torch.randn(num_tokens, 256).bfloat16()
    exact = F.linear(x.float(), weight.dequantize(torch.float32))
    y = HopperFp8(replace(need, activation=activation), weight, None).apply(x).float()
    error = (y - exact).norm() / exact.norm()
    assert (0.01 < error < 0.08) if rounds else (error < 0.005)


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 70))
def test_runs_cover_every_step_once_and_programs_leave_one_part_to_others_at_most(
    num_programs: int, num_tiles: int, num_steps: int
) -> None:
    num_units = num_tiles * num_steps
    num_programs = min(num_programs, num_units)
    bounds = [first_unit.fn(program, num_programs, num_units) for program in range(num_programs + 1)]
    assert (bounds[0], bounds[-1]) == (0, num_units)
    for program, (begin, end) in enumerate(pairwise(bounds)):
        assert begin < end
        assert program_of.fn(begin, num_programs, num_units) == program
        assert program_of.fn(end - 1, num_programs, num_units) == program
        tiles = sorted({unit // num_steps for unit in range(begin, end)})
        firsts = [program_of.fn(tile * num_steps, num_programs, num_units) for tile in tiles]
        assert firsts[0] <= program  # which starts after it, as runs go to programs in reverse
        assert all(first == program for first in firsts[1:])


class Sums(Tensor):
    """Has the type that Gluon's tensors have."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("num_tiles", "num_steps", "num_programs"), [(1, 9, 4), (2, 5, 7), (5, 4, 3), (6, 3, 6), (3, 8, 1)]
)
def test_a_tile_that_programs_share_is_added_up_by_the_first_of_them(
    monkeypatch: pytest.MonkeyPatch, num_tiles: int, num_steps: int, num_programs: int
) -> None:
    """The end of the kernel with threads for programs, which no interpreter of Gluon runs."""
    block_m, num_tokens, num_rows, lock = 16, 13, 120 + 128 * (num_tiles - 1), threading.Lock()

    def atomic_add(pointer: Pointer, value: int, sem: str) -> int:
        time.sleep(1e-4)
        with lock:
            pointer.memory[pointer.offsets] += value
            return int(pointer.memory[pointer.offsets]) - value

    gl = SimpleNamespace(
        float32=torch.float32, int32=torch.int32, int1=torch.bool, constexpr=int, static_range=range,
        arange=lambda begin, end, layout: torch.arange(begin, end), SliceLayout=lambda *_: None,
        inline_asm_elementwise=lambda *_, **__: 0, num_warps=lambda: 8, thread_barrier=lambda: None,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype), atomic_add=atomic_add,
        convert_layout=lambda x, layout: x, load=lambda *args, cache_modifier="", **kwargs: load(*args, **kwargs),
        store=lambda pointer, value, mask=None: store(
            pointer, torch.as_tensor(value), torch.tensor(True) if mask is None else mask
        ),
    )  # fmt: skip
    monkeypatch.setattr(hopper_stream, "gl", gl)
    monkeypatch.setattr(hopper_stream, "program_of", program_of.fn)
    monkeypatch.setattr(hopper_stream, "output_layout", lambda *_: None)
    total = num_tiles * num_steps
    steps = torch.randint(-9, 9, (total, 128, block_m)).float()
    out = Pointer(torch.full((num_tokens * num_rows,), float("nan")))
    partial = Pointer(torch.full((num_programs * 128 * block_m,), float("nan")))
    arrivals, none = Pointer(torch.zeros(num_tiles, dtype=torch.int64)), Pointer(torch.zeros(1))

    def run(program: int) -> None:
        unit, end = (first_unit.fn(program + i, num_programs, total) for i in range(2))
        while unit < end:
            tile = unit // num_steps
            last = min(tile * num_steps + num_steps, end)
            acc = steps[unit:last].sum(0).as_subclass(Sums)
            hopper_stream._finish.fn(
                acc, tile, program, num_programs, total, out, partial, arrivals, none, none, num_tokens, num_rows,
                1, num_steps, block_m, False, 2.0, False,
            )  # fmt: skip
            unit = last

    with ThreadPoolExecutor(num_programs) as threads:
        list(threads.map(run, range(num_programs)))
    sums = steps.view(num_tiles, num_steps, 8, 2, 8, block_m).sum(
        1
    )  # [tile, 16 rows, half, g]: outputs 2 g and 2 g + 1
    expected = 2 * sums.permute(4, 0, 1, 3, 2).reshape(block_m, -1)[:num_tokens, :num_rows]
    assert torch.equal(out.memory.view(num_tokens, num_rows), expected)
    assert not arrivals.memory.any()


@given(st.integers(1, 512), st.integers(1, 60000))
def test_tilings_fit_their_processor(num_tokens: int, out_features: int) -> None:
    for tile, step_bytes in (
        (int4_tiling(out_features, num_tokens, 132), 64),
        (fp8_tiling(out_features, num_tokens, 132), 128),
    ):
        assert tile.block_m >= min(num_tokens, 64 if step_bytes == 64 else 128)
        assert tile.num_stages >= 3  # the depth that the loop counts on
        stage = TILE * step_bytes + tile.block_m * STEP * 2 + 2 * TILE * 4
        assert tile.resident * tile.num_stages * stage <= SHARED_MEMORY
        assert tile.resident * tile.num_warps * 32 * tile.max_registers <= 65536
        assert tile.num_programs == tile.resident * 132
        # programs that start early find no room for more of them on one processor than on another
        assert tile.resident > 1 or 2 * tile.num_stages * (stage - 2 * TILE * 4) > SHARED_MEMORY


@given(st.integers(65, 1024), st.integers(1, 60000), st.integers(1, 200))
def test_packed_tilings_fit_their_processor(num_tokens: int, out_features: int, num_steps: int) -> None:
    tile = packed_tiling(out_features, num_steps * STEP, num_tokens, 132)
    assert tile.num_stages * (tile.block_m * STEP * 2 + TILE * (64 + 8)) + 256 <= SHARED_MEMORY
    assert 66 < tile.num_programs <= 132  # one for each processor, at most half of which idle
    num_tiles = -(-out_features // TILE) * -(-num_tokens // tile.block_m)
    if tile.num_programs < 132:
        assert tile.num_programs % num_tiles == 0


@pytest.mark.parametrize(
    ("num_tokens", "wide", "narrow"),
    [
        *[(65, 128, 128), (128, 128, 128), (129, 256, 128), (192, 256, 128), (193, 256, 128), (256, 256, 128)],
        *[(257, 128, 128), (384, 128, 128), (385, 256, 256), (512, 256, 256), (640, 128, 128), (768, 256, 256)],
    ],
)
def test_tiles_are_as_large_as_they_can_be_without_more_padding(num_tokens: int, wide: int, narrow: int) -> None:
    assert packed_tiling(28672, 4096, num_tokens, 132).block_m == wide
    assert packed_tiling(4096, 14336, num_tokens, 132).block_m == narrow


def test_tiles_are_shared_only_where_that_saves_more_than_it_costs() -> None:
    assert packed_tiling(6144, 4096, 256, 132).num_programs == 96  # a tile each
    assert packed_tiling(4096, 4096, 256, 132).num_programs == 128  # half a tile
    assert packed_tiling(4096, 14336, 384, 132).num_programs == 132  # 96 long tiles
    assert packed_tiling(28672, 4096, 256, 132).num_programs == 132  # more tiles than processors


@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(128, 72, 64), (384, 256, 128), (256, 128, 256)])
def test_4_bit_weights_are_written_out(device: torch.device, num_in: int, num_out: int, group_size: int) -> None:
    need, weight = packed(num_in, num_out, group_size)
    layer = HopperPacked(need, PackedWeight(*(_to(part, device) for part in _parts(weight))), None)
    expected = weight.dequantize(torch.float32).half().to(device)
    torch.testing.assert_close(layer.dequantize(torch.float16), expected, atol=0, rtol=1e-3)


@pytest.mark.parametrize("block", [None, (128, 128), (64, 256)])
def test_fp8_weights_are_written_out(device: torch.device, block: tuple[int, int] | None) -> None:
    need, weight = fp8(512, 136, block, torch.float16)
    layer = HopperFp8(need, Fp8Weight(*(_to(part, device) for part in _parts(weight))), None)
    expected = weight.dequantize(torch.float32).half().to(device)
    torch.testing.assert_close(layer.dequantize(torch.float16), expected, atol=0, rtol=1e-3)


def _parts(weight: Any) -> list[Any]:
    return [getattr(weight, name) for name in weight.__slots__]


def _to(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else part


def test_words_of_a_step_lie_together() -> None:
    values = torch.randint(0, 16, (130, 384), dtype=torch.uint8)
    words = pack_fragments(values)
    assert words.shape == (2, 3, 2, 2, 512)
    assert torch.equal(StandIn().fragments(words)[:130], values.float())
    assert not StandIn().fragments(words)[130:].any()


def test_takes_half_a_byte_for_a_weight_and_four_for_a_group() -> None:
    need, weight = packed(256, 128, 128)
    assert HopperPacked(need, weight, None).num_bytes() == 256 * 128 // 2 + 2 * 128 * 4


def test_says_why_it_cannot_serve() -> None:
    device = torch.device("cpu")
    reasons = "; ".join(HopperPacked.missing(PackedNeed(device, torch.float16, 72, 8, 8, 24, True, False)))
    for part in ("CUDA device", "128 inputs at a time", "4-bit weights", "groups are of 64"):
        assert part in reasons
    reasons = "; ".join(HopperFp8.missing(Fp8Need(device, torch.float16, 256, 8, "none", 1, 32)))
    assert "blocks are of a multiple of 128" in reasons
