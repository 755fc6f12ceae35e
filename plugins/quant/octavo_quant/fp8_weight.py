"""FP8 weights: one form for scales per tensor, per output and per block, and the rules for their activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from octavo.interfaces import LayerLoader, LinearMethod, LinearPart, LinearSpec
from octavo_quant.parts import PartTensors

OPERATION = "linear_fp8"
"""Made with ``(Fp8Need, Fp8Weight, bias [out_features] or None)``: a LinearMethod."""

FP8 = torch.float8_e4m3fn
LARGEST = 448.0

Activation = Literal["none", "tensor", "token", "group"]
"""How the input is rounded to FP8: not at all, by a stored scale, or by its largest value per token or per group."""


@dataclass(frozen=True, slots=True)
class Fp8Need:
    """A product with an :class:`Fp8Weight`; ``dtype`` is that of the activations."""

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: int
    activation: Activation
    row_block: int
    column_block: int


@dataclass(frozen=True, slots=True)
class Rounding:
    """How inputs lose precision on their way into an FP8 product.

    Attributes:
        activation: the rule.
        group_size: features that share a scale, for the rule ``group``.
        scale: float32 scalar, for the rule ``tensor``.
    """

    activation: Activation
    group_size: int
    scale: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] rounded to FP8 and scaled back: float32, the same shape."""
        x = x.float()
        if self.activation == "none":
            return x
        num_in = x.shape[1]
        if self.activation == "tensor":
            assert self.scale is not None
            scale = self.scale
        elif self.activation == "token":
            scale = x.abs().amax(dim=1, keepdim=True) / LARGEST
        else:
            size = self.group_size
            padded = torch.nn.functional.pad(x.abs(), (0, -num_in % size)).reshape(len(x), -(-num_in // size), size)
            scale = (padded.amax(dim=2) / LARGEST).repeat_interleave(size, dim=1)[:, :num_in]
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return (x / scale).clamp(-LARGEST, LARGEST).to(FP8).float() * scale


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """``W[n, k] = values[n, k] * scales[n // row_block, k // column_block]``; the last blocks may be ragged.

    Attributes:
        values: float8_e4m3fn [out_features, in_features].
        scales: float32 [ceil(out_features / row_block), ceil(in_features / column_block)].
        activation: how the input is rounded; per group: of ``column_block`` features.
        input_scale: float32 scalar, for a stored scale.
    """

    values: Tensor
    scales: Tensor
    row_block: int
    column_block: int
    activation: Activation
    input_scale: Tensor | None = None

    @classmethod
    def online(cls, weight: Tensor) -> Fp8Weight:
        """Round a plain weight [out_features, in_features] with one scale per output."""
        wide = weight.float()
        scales = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        values = (wide / scales).clamp(-LARGEST, LARGEST).to(FP8)
        return cls(values, scales, 1, weight.shape[1], "token")

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def rounding(self) -> Rounding:
        """What a product with this weight does to its input."""
        return Rounding(self.activation, self.column_block, self.input_scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out_features, in_features]."""
        rows = self.scales.repeat_interleave(self.row_block, dim=0)[: self.out_features]
        scales = rows.repeat_interleave(self.column_block, dim=1)[:, : self.in_features]
        return self.values.to(dtype) * scales.to(dtype)

    def cut(self, rows: slice, columns: slice) -> Fp8Weight:
        """The part of a scaled matrix that one rank holds; scales are repeated where a cut runs through a block.

        ``values`` are those of the part already; only ``scales`` are of the whole.
        """
        row_block, column_block, scales = self.row_block, self.column_block, self.scales
        if rows.start % row_block:
            row_block = math.gcd(row_block, rows.start)
            scales = scales.repeat_interleave(self.row_block // row_block, dim=0)
        if columns.start % column_block:
            column_block = math.gcd(column_block, columns.start)
            scales = scales.repeat_interleave(self.column_block // column_block, dim=1)
        scales = scales[
            rows.start // row_block : -(-rows.stop // row_block),
            columns.start // column_block : -(-columns.stop // column_block),
        ].contiguous()
        column_block = min(column_block, columns.stop - columns.start)
        return replace(self, scales=scales, row_block=row_block, column_block=column_block)

    def by_row(self) -> Fp8Weight:
        """The same with scales for each row."""
        scales = self.scales.repeat_interleave(self.row_block, dim=0)[: self.out_features]
        return replace(self, scales=scales, row_block=1)

    def joins(self, other: Fp8Weight) -> bool:
        """Whether the two can lie side by side in one product: inputs scaled and rounded alike."""
        if (self.activation, self.column_block) != (other.activation, other.column_block):
            return False
        if self.input_scale is None or other.input_scale is None:
            return self.input_scale is other.input_scale
        return torch.equal(self.input_scale, other.input_scale)

    @staticmethod
    def join(weights: Sequence[Fp8Weight]) -> Fp8Weight:
        """Weights that join, their outputs side by side; each keeps its own scales."""
        block = weights[0].row_block
        aligned = all(weight.row_block == block and weight.out_features % block == 0 for weight in weights[:-1])
        if not aligned or weights[-1].row_block != block:
            weights = [weight.by_row() for weight in weights]
        values = torch.cat([weight.values.view(torch.uint8) for weight in weights]).view(FP8)
        return replace(
            weights[0],
            values=values,
            scales=torch.cat([weight.scales for weight in weights]),
            row_block=weights[0].row_block,
        )

    def method(self, bias: Tensor | None, load: LayerLoader) -> LinearMethod:
        """The best product with this weight."""
        need = Fp8Need(
            load.placement.device,
            load.placement.dtype,
            self.in_features,
            self.out_features,
            self.activation,
            self.row_block,
            self.column_block,
        )
        made: LinearMethod = load.kernel(OPERATION, need)(need, self, bias)
        return made

    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.input_scale is None else self.input_scale.nbytes)


def read_fp8(
    tensors: PartTensors,
    part: LinearPart,
    spec: LinearSpec,
    scale: str,
    block: tuple[int, int] | None,
    activation: Activation,
) -> Fp8Weight:
    """One projection; ``scale`` is the name of its scales and ``block`` their reach, None: per tensor or per output.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype is wrong.
    """
    num_out, num_in = part.out_features, spec.in_features
    values = tensors.read("weight", (num_out, num_in), (part.rows, spec.columns), beside=scale, dtype=FP8)
    row_block, column_block = block or (1, num_in)
    shape: tuple[int, ...] = (-(-num_out // row_block), -(-num_in // column_block))
    if block is None and tensors.has(scale):
        stored = tensors.shape(scale, shape)
        if stored in ((), (1,), (1, 1)):  # one number for the matrix
            row_block = num_out
        shape = stored if row_block > 1 or stored == (num_out,) else shape
    scales = tensors.read(scale, shape, beside="weight").float().reshape(-1, -(-num_in // column_block))
    input_scale = None
    if activation == "tensor":
        input_scale = tensors.read("input_scale", (), beside="weight").float()
    whole = Fp8Weight(values, scales, row_block, column_block, activation, input_scale)
    weight = whole.cut(part.rows, spec.columns)
    # one number for a matrix cannot lie beside another's: each row gets its own
    return weight.by_row() if block is None else weight
