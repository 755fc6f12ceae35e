"""Linear layers, and the plain torch product behind them."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.interfaces import AddsOutput, FormsInput, LayerLoader, LinearMethod, LinearPart, LinearSpec
from octavo.operations import LinearNeed


class Linear:
    """A loaded linear layer; how its weights are kept and multiplied is the method's matter."""

    def __init__(self, spec: LinearSpec, method: LinearMethod) -> None:
        self.spec = spec
        self.method = method
        self._onto = method.apply_onto if isinstance(method, AddsOutput) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""
        return self.method.apply(x)

    def onto(self, x: Tensor, residual: Tensor) -> tuple[Tensor | None, Tensor]:
        """x [num_tokens, in_features] -> the output [num_tokens, out_features] and the residual that it is to be added
        to, as a norm's ``add`` takes them; None where it has been added."""
        return self.method.apply(x) if self._onto is None else self._onto(x, residual), residual

    @property
    def form(self) -> Hashable | None:
        """The form in which the method would rather have its input; None: a plain tensor."""
        return self.method.form if isinstance(self.method, FormsInput) else None


class TorchLinear:
    """``F.linear``: the operation ``linear`` on any device."""

    def __init__(self, need: LinearNeed, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def missing(cls, need: LinearNeed) -> list[str]:
        if need.batch_invariant:
            return ["the library behind it adds up in another order for another number of rows"]
        return []

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.bias) if tensor is not None)


def load_part(part: LinearPart, spec: LinearSpec, load: LayerLoader) -> tuple[Tensor, Tensor | None]:
    """One projection's plain weight [rows, columns] and bias [rows] of this rank, in the activations' dtype."""
    dtype = load.placement.dtype
    shape = (part.out_features, spec.in_features)
    weight = load.tensor(f"{part.name}.weight", shape, (part.rows, spec.columns), dtype)
    if not spec.bias:
        return weight, None
    return weight, load.tensor(f"{part.name}.bias", (part.out_features,), (part.rows,), dtype)


def load_plain(spec: LinearSpec, load: LayerLoader) -> LinearMethod:
    """An unquantized layer, its parts joined along the output."""
    loaded = [load_part(part, spec, load) for part in spec.parts]
    weight = loaded[0][0] if len(loaded) == 1 else torch.cat([weight for weight, _ in loaded])
    biases = [bias for _, bias in loaded if bias is not None]
    bias = torch.cat(biases) if biases else None
    return make_linear(weight, bias, load)


def make_linear(weight: Tensor, bias: Tensor | None, load: LayerLoader) -> LinearMethod:
    """The best product for a plain weight [out_features, in_features] that is on the device already."""
    placement = load.placement
    need = LinearNeed(
        placement.device, weight.dtype, weight.shape[1], weight.shape[0], batch_invariant=placement.batch_invariant
    )
    method: LinearMethod = load.kernel("linear", need)(need, weight, bias)
    return method


class JoinedLinear:
    """Parts that could not be fused, their outputs side by side."""

    def __init__(self, parts: list[LinearMethod]) -> None:
        self.parts = parts

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([part.apply(x) for part in self.parts], dim=-1)

    def num_bytes(self) -> int:
        return sum(part.num_bytes() for part in self.parts)
