"""A GGUF file as a checkpoint: configuration, tokenizer and weights in Hugging Face's terms."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import Checkpoint, TensorInfo, WeightSource
from octavo.loader import missing_tensor
from octavo_gguf.dequantize import dequantize
from octavo_gguf.metadata import Metadata
from octavo_gguf.reader import MAGIC, GGUFFile, GGUFTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture of GGUF is called elsewhere; ``permuted`` ones keep rotary pairs side by side."""

    name: str
    model_type: str
    permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
}
MISTRAL = Architecture("MistralForCausalLM", "mistral", permuted=True)  # "llama" with a sliding window

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # llama3's rope scaling, worked out per frequency

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # all else becomes float32


def hugging_face_name(name: str) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for a name that is not known."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if layer is None or layer[2] not in LAYER_NAMES:
        return None
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}"


def unpermuted_rows(num_rows: int, num_heads: int) -> NDArray[np.intp]:
    """Which row of the file is each row of the Hugging Face matrix, for the query and key projections of ``llama``.

    The file keeps the two halves of a rotated pair side by side; Hugging Face keeps them half a head apart.
    """
    rows = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


class GGUFWeights:
    """The tensors of a GGUF file, dequantized when they are read; see :class:`octavo.interfaces.WeightSource`."""

    def __init__(self, file: GGUFFile, heads: Mapping[str, int]) -> None:
        """``heads``: for the kinds of tensors whose rows are permuted ("attn_q", "attn_k"), how many heads they have.

        Raises:
            CheckpointError: a tensor's name is not known.
        """
        self._file = file
        self._heads = heads
        self._tensors: dict[str, GGUFTensor] = {}
        for name, tensor in file.tensors.items():
            if name == ROPE_FACTORS:
                continue
            translated = hugging_face_name(name)
            if translated is None:
                raise CheckpointError(f"tensor '{name}' in {file.path} belongs to no architecture that is known here")
            self._tensors[translated] = tensor

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensor(name)
        return TensorInfo(tensor.shape, DTYPES.get(tensor.type.name, torch.float32), str(self._file.path))

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        tensor = self._tensor(name)
        order = self._row_order(tensor)
        if len(tensor.shape) == 1:
            values = to_torch(self._file.rows(tensor), tensor)
            values = values if order is None else values[torch.from_numpy(order)]
            return values[index] if index else values
        rows = self._file.rows(tensor)
        if index:  # rows are cut and reordered before they are dequantized, columns after
            rows, order = rows[index[0]] if order is None else rows, None if order is None else order[index[0]]
        if order is not None:
            rows = rows[order]
        values = to_torch(rows, tensor).reshape(len(rows), *tensor.shape[1:])
        return values[(slice(None), *index[1:])] if len(index) > 1 else values

    def _row_order(self, tensor: GGUFTensor) -> NDArray[np.intp] | None:
        kind = tensor.name.split(".")[-2]
        return unpermuted_rows(tensor.shape[0], self._heads[kind]) if kind in self._heads else None

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._tensors:
            raise missing_tensor(name, self._tensors.keys(), str(self._file.path))
        return self._tensors[name]


def to_torch(rows: NDArray[np.uint8], tensor: GGUFTensor) -> Tensor:
    """Rows of the file's bytes [num_rows, row_bytes] as numbers [num_rows, row_size] (a vector: [row_size])."""
    kind = tensor.type
    shape = (len(rows), tensor.shape[-1]) if len(tensor.shape) > 1 else tensor.shape
    if kind.name in DTYPES:
        return torch.from_numpy(rows.reshape(-1).copy()).view(DTYPES[kind.name]).reshape(shape)
    blocks = np.ascontiguousarray(rows).reshape(-1, kind.block_bytes)
    return torch.from_numpy(dequantize(blocks, kind.name).reshape(shape))


class GGUFCheckpoint:
    """See :class:`octavo.interfaces.Checkpoint`.

    Raises:
        CheckpointError: the file is broken, of an unknown architecture, or one of several parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._metadata = Metadata(path, self._file.metadata)
        parts = self._metadata.integer("split.count") or 1
        if parts > 1:
            raise CheckpointError(f"{path} is one of {parts} parts; join them with 'llama-gguf-split --merge' first")
        self._name = str(self._metadata.text("general.architecture"))
        if self._name not in ARCHITECTURES:
            raise CheckpointError(
                f"{path} holds the architecture '{self._name}'; known in GGUF files: {', '.join(ARCHITECTURES)}"
            )
        self._window = self._metadata.integer(self._key("attention.sliding_window"))
        self._architecture = MISTRAL if self._name == "llama" and self._window else ARCHITECTURES[self._name]

    def config(self) -> dict[str, Any]:
        hidden_size, num_heads = self._size("embedding_length"), self._size("attention.head_count")
        rotary = self._metadata.integer(self._key("rope.dimension_count"))
        head_dim = self._metadata.integer(self._key("attention.key_length")) or rotary or hidden_size // num_heads
        if rotary is not None and rotary != head_dim:
            raise CheckpointError(
                f"{self.path} rotates {rotary} of {head_dim} dimensions of a head "
                f"({self._key('rope.dimension_count')}); only whole heads are supported"
            )
        theta = float(self._metadata.number(self._key("rope.freq_base")) or 10000.0)
        scaling = self._rope_scaling(theta, head_dim)
        tensors = self._file.tensors
        return {
            "architectures": [self._architecture.name],
            "model_type": self._architecture.model_type,
            "vocab_size": self._require_tensor("token_embd.weight").shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._num_kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": _shortest(self._metadata.require_number(self._key("attention.layer_norm_rms_epsilon"))),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "sliding_window": self._window or None,
            "use_sliding_window": bool(self._window),
            "bos_token_id": self._token("bos"),
            "eos_token_id": self._token("eos"),
            "pad_token_id": self._token("padding"),
            "dtype": self._stored_dtype(),
        }

    def generation_config(self) -> dict[str, Any]:
        ends = [token for role in ("eos", "eot") if (token := self._token(role)) is not None]
        return {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from octavo_gguf.tokenizer import build_tokenizer

        return build_tokenizer(self._metadata)

    def weights(self) -> WeightSource:
        heads = {"attn_q": self._size("attention.head_count"), "attn_k": self._num_kv_heads}
        return GGUFWeights(self._file, heads if self._architecture.permuted else {})

    @property
    def _num_kv_heads(self) -> int:
        return self._metadata.integer(self._key("attention.head_count_kv")) or self._size("attention.head_count")

    def _key(self, name: str) -> str:
        return f"{self._name}.{name}"

    def _size(self, name: str) -> int:
        return self._metadata.size(self._key(name))

    def _require_tensor(self, name: str) -> GGUFTensor:
        if name not in self._file.tensors:
            raise missing_tensor(name, self._file.tensors.keys(), str(self.path))
        return self._file.tensors[name]

    def _token(self, role: str) -> int | None:
        return self._metadata.integer(f"tokenizer.ggml.{role}_token_id")

    def _stored_dtype(self) -> str:
        """The dtype to compute in where the device leaves the choice: the matrices' own; quantized ones: bfloat16."""
        kinds = {tensor.type.name for tensor in self._file.tensors.values() if len(tensor.shape) > 1}
        return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        if ROPE_FACTORS in self._file.tensors:
            return self._llama3_scaling(theta, head_dim)
        kind = self._metadata.text(self._key("rope.scaling.type"))
        if kind in (None, "none"):
            return None
        factor = float(self._metadata.require_number(self._key("rope.scaling.factor")))
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
            original = self._metadata.integer(self._key("rope.scaling.original_context_length"))
            if original is not None:
                scaling["original_max_position_embeddings"] = original
            return scaling
        raise CheckpointError(
            f"{self.path} has '{kind}' under '{self._key('rope.scaling.type')}'; known: none, linear, yarn, "
            f"llama3 factors"
        )

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The settings whose factors the file holds: all published models share all but the factor."""
        tensor = self._file.tensors[ROPE_FACTORS]
        stored = to_torch(self._file.rows(tensor), tensor).numpy()
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(stored.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if stored.shape != (head_dim // 2,) or not np.allclose(stored, llama3_factors(theta, head_dim, scaling), 1e-3):
            raise CheckpointError(
                f"tensor '{ROPE_FACTORS}' in {self.path} does not hold the rope factors of a Llama 3 model"
            )
        return scaling


def llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """By how much each frequency is slowed down, [head_dim / 2]; the rule of Llama 3.1's rope scaling."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelength
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float64] = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
    return factors


def _shortest(value: float) -> float:
    """The decimal number that was meant by a float32: 9.999999747e-06 -> 1e-05."""
    return float(f"{value:.6g}")


class GGUFFormat:
    """See :class:`octavo.interfaces.WeightFormat`."""

    name: ClassVar[str] = "gguf"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        return GGUFCheckpoint(path)
