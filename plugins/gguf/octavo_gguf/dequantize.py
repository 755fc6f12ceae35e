"""From ggml's block types to floats. Layouts: ggml's ggml-common.h; checked against ``gguf.quants``.

Every function takes ``blocks`` [num_blocks, block_bytes] uint8 and returns float32 [num_blocks, block_size].
A block of 32 keeps element ``i`` in the low half of byte ``i`` and element ``i + 16`` in the high half.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]
Floats = NDArray[np.float32]

_HALVES = np.array([0, 4], np.uint8)
_QUARTERS = np.array([0, 2, 4, 6], np.uint8)
_BITS = np.arange(8, dtype=np.uint8)


def dequantize(blocks: Blocks, kind: str) -> Floats:
    """The values of ``blocks`` of the type ``kind``, a key of :data:`DEQUANTIZERS`."""
    return DEQUANTIZERS[kind](blocks)


def _half(blocks: Blocks, start: int) -> Floats:
    """The float16 at byte ``start`` of each block, [num_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Blocks) -> Floats:
    """[num_blocks, 16] -> [num_blocks, 32]."""
    values = np.empty((len(packed), 32), np.float32)
    values[:, :16] = packed & 0x0F
    values[:, 16:] = packed >> 4
    return values


def _fifth_bits(blocks: Blocks, start: int) -> Floats:
    """16 or 0 for each of the 32 bits of the four bytes at ``start``, lowest first."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return (bits << 4).astype(np.float32)


def q4_0(blocks: Blocks) -> Floats:
    values = _nibbles(blocks[:, 2:])
    values -= 8
    values *= _half(blocks, 0)
    return values


def q4_1(blocks: Blocks) -> Floats:
    values = _nibbles(blocks[:, 4:])
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


def q5_0(blocks: Blocks) -> Floats:
    values = _nibbles(blocks[:, 6:])
    values += _fifth_bits(blocks, 2)
    values -= 16
    values *= _half(blocks, 0)
    return values


def q5_1(blocks: Blocks) -> Floats:
    values = _nibbles(blocks[:, 8:])
    values += _fifth_bits(blocks, 4)
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


def q8_0(blocks: Blocks) -> Floats:
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _half(blocks, 0)
    return values


def _scales_and_minima(packed: Blocks) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and minima from twelve bytes: [num_blocks, 12] -> two [num_blocks, 8]."""
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minima = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_quant(blocks: Blocks, values: Floats) -> Floats:
    """Scale and shift ``values`` [num_blocks, 8, 32] by the header that Q4_K and Q5_K share."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    values *= (_half(blocks, 0) * scales)[:, :, None]
    values -= (_half(blocks, 2) * minima)[:, :, None]
    return values.reshape(len(blocks), 256)


def _k_nibbles(packed: Blocks) -> Blocks:
    """[num_blocks, 128] -> [num_blocks, 8, 32]: 32 low halves, then the 32 high halves of the same bytes."""
    halves: Blocks = (packed.reshape(-1, 4, 1, 32) >> _HALVES[:, None]) & np.uint8(0x0F)
    return halves.reshape(-1, 8, 32)


def q4_k(blocks: Blocks) -> Floats:
    return _k_quant(blocks, _k_nibbles(blocks[:, 16:]).astype(np.float32))


def q5_k(blocks: Blocks) -> Floats:
    fifth = (blocks[:, None, 16:48] >> _BITS[:, None]) & 1
    return _k_quant(blocks, (_k_nibbles(blocks[:, 48:]) | (fifth << 4)).astype(np.float32))


def q6_k(blocks: Blocks) -> Floats:
    low = (blocks[:, :128].reshape(-1, 2, 1, 64) >> _HALVES[:, None]) & 0x0F
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _QUARTERS[:, None]) & 0x03
    values = (low.reshape(-1, 16, 16) | (high.reshape(-1, 16, 16) << 4)).astype(np.float32)
    values -= 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    values *= (_half(blocks, 208) * scales)[:, :, None]
    return values.reshape(len(blocks), 256)


DEQUANTIZERS: dict[str, Callable[[Blocks], Floats]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
