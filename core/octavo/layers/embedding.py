"""Token embeddings and the output head that may share their weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Embedding:
    """A loaded table [vocab_size, size]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [num_tokens] int -> [num_tokens, size]."""
        return F.embedding(tokens, self.weight)
