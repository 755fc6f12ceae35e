"""The named operations that kernels implement, and how one is chosen.

Each operation has a plain torch implementation here in the core, which runs anywhere and is the oracle of the others.
A kernel is a class with a class method ``missing(need)`` and an initializer that takes ``need``; the instance is called
as its operation says:

================  =======================  ================================================================
operation         need                     call
================  =======================  ================================================================
``rms_norm``      :class:`NormNeed`        ``(x, weight, eps) -> y``; ``.add(x, residual, weight, eps) -> (y, new
                                           residual)`` with new residual = x + residual
``silu_and_mul``  :class:`ActivationNeed`  ``(x [num_tokens, 2 * size]) -> [num_tokens, size]``
``linear``        :class:`LinearNeed`      made with ``(need, weight [out, in], bias or None)``: a
                                           :class:`~octavo.interfaces.LinearMethod`
``sample``        :class:`SampleNeed`      ``(logits, SamplingTensors) -> token ids``; see :mod:`octavo.sampling`
``logprobs``      :class:`SampleNeed`      ``(logits [num_rows, vocab_size], chosen [num_rows], num_top) -> (logprobs
                                           [num_rows], ranks [num_rows], ids [num_rows, num_top], logprobs of those)``
================  =======================  ================================================================

Plugins may name further operations of their own (a quantization and the kernels that run it); the same choice applies.

What a norm or an activation returns may go into one linear layer only, and that layer may be one that first rounds its
input or brings it into another order (:class:`octavo.interfaces.FormsInput`). The need then has its ``form``: a kernel
that knows this form may return its result in it, in the same launch; any other returns a plain tensor as ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.errors import ConfigError
from octavo.hooks import KernelProvider, Provider


@dataclass(frozen=True, slots=True)
class NormNeed:
    """A norm over the last axis of ``size`` elements; ``form`` is what its only reader would rather have."""

    device: torch.device
    dtype: torch.dtype
    size: int
    form: Hashable | None = None


@dataclass(frozen=True, slots=True)
class ActivationNeed:
    """A gated activation over ``size`` elements; ``form`` is what its only reader would rather have."""

    device: torch.device
    dtype: torch.dtype
    size: int
    form: Hashable | None = None


@dataclass(frozen=True, slots=True)
class LinearNeed:
    """An unquantized matrix product."""

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: int
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True)
class SampleNeed:
    """Choosing tokens from logits over ``vocab_size``, and saying how likely they were."""

    device: torch.device
    vocab_size: int


def choose(
    what: str,
    providers: Iterable[Provider],
    need: Any,
    insisted: str | None = None,
    passed_over: dict[str, None] | None = None,
) -> tuple[str, Any]:
    """The provider of highest priority that lacks nothing for ``need``: its name and class.

    ``insisted`` names the only one that will do. The same reasons that pass a provider over make up the error; they are
    also added to ``passed_over``.

    Raises:
        ConfigError: none can serve; prints every candidate with what it is missing.
    """
    candidates = sorted(providers, key=lambda provider: -provider.priority)
    if insisted is not None:
        known = ", ".join(provider.name for provider in candidates)
        candidates = [provider for provider in candidates if provider.name == insisted]
        if not candidates:
            raise ConfigError(f"{what} '{insisted}' is not provided by any selected plugin; there are: {known}")
    reasons: list[str] = []
    for provider in candidates:
        lacking = provider.lacking()
        if not lacking:
            implementation = provider.resolve()
            lacking = implementation.missing(need)
            if not lacking:
                if passed_over is not None:
                    passed_over.update(dict.fromkeys(reasons))
                return provider.name, implementation
        reasons.append(f"{provider.name}: {'; '.join(lacking)}")
    raise ConfigError(f"no {what} can serve {need}:\n  " + "\n  ".join(reasons or ["none is provided"]))


class Operations:
    """Chooses an implementation once per operation and need, and remembers what was chosen for the log."""

    def __init__(
        self,
        builtin: Iterable[KernelProvider],
        plugins: Mapping[str, KernelProvider],
        insisted: Mapping[str, str] | None = None,
    ) -> None:
        self._providers: dict[str, list[KernelProvider]] = {}
        for provider in [*builtin, *plugins.values()]:
            self._providers.setdefault(provider.operation, []).append(provider)
        self._insisted = dict(insisted or {})
        unknown = sorted(set(self._insisted) - set(self._providers))
        if unknown:
            raise ConfigError(f"no operation is called '{unknown[0]}'; there are: {', '.join(sorted(self._providers))}")
        self._chosen: dict[tuple[str, Any], Any] = {}
        self.log: dict[str, set[str]] = {}  # operation -> names of the implementations in use
        self.passed_over: dict[str, dict[str, None]] = {}  # operation -> why faster ones are not, in order

    def choose(self, operation: str, need: Any) -> Any:
        """The class that implements ``operation`` for ``need``."""
        key = (operation, need)
        if key not in self._chosen:
            providers = self._providers.get(operation, [])
            reasons = self.passed_over.setdefault(operation, {})
            name, implementation = choose(
                f"kernel for '{operation}'", providers, need, self._insisted.get(operation), reasons
            )
            self._chosen[key] = implementation
            self.log.setdefault(operation, set()).add(name)
        return self._chosen[key]
