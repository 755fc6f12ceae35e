"""Products of many tokens on Hopper that do what would follow them: gate their own output, or add it to a residual.

A prompt's products run at the rate of the matrix units, or at the device's limit of power. What can be saved are the
bytes between them: a fused [gate | up] projection is written for the activation and read by it, 8 bytes for each of the
results. So here a tile has the same outputs of both, and what leaves it is ``silu(gate) * up``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo_kernels.launch import describe, missing_hopper
from octavo_kernels.linear import MAX_TOKENS, SkinnyLinear

PART_ROWS = 64
"""Tokens of a tile that a group of four warps multiplies by all of its weights."""

BLOCK_N = 128
"""Outputs of a tile: twice as many rows of weights."""

STEP = 64
"""Inputs of a step: 128 bytes, as wide as shared memory is swizzled."""

SIDE_BY_SIDE = 2048
"""Tokens whose tiles take the same weights one after the other, so that the processors share what L2 holds."""


@dataclass(frozen=True, slots=True)
class GatedTiling:
    """How the kernel is compiled: all threads start with ``max_registers``, and then groups share them out anew."""

    num_parts: int  # groups that multiply, PART_ROWS tokens each
    num_stages: int  # steps on their way
    instruction_rows: int  # rows of weights that an instruction takes, and float32 sums of a thread
    max_registers: int
    multiplying_registers: int
    loading_registers: int

    @property
    def block_m(self) -> int:
        """Tokens of a tile."""
        return self.num_parts * PART_ROWS


def gated_tiling(num_tokens: int) -> GatedTiling:
    """Measured on an H200. Tiles of 192 tokens load a fifth less for the same products, which takes power, but they
    leave more processors idle in the last round."""
    if num_tokens < 4096:
        return GatedTiling(2, 4, 2 * BLOCK_N, max_registers=168, multiplying_registers=240, loading_registers=24)
    return GatedTiling(3, 3, BLOCK_N, max_registers=128, multiplying_registers=160, loading_registers=32)


@gluon.jit
def _place(tile, token_tiles, output_tiles, NEIGHBOURS: gl.constexpr):
    """The tile's place among the tokens and among the outputs."""
    band = tile // (NEIGHBOURS * output_tiles)
    within = tile % (NEIGHBOURS * output_tiles)
    height = gl.minimum(token_tiles - band * NEIGHBOURS, NEIGHBOURS)
    return band * NEIGHBOURS + within % height, within // height


@gluon.jit
def _following(slot, STAGES: gl.constexpr):
    return gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def _load(loads, NUM_PARTS: gl.constexpr, NUM_STEPS: gl.constexpr, STAGES: gl.constexpr, NEIGHBOURS: gl.constexpr):
    """The loading warp: inputs [(slot, part)] x [PART_ROWS, STEP], weights [(slot, gate or up)] x [BLOCK_N, STEP]."""
    x_descriptor, weight_descriptor, inputs, weights, full, empty, num_rows, token_tiles = loads
    PART_ROWS: gl.constexpr = inputs.shape[1]
    BLOCK_N: gl.constexpr = weights.shape[1]
    STEP: gl.constexpr = inputs.shape[2]
    output_tiles = num_rows // BLOCK_N
    slot = 0
    parity = 1  # the first time around every slot is empty
    for tile in range(gl.program_id(0), token_tiles * output_tiles, gl.num_programs(0)):
        token_tile, output_tile = _place(tile, token_tiles, output_tiles, NEIGHBOURS)
        for step in range(NUM_STEPS):
            mbarrier.wait(empty.index(slot), parity)
            mbarrier.expect(full.index(slot), (NUM_PARTS * PART_ROWS + 2 * BLOCK_N) * STEP * 2)
            for part in gl.static_range(NUM_PARTS):
                place = [(token_tile * NUM_PARTS + part) * PART_ROWS, step * STEP]
                target = inputs.index(slot * NUM_PARTS + part)
                tma.async_copy_global_to_shared(x_descriptor, place, full.index(slot), target)
            for part in gl.static_range(2):
                place = [part * num_rows + output_tile * BLOCK_N, step * STEP]
                target = weights.index(slot * 2 + part)
                tma.async_copy_global_to_shared(weight_descriptor, place, full.index(slot), target)
            slot = _following(slot, STAGES)
            parity = gl.where(slot == 0, parity ^ 1, parity)


@gluon.jit
def _multiply(
    product, PART: gl.constexpr, NUM_PARTS: gl.constexpr, NUM_STEPS: gl.constexpr, STAGES: gl.constexpr,
    NEIGHBOURS: gl.constexpr, INSTRUCTION_ROWS: gl.constexpr,
):  # fmt: skip
    """A group of warps: the PART-th of each tile's tokens, from inputs [(slot, part)] x [PART_ROWS, STEP] and weights
    [slot] x [gates, then ups; STEP]."""
    out_ptr, inputs, weights, full, empty, num_tokens, num_rows, token_tiles = product
    PART_ROWS: gl.constexpr = inputs.shape[1]
    BLOCK_N: gl.constexpr = weights.shape[1] // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, INSTRUCTION_ROWS, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    output_tiles = num_rows // BLOCK_N
    slot = 0
    parity = 0
    for tile in range(gl.program_id(0), token_tiles * output_tiles, gl.num_programs(0)):
        token_tile, output_tile = _place(tile, token_tiles, output_tiles, NEIGHBOURS)
        acc = gl.zeros([PART_ROWS, 2 * BLOCK_N], gl.float32, MMA)
        for step in range(NUM_STEPS):
            mbarrier.wait(full.index(slot), parity)
            weight = weights.index(slot).permute((1, 0))
            acc = warpgroup_mma(inputs.index(slot * NUM_PARTS + PART), weight, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has been read
            before = gl.where(slot == 0, STAGES - 1, slot - 1)
            mbarrier.arrive(empty.index(before), pred=step > 0)
            slot = _following(slot, STAGES)
            parity = gl.where(slot == 0, parity ^ 1, parity)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
        # rounded as a product that is written and an activation that reads it would round
        gate, up = gl.split(acc.reshape([PART_ROWS, 2, BLOCK_N]).permute([0, 2, 1]))
        gate = gate.to(dtype).to(gl.float32)
        result = (gate / (1.0 + gl.exp(-gate))).to(dtype) * up.to(dtype)
        m = (token_tile * NUM_PARTS + PART) * PART_ROWS + gl.arange(0, PART_ROWS, gl.SliceLayout(1, STORE))
        n = output_tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, STORE))
        pointers = out_ptr + (m.to(gl.int64) * num_rows)[:, None] + n[None, :]
        gl.store(pointers, gl.convert_layout(result, STORE), mask=(m < num_tokens)[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "token_tiles"])
def _multiply_gated(
    out_ptr,
    x_descriptor,
    weight_descriptor,
    num_tokens,
    num_rows,
    token_tiles,
    NUM_PARTS: gl.constexpr,
    PART_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STEP: gl.constexpr,
    NUM_STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    NEIGHBOURS: gl.constexpr,
    INSTRUCTION_ROWS: gl.constexpr,
    MULTIPLYING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
):
    """Program: every so many tiles of NUM_PARTS * PART_ROWS tokens and BLOCK_N outputs."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    inputs = gl.allocate_shared_memory(dtype, [STAGES * NUM_PARTS, PART_ROWS, STEP], SHARED)
    weights = gl.allocate_shared_memory(dtype, [STAGES * 2, BLOCK_N, STEP], SHARED)
    pairs = weights._reinterpret(dtype, [STAGES, 2 * BLOCK_N, STEP], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=NUM_PARTS)
    product = (out_ptr, inputs, pairs, full, empty, num_tokens, num_rows, token_tiles)
    loads = (x_descriptor, weight_descriptor, inputs, weights, full, empty, num_rows, token_tiles)
    if NUM_PARTS == 2:
        gl.warp_specialize(
            [
                (_multiply, (product, 0, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS, INSTRUCTION_ROWS)),
                (_multiply, (product, 1, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS, INSTRUCTION_ROWS)),
                (_load, (loads, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS)),
            ],
            [4, 1],
            [MULTIPLYING_REGISTERS, LOADING_REGISTERS],
        )
    else:  # three
        gl.warp_specialize(
            [
                (_multiply, (product, 0, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS, INSTRUCTION_ROWS)),
                (_multiply, (product, 1, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS, INSTRUCTION_ROWS)),
                (_multiply, (product, 2, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS, INSTRUCTION_ROWS)),
                (_load, (loads, NUM_PARTS, NUM_STEPS, STAGES, NEIGHBOURS)),
            ],
            [4, 4, 1],
            [MULTIPLYING_REGISTERS, MULTIPLYING_REGISTERS, LOADING_REGISTERS],
        )


def multiply_gated(x: Tensor, weight: Tensor, tile: GatedTiling) -> Tensor:
    """x [num_tokens, in_features], weight [2 * size, in_features], of gates first -> [num_tokens, size]:
    ``silu(gate) * up``, in float32 up to where a projection and an activation of their own would round.

    ``in_features`` is a multiple of ``STEP`` and ``size`` of ``BLOCK_N``.
    """
    num_tokens, in_features = x.shape
    size = weight.shape[0] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    token_tiles = triton.cdiv(num_tokens, tile.block_m)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _multiply_gated[(min(describe(x.device).num_processors, token_tiles * (size // BLOCK_N)),)](
        out,
        TensorDescriptor.from_tensor(x.contiguous(), [PART_ROWS, STEP], layout),
        TensorDescriptor.from_tensor(weight, [BLOCK_N, STEP], layout),
        num_tokens,
        size,
        token_tiles,
        NUM_PARTS=tile.num_parts,
        PART_ROWS=PART_ROWS,
        BLOCK_N=BLOCK_N,
        STEP=STEP,
        NUM_STEPS=in_features // STEP,
        STAGES=tile.num_stages,
        NEIGHBOURS=triton.cdiv(SIDE_BY_SIDE, tile.block_m),
        INSTRUCTION_ROWS=tile.instruction_rows,
        MULTIPLYING_REGISTERS=tile.multiplying_registers,
        LOADING_REGISTERS=tile.loading_registers,
        num_warps=4,
        maxnreg=tile.max_registers,
    )
    return out


class HopperLinear(SkinnyLinear):
    """The operation ``linear``: with many tokens too it gates its own output, and adds it to a residual
    (:class:`octavo.interfaces.GatesOutput`, :class:`octavo.interfaces.AddsOutput`)."""

    MIN_ROUNDS = 6
    """Tiles of every processor from which a gated product is the faster one: fewer leave too many idle in the last."""

    MIN_ADDED = 1024
    """Tokens from which adding to a residual takes less time in the product than in the norm."""

    def __init__(self, need: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(need, weight, bias)
        self._gates = bias is None and need.in_features % STEP == 0 and need.out_features % (2 * BLOCK_N) == 0

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return [*super().missing(need), *missing_hopper(need.device)]

    def apply_gated(self, x: Tensor) -> Tensor | None:
        """x [num_tokens, in_features] -> [num_tokens, out_features / 2]; None: two kernels take less time."""
        num_tokens = x.shape[0]
        if num_tokens <= MAX_TOKENS:
            return super().apply_gated(x)
        tile = gated_tiling(num_tokens)
        num_tiles = triton.cdiv(num_tokens, tile.block_m) * (self.weight.shape[0] // (2 * BLOCK_N))
        if not self._gates or num_tiles < self.MIN_ROUNDS * self._device.num_processors:
            return None
        return multiply_gated(x, self.weight, tile)

    def apply_onto(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """x [num_tokens, in_features] -> [num_tokens, out_features]; None: it has been added to ``residual``."""
        if self.bias is not None or x.shape[0] < self.MIN_ADDED:
            return self.apply(x)
        residual.addmm_(x, self.weight.t())
        return None
