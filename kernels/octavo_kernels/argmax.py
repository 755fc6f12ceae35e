"""The most likely token of each row without a sort: parts of a row side by side, then their winners."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import describe, power_of_two

BLOCK = 4096


@triton.jit
def _argmax_part(values_ptr, ids_ptr, logits_ptr, stride, vocab_size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row, part): the maximum of BLOCK logits and where it is; of equals the first."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(logits_ptr + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    out = row * tl.num_programs(1) + part
    tl.store(values_ptr + out, tl.max(logits, axis=0))
    tl.store(ids_ptr + out, part * BLOCK + tl.argmax(logits, axis=0))


@triton.jit
def _argmax_join(out_ptr, values_ptr, ids_ptr, num_parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program: one row. Parts are in the order of the vocabulary, so the first of equals is again the right one."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(values_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    best = tl.argmax(values, axis=0)
    tl.store(out_ptr + row, tl.load(ids_ptr + row * num_parts + best).to(tl.int64))


def argmax(logits: Tensor) -> Tensor:
    """logits [num_rows, vocab_size] in any floating dtype -> ids [num_rows] int64; of equal logits the first."""
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_parts = triton.cdiv(vocab_size, BLOCK)
    values = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    device = describe(logits.device)
    pdl, options = device.dependent_launch, device.options
    _argmax_part[(num_rows, num_parts)](
        values, ids, logits, logits.stride(0), vocab_size, BLOCK=BLOCK, PDL=pdl, num_warps=8, **options
    )
    _argmax_join[(num_rows,)](
        out, values, ids, num_parts, BLOCK=max(16, power_of_two(num_parts)), PDL=pdl, num_warps=1, **options
    )
    return out


def argmax_reference(logits: Tensor) -> Tensor:
    """The same with torch."""
    return logits.float().argmax(dim=-1)
