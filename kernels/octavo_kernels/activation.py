"""Gated activation: ``silu(gate) * up`` of a fused [gate | up] projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe, missing_device

BLOCK = 1024


@triton.jit
def _silu_and_mul(out_ptr, gate_up_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + columns, mask=mask, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * SIZE + columns, silu * up, mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [num_tokens, 2 * size] -> [num_tokens, size]; silu in float32, rounded before the product."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    device = describe(gate_up.device)
    _silu_and_mul[(num_tokens, triton.cdiv(size, BLOCK))](
        out,
        gate_up,
        gate_up.stride(0),
        SIZE=size,
        BLOCK=BLOCK,
        PDL=device.dependent_launch,
        num_warps=4,
        **device.options,
    )
    return out


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The same in float32 throughout."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


class TritonSiluAndMul:
    """The operation ``silu_and_mul``."""

    def __init__(self, need: Any) -> None:
        pass

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        return missing_device(need.device, need.dtype)

    def __call__(self, gate_up: Tensor) -> Tensor:
        """gate_up [num_tokens, 2 * size] -> [num_tokens, size]."""
        return silu_and_mul(gate_up)
