"""Gated activation: ``silu(gate) * up`` of a fused [gate | up] projection, alone and fused with the rounding to FP8."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.fp8_tokens import TokenRounding, store_rounded
from octavo_kernels.launch import describe, missing_device, power_of_two

BLOCK = 1024


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """``silu(gate) * up``, silu in float32: operands and silu are rounded to ``dtype``, which is the result's."""
    gate = gate.to(dtype).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)


@triton.jit
def _silu_and_mul(
    out_ptr,
    scales_ptr,
    gate_up_ptr,
    stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
    REORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, BLOCK outputs); one that rounds has all of a token's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + SIZE + columns, mask=mask, other=0.0)
    result = gated(gate, up, gate_up_ptr.dtype.element_ty)
    if ROUND:
        store_rounded(out_ptr + row * SIZE, scales_ptr + row, result, columns, mask, REORDERED)
    else:
        tl.store(out_ptr + row * SIZE + columns, result, mask=mask)


def silu_and_mul(gate_up: Tensor, form: TokenRounding | None = None) -> Tensor:
    """gate_up [num_tokens, 2 * size] -> [num_tokens, size]; silu in float32, rounded before the product, and that
    again before it is brought into ``form``."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    rounded = None if form is None else form.empty(num_tokens, size, gate_up.device)
    out = gate_up.new_empty((num_tokens, size)) if rounded is None else rounded
    if num_tokens == 0:
        return out
    device = describe(gate_up.device)
    block = BLOCK if rounded is None else power_of_two(size)
    _silu_and_mul[(num_tokens, triton.cdiv(size, block))](
        out,
        out if rounded is None else rounded.scales,
        gate_up,
        gate_up.stride(0),
        SIZE=size,
        BLOCK=block,
        ROUND=rounded is not None,
        REORDERED=form is not None and form.reordered,
        PDL=device.dependent_launch,
        num_warps=min(max(block // 1024, 4), 16),
        **device.options,
    )
    return out


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The same in float32 throughout."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


class TritonSiluAndMul:
    """The operation ``silu_and_mul``, rounding to FP8 where the need's form says so."""

    def __init__(self, need: Any) -> None:
        self._form = need.form if isinstance(need.form, TokenRounding) else None

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return missing_device(need.device, need.dtype)

    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up [num_tokens, 2 * size] -> [num_tokens, size]."""
        return silu_and_mul(gate_up, self._form)
