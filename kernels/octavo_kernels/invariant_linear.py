"""The matrix product of ``--batch-invariant``: each output is added up in the same order however many tokens there are.

Up to 64 tokens run the kernel of :mod:`octavo_kernels.linear`, whose splits of the input depend on the layer alone;
more run the one below, which adds up the same splits in the same order, one after another. In both the weights are the
left side of the matrix unit and the input advances in the same steps, so an output's products meet in one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import missing_device
from octavo_kernels.linear import MAX_TOKENS, FewTokensTiling, SkinnyLinear

BLOCK_M = 128
BLOCK_N = 128
GROUP = 8  # tiles of outputs that are multiplied with one tile of tokens before the next, so that the L2 serves both


@triton.jit(do_not_specialize=["num_tokens"])
def _many_tokens(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_tokens,
    num_rows,
    x_stride,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program: a tile of BLOCK_N outputs of BLOCK_M tokens. A split is SPLIT_K inputs, a multiple of BLOCK_K."""
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tiles_n = tl.cdiv(num_rows, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_m)
    width = tl.minimum(tiles_n - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_m)
    n = (group * GROUP + within % width) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (within // width) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    weights = weight_ptr + tl.minimum(n, num_rows - 1)[:, None].to(tl.int64) * K + k[None, :]
    inputs = x_ptr + tl.minimum(m, num_tokens - 1)[None, :].to(tl.int64) * x_stride + k[:, None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in tl.range(split * SPLIT_K, min((split + 1) * SPLIT_K, K), BLOCK_K, num_stages=STAGES):
            if K % BLOCK_K == 0:
                weight = tl.load(weights + start)
                x = tl.load(inputs + start)
            else:
                weight = tl.load(weights + start, mask=(start + k < K)[None, :], other=0.0)
                x = tl.load(inputs + start, mask=(start + k < K)[:, None], other=0.0)
            part = tl.dot(weight, x, part)
        if NUM_SPLITS > 1:
            total += part
        else:
            total = part
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)[:, None]
    offsets = m[None, :].to(tl.int64) * num_rows + n[:, None]
    mask = (m < num_tokens)[None, :] & (n < num_rows)[:, None]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


class InvariantLinear(SkinnyLinear):
    """The operation ``linear`` where a row's result may not depend on the rows beside it."""

    @classmethod
    def missing(cls, need: Any) -> list[str]:
        reasons = missing_device(need.device, need.dtype)
        if need.in_features % 8:
            reasons.append(
                f"it reads 16 bytes at a time: the input size must be a multiple of 8, not {need.in_features}"
            )
        return reasons

    def apply(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        if x.shape[0] <= MAX_TOKENS:
            return self._apply_few(x)
        return self._apply_many(x)

    def few(self, num_tokens: int) -> FewTokensTiling:
        """The same for any number of tokens: it says in which order sums are taken."""
        return super().few(num_tokens=1)

    def _apply_many(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[0]
        out_features, in_features = self.weight.shape
        out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
        few = self.few(num_tokens)
        steps_per_split = triton.cdiv(triton.cdiv(in_features, few.block_k), few.num_splits)
        _many_tokens[(triton.cdiv(num_tokens, BLOCK_M) * triton.cdiv(out_features, BLOCK_N),)](
            out,
            x,
            self.weight,
            x if self.bias is None else self.bias,
            num_tokens,
            out_features,
            x.stride(0),
            K=in_features,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=min(64, few.block_k),
            GROUP=GROUP,
            NUM_SPLITS=few.num_splits,
            SPLIT_K=steps_per_split * few.block_k,
            BIAS=self.bias is not None,
            STAGES=4,
            PDL=self._device.dependent_launch,
            num_warps=8,
            **self._device.options,
        )
        return out
