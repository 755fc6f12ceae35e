"""A checkpoint that cannot be served is refused with the tensor, the file and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugins.quant.conftest import LoadedModel
from tests.plugins.quant.families import FAMILIES, checkpoints
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.parallel import Shard

Damage = Callable[[dict[str, Tensor]], None]
LAYER = "model.layers.1.mlp.down_proj"


def without(suffix: str) -> Damage:
    return lambda tensors: tensors.__delitem__(f"{LAYER}.{suffix}") if f"{LAYER}.{suffix}" in tensors else None


def cut(suffix: str) -> Damage:
    """One row less."""

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{suffix}"] = tensors[f"{LAYER}.{suffix}"][1:].contiguous()

    return damage


def converted(suffix: str, dtype: torch.dtype) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{suffix}"] = tensors[f"{LAYER}.{suffix}"].to(dtype)

    return damage


def filled(suffix: str, value: int) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{suffix}"].fill_(value)

    return damage


INCOMPLETE = r"is missing, although .*model.safetensors holds '{layer}.*fetch it again or quantize"
OTHER_SHAPE = r"model.safetensors has the shape .* needs .*do not belong together"
OTHER_DTYPE = r"model.safetensors has the dtype torch.int64, but the format needs torch.int32; quantize the model again"

CASES: list[tuple[str, str, Damage, str]] = [
    *[("awq", suffix, without(suffix), INCOMPLETE) for suffix in ("qweight", "qzeros", "scales")],
    *[("awq", suffix, cut(suffix), OTHER_SHAPE) for suffix in ("qweight", "qzeros", "scales")],
    ("awq", "qweight", converted("qweight", torch.int64), OTHER_DTYPE),
    *[("gptq", suffix, without(suffix), INCOMPLETE) for suffix in ("qweight", "qzeros", "scales")],
    *[("gptq", suffix, cut(suffix), OTHER_SHAPE) for suffix in ("qweight", "qzeros", "scales", "g_idx")],
    ("gptq", "qzeros", converted("qzeros", torch.int64), OTHER_DTYPE),
    ("gptq", "g_idx", filled("g_idx", 5), r"model.safetensors names groups outside 0 to 4; the file is damaged"),
    ("gptq", "bias", filled("bias", 1), r"is not zero, but this architecture has no bias there"),
    *[
        ("compressed-tensors with zero points", suffix, without(suffix), INCOMPLETE)
        for suffix in ("weight_packed", "weight_scale", "weight_zero_point")
    ],
    *[
        ("compressed-tensors with zero points", suffix, cut(suffix), OTHER_SHAPE)
        for suffix in ("weight_packed", "weight_scale", "weight_zero_point")
    ],
    (
        "compressed-tensors",
        "weight_shape",
        filled("weight_shape", 7),
        r"model.safetensors says \[7, 7\], but .*needs .*do not belong together",
    ),
    *[
        ("compressed-tensors fp8 per channel", suffix, without(suffix), INCOMPLETE)
        for suffix in ("weight", "weight_scale")
    ],
    *[
        ("fp8 per tensor, static", suffix, without(suffix), INCOMPLETE)
        for suffix in ("weight", "weight_scale", "input_scale")
    ],
    *[("fp8 in ragged blocks", suffix, without(suffix), INCOMPLETE) for suffix in ("weight", "weight_scale_inv")],
    *[("fp8 in ragged blocks", suffix, cut(suffix), OTHER_SHAPE) for suffix in ("weight", "weight_scale_inv")],
    ("fp8 per channel", "weight_scale", cut("weight_scale"), OTHER_SHAPE),
]


@pytest.mark.parametrize(("family", "suffix", "damage", "message"), CASES, ids=lambda value: str(value)[:40])
def test_damage_is_named(tmp_path: Path, family: str, suffix: str, damage: Damage, message: str) -> None:
    quantized, _ = checkpoints(tmp_path, "llama", FAMILIES[family])
    file = quantized / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"'{LAYER}.{suffix}' .*{message.format(layer=LAYER)}"):
        LoadedModel(quantized)


@pytest.mark.parametrize("family", ["awq", "gptq", "compressed-tensors", "fp8 per tensor"])
def test_a_truncated_file_is_named(tmp_path: Path, family: str) -> None:
    quantized, _ = checkpoints(tmp_path, "llama", FAMILIES[family], num_files=2)
    file = quantized / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model-00002.* is not a complete safetensors file.*fetch it again"):
        LoadedModel(quantized)


@pytest.mark.parametrize("family", ["awq", "gptq", "compressed-tensors", "fp8 per tensor"])
def test_a_missing_file_is_named(tmp_path: Path, family: str) -> None:
    quantized, _ = checkpoints(tmp_path, "llama", FAMILIES[family], num_files=2)
    (quantized / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names model-00002-of-00002.safetensors, which is not there"):
        LoadedModel(quantized)


@pytest.mark.parametrize("family", ["gptq with act-order", "compressed-tensors with act-order"])
def test_act_order_on_a_sharded_row_is_refused(tmp_path: Path, family: str) -> None:
    quantized, _ = checkpoints(tmp_path, "llama", FAMILIES[family])
    with pytest.raises(
        CheckpointError, match=r"g_idx' in .*model.safetensors orders inputs .* --tensor-parallel-size 1"
    ):
        LoadedModel(quantized, shard=Shard(0, 2))
