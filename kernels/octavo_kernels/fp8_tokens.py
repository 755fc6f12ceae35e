"""Tokens rounded to FP8, each by its largest value: alone here, and by the norm or the activation that makes them.

``torch._scaled_mm`` multiplies them. A linear layer says by its ``form`` (``octavo.interfaces.FormsInput``) that it
wants them so; the result is the same to the last bit whoever rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe, power_of_two

MAX_SIZE = 32768
"""Elements of a token that one program keeps in registers."""


class RoundedTokens(Tensor):
    """float8_e4m3fn [num_tokens, size]; ``scales``, float32 [num_tokens, 1], is what each token was divided by."""

    scales: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @classmethod
    def empty(cls, num_tokens: int, size: int, device: torch.device) -> RoundedTokens:
        """Memory to be written."""
        rounded = torch.empty((num_tokens, size), dtype=torch.float8_e4m3fn, device=device).as_subclass(cls)
        rounded.scales = torch.empty((num_tokens, 1), dtype=torch.float32, device=device)
        return rounded


@dataclass(frozen=True, slots=True)
class TokenRounding:
    """A form of a linear layer's input: rounded by token where a step has more than ``above`` of them, else plain.

    ``reordered``: in the order that :func:`octavo_kernels.hopper_linear.fp8_order` gives the weights.
    """

    above: int
    reordered: bool = False

    def empty(self, num_tokens: int, size: int, device: torch.device) -> RoundedTokens | None:
        """Memory for what a norm or an activation makes; None: it is to stay plain."""
        if num_tokens <= self.above or size > MAX_SIZE:
            return None
        return RoundedTokens.empty(num_tokens, size, device)


@triton.jit
def store_rounded(out_ptr, scale_ptr, x, columns, mask, REORDERED: tl.constexpr):
    """Round one token ``x`` [BLOCK], which is zero where ``mask`` is not set, and store it with its scale."""
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / 448.0, 1.1754944e-38)
    rounded = (x / scale).to(out_ptr.dtype.element_ty)
    if REORDERED:  # [64 inputs, j, input half, t, of the pair], as octavo_kernels.hopper_linear.fp8_order has them
        parts = rounded.reshape(x.shape[0] // 64, 4, 2, 4, 2).permute(0, 3, 1, 4, 2)
        low, high = tl.split(parts)
        rounded = tl.join(high, low).reshape(x.shape[0])
    tl.store(scale_ptr, scale)
    tl.store(out_ptr + columns, rounded, mask=mask)


@triton.jit
def _round_tokens(
    out_ptr,
    scales_ptr,
    x_ptr,
    x_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: one token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    store_rounded(out_ptr + row * SIZE, scales_ptr + row, x, columns, mask, REORDERED)


def round_tokens(x: Tensor, *, reordered: bool = False) -> RoundedTokens:
    """x [num_tokens, size], a row's elements side by side -> the same rounded; ``reordered`` as in TokenRounding."""
    num_tokens, size = x.shape
    out = RoundedTokens.empty(num_tokens, size, x.device)
    if num_tokens == 0:
        return out
    device = describe(x.device)
    _round_tokens[(num_tokens,)](
        out,
        out.scales,
        x,
        x.stride(0),
        SIZE=size,
        BLOCK=power_of_two(size),
        REORDERED=reordered,
        PDL=device.dependent_launch,
        num_warps=8,
        **device.options,
    )
    return out


def round_tokens_reference(x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in plain torch: values float8_e4m3fn [num_tokens, size] and scales float32 [num_tokens, 1].

    ``order`` [64] names the input of each block of 64 that lies at each place.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=1, keepdim=True) / 448.0).clamp(min=torch.finfo(torch.float32).tiny)
    values = (wide / scales).to(torch.float8_e4m3fn)
    if order is not None:
        blocks = values.view(torch.uint8).view(len(values), x.shape[1] // 64, 64)
        values = blocks[..., order].view(values.shape).view(torch.float8_e4m3fn)
    return values, scales
