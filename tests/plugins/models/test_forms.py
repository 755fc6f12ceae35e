"""A linear layer that wants its input in a form of its own, and the norm or the activation before it that gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plugins.models.conftest import MAX_MODEL_LEN, PLACEMENT, PagedModel, load, operations
from torch import Tensor

from octavo.hooks import KernelProvider
from octavo.interfaces import LayerLoader, LinearMethod, LinearSpec, WeightSource
from octavo.layers.activation import TorchSiluAndMul
from octavo.layers.builder import Builder
from octavo.layers.linear import load_plain
from octavo.layers.norm import TorchRMSNorm
from octavo.loader import CheckpointLoader, HuggingFaceFolder
from octavo.operations import ActivationNeed, NormNeed
from octavo_models.llama import LlamaForCausalLM


class Halved(Tensor):
    """Half of the plain tensor, which loses nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class HalvedLinear:
    """Would rather have its input halved; remembers what it was given."""

    form = "halved"

    def __init__(self, plain: LinearMethod) -> None:
        self._plain = plain
        self.given: set[type[Tensor]] = set()

    def apply(self, x: Tensor) -> Tensor:
        self.given.add(type(x))
        return self._plain.apply(2 * x if isinstance(x, Halved) else x)

    def num_bytes(self) -> int:
        return self._plain.num_bytes()


class HalvedQuantization:
    """All layers but the head."""

    name = "halved"

    def __init__(self) -> None:
        self.layers: dict[str, HalvedLinear] = {}

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any], weights: WeightSource) -> HalvedQuantization:
        return cls()

    def linear(self, spec: LinearSpec, load: LayerLoader) -> LinearMethod | None:
        if spec.name == "lm_head":
            return None
        self.layers[spec.name] = HalvedLinear(load_plain(spec, load))
        return self.layers[spec.name]


class HalvingNorm(TorchRMSNorm):
    def __init__(self, need: NormNeed) -> None:
        super().__init__(need)
        self._halves = need.form == "halved"

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = super().__call__(x, weight, eps)
        return (y / 2).as_subclass(Halved) if self._halves else y


class HalvingActivation(TorchSiluAndMul):
    def __init__(self, need: ActivationNeed) -> None:
        super().__init__(need)
        self._halves = need.form == "halved"

    def __call__(self, gate_up: Tensor) -> Tensor:
        y = super().__call__(gate_up)
        return (y / 2).as_subclass(Halved) if self._halves else y


HALVING = {
    "rms_norm/halving": KernelProvider("halving", HalvingNorm, 10, operation="rms_norm"),
    "silu_and_mul/halving": KernelProvider("halving", HalvingActivation, 10, operation="silu_and_mul"),
}


@pytest.mark.parametrize("kernels", [{}, HALVING], ids=["kernels that do not know the form", "kernels that do"])
def test_a_model_computes_the_same_whoever_brings_its_inputs_into_their_form(
    save: Callable[..., Any], kernels: dict[str, KernelProvider]
) -> None:
    path: Path = save("Llama")[0]
    plain, _, plain_build = load(path)
    folder, quantization = HuggingFaceFolder(path), HalvedQuantization()
    loader = CheckpointLoader(folder.weights(), PLACEMENT, operations(kernels))
    build = Builder(loader, max_model_len=MAX_MODEL_LEN, quantization=quantization)
    model = LlamaForCausalLM(folder.config(), build)

    tokens = {0: [5, 6, 7], 1: [8]}
    expected = PagedModel(plain, plain_build).step(tokens)
    logits = PagedModel(model, build).step(tokens)
    for row in tokens:
        torch.testing.assert_close(logits[row], expected[row])

    for name, layer in quantization.layers.items():
        # what comes before the output projection is attention, which knows no forms
        halved = bool(kernels) and not name.endswith("o_proj")
        assert layer.given == {Halved if halved else Tensor}, name
