"""The attention layer: from the fused projection to attention's output, through the engine's backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.batch import ForwardBatch
from octavo.interfaces import AttentionBackend, AttentionSpec, HiddenStateRecorder
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What layers need of the step: passed explicitly, so that a draft model can run beside the target."""

    batch: ForwardBatch
    backend: AttentionBackend
    plan: Any
    kv: Sequence[Tensor]  # one cache per attention layer
    recorder: HiddenStateRecorder | None = None
    kept: Tensor | None = None  # [num_kept] int: the tokens whose hidden states are read in the end; None: all

    def keep(self, x: Tensor) -> Tensor:
        """x [num_tokens, size] -> the part of it that is still of use after the last attention, [num_kept, size].

        Of a prompt only the last token decides anything, so a model that drops the others there saves most of a
        layer. Whatever travels beside ``x`` is to be cut in the same way.
        """
        return x if self.kept is None else x[self.kept]

    def record(self, layer: int, hidden: Tensor | None, residual: Tensor | None = None) -> None:
        """A model that others may build on calls this with what goes into each layer, in two parts as it travels, and
        at last, as the layer after the last one, with what it returns: [num_tokens, hidden_size]."""
        if self.recorder is not None and layer in self.recorder.layers:
            parts = [part for part in (hidden, residual) if part is not None]
            # what is there in one part becomes the residual, which changes in place
            self.recorder.record(layer, parts[0] + parts[1] if len(parts) == 2 else parts[0].clone(), self.batch)


class Attention:
    """Normalizes (where the model does), rotates, writes keys and values, attends."""

    def __init__(
        self,
        spec: AttentionSpec,
        rotary: RotaryEmbedding | None,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        self.spec = spec
        self.rotary = rotary
        self.query_norm = query_norm
        self.key_norm = key_norm

    def __call__(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] -> [num_tokens, num_heads * head_dim]."""
        return context.backend.forward(self, qkv, context.kv[self.spec.layer], context.batch, context.plan)

    def split_norm_rotate(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim]."""
        spec = self.spec
        heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
        query, key, value = heads.tensor_split((spec.num_heads, spec.num_heads + spec.num_kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            factors = self.rotary.factors(positions, query.dtype)
            query, key = self.rotary.rotate(query, *factors), self.rotary.rotate(key, *factors)
        return query, key, value
