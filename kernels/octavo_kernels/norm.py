"""Root-mean-square normalization, alone and fused with the residual addition before it and with the rounding to FP8
after it: one program per token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.fp8_tokens import MAX_SIZE, TokenRounding, store_rounded
from octavo_kernels.launch import describe, missing_device, power_of_two


@triton.jit
def _rms_norm(
    out_ptr,
    scales_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ROUND: tl.constexpr,
    REORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)  # not written by any predecessor
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
        total = (x + residual).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * SIZE + columns, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    normalized = (x * scale).to(x_ptr.dtype.element_ty) * weight
    if ROUND:
        store_rounded(out_ptr + row * SIZE, scales_ptr + row, normalized, columns, mask, REORDERED)
    else:
        tl.store(out_ptr + row * SIZE + columns, normalized, mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, form: TokenRounding | None = None
) -> Tensor:
    """Normalize the last axis of ``x`` [num_tokens, size]; the norm of ``x + residual`` when there is a residual,
    which then holds that sum (in place, [num_tokens, size], contiguous).

    The sum of squares is in float32; the quotient is rounded to the dtype of ``x`` before it meets ``weight`` [size],
    and the product again before it is brought into ``form``.
    """
    size = x.shape[-1]
    rows = x.view(-1, size)
    rounded = None if form is None else form.empty(rows.shape[0], size, x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if rounded is None else rounded
    if rows.shape[0] == 0:
        return out
    if residual is not None and not residual.is_contiguous():
        raise ValueError(f"the residual must be contiguous, not of strides {residual.stride()}")
    block = power_of_two(size)
    device = describe(x.device)
    _rms_norm[(rows.shape[0],)](
        out,
        out if rounded is None else rounded.scales,
        rows,
        rows if residual is None else residual,
        weight,
        rows.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        ADD=residual is not None,
        ROUND=rounded is not None,
        REORDERED=form is not None and form.reordered,
        PDL=device.dependent_launch,
        num_warps=min(max(block // 512, 1), 16),
        **device.options,
    )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in float32 throughout."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


class TritonRMSNorm:
    """The operation ``rms_norm``, rounding to FP8 where the need's form says so."""

    def __init__(self, need: Any) -> None:
        self._form = need.form if isinstance(need.form, TokenRounding) else None

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_device(need.device, need.dtype)
        if need.size > MAX_SIZE:
            reasons.append(f"it normalizes up to {MAX_SIZE} elements in one program, not {need.size}")
        return reasons

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., size] -> the same shape."""
        if x.dim() > 2 and not x.is_contiguous():
            x = x.contiguous()
        return rms_norm(x, weight, eps, form=self._form)

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); the sum is written into ``residual``."""
        return rms_norm(x, weight, eps, residual, self._form), residual
