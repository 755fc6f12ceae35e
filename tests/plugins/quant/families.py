"""Whole models packed by the formats' definitions, and plain ones of the matrices that they stand for.

The checkpoints are those that people have beside the real ones of ``test_fixtures``: other shapes and architectures,
biases, tied embeddings, one KV head, several files, old names of settings, every way to name what is not quantized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tests.plugins.quant.packers import Part, awq_part, ct_part, fp8_part, gptq_part, in_order
from torch import Tensor

HIDDEN, INTERMEDIATE, HEADS, VOCAB = 96, 160, 4, 104
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
SETTINGS = "config.json"
KINDS = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}


def plain_model(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tiny random model: its config.json and its tensors in float32."""
    torch.manual_seed(0)
    make, extra = KINDS[kind]
    config = make(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=0.2,
        **extra,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.uniform_(-0.5, 0.5)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    architecture = {"architectures": [type(model).__name__]}
    return {**config.to_dict(), **architecture}, tensors


def linears(tensors: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    """The projections of all layers, and the head if it has a matrix: name, inputs, outputs."""
    names = [name.removesuffix(".weight") for name, t in tensors.items() if t.ndim == 2 and "embed" not in name]
    return [(name, tensors[f"{name}.weight"].shape[1], tensors[f"{name}.weight"].shape[0]) for name in names]


@dataclass
class Family:
    """How the projections of a checkpoint are packed; ``pack`` returns None for one that is left plain."""

    settings: dict[str, Any]
    pack: Callable[[str, int, int, int], Part | None]  # name, seed, inputs, outputs
    file: str = SETTINGS  # that holds the settings
    weights: str = "model.safetensors"
    num_products: dict[str, int] = field(default_factory=dict)  # of a fused layer, where it is not one


def is_head(name: str) -> bool:
    return name == "lm_head"


def awq(group_size: int = 32, skip: str = "lm_head", **settings: Any) -> Family:
    made = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}

    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part | None:
        if is_head(name) or skip in name:
            return None
        return awq_part(name, seed, num_in, num_out, num_in if group_size == -1 else group_size)

    return Family({**made, **settings}, pack)


def gptq(
    bits: int = 4,
    group_size: int = 32,
    version: int = 1,
    groups: Callable[[str, int, int], Tensor] | None = None,
    head: bool = False,
    **settings: Any,
) -> Family:
    """``groups`` gives the group of each input from name, number of inputs and group size."""
    made = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": False,
        "desc_act": groups is not None,
    }

    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part | None:
        if is_head(name) and not head:
            return None
        index = groups(name, num_in, group_size) if groups else in_order(num_in, group_size)
        return gptq_part(name, seed, num_in, num_out, index, bits, version)

    return Family({**made, "lm_head": head, **settings}, pack)


def permuted(per: str) -> Callable[[str, int, int], Tensor]:
    """Act-order: one order for all projections of a block (``block``) or one for each (``projection``)."""

    def groups(name: str, num_in: int, group_size: int) -> Tensor:
        seed = name if per == "projection" else name.rpartition(".")[0]
        generator = torch.Generator().manual_seed(sum(seed.encode()))
        return in_order(num_in, group_size)[torch.randperm(num_in, generator=generator)]

    return groups


def relabelled(name: str, num_in: int, group_size: int) -> Tensor:
    """One order for all projections of a block, but each numbers its groups in its own way."""
    groups = permuted("block")(name, num_in, group_size)
    num_groups = int(groups.max()) + 1
    return torch.randperm(num_groups, generator=torch.Generator().manual_seed(sum(name.encode())))[groups]


def integers(**weights: Any) -> dict[str, Any]:
    scheme = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, **weights}
    return {"targets": ["Linear"], "weights": scheme, "input_activations": None}


def floats(**weights: Any) -> dict[str, Any]:
    """FP8 weights whose inputs are left alone."""
    scheme = {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True, **weights}
    return {"targets": ["Linear"], "weights": scheme, "input_activations": None, "format": "float-quantized"}


def compressed(
    *groups: dict[str, Any], pack: Callable[[str, int, int, int], Part | None], ignore: tuple[str, ...] = ("lm_head",)
) -> Family:
    settings = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(groups) > 1 else groups[0].get("format", "pack-quantized"),
        "config_groups": {f"group_{i}": {"format": "pack-quantized", **group} for i, group in enumerate(groups)},
        "ignore": list(ignore),
    }
    return Family(settings, lambda *args: None if is_head(args[0]) else pack(*args))


def ct(bits: int = 4, group_size: int = 32, symmetric: bool = True, act_order: bool = False) -> Family:
    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part:
        groups = permuted("block")(name, num_in, group_size) if act_order else in_order(num_in, group_size)
        return ct_part(name, seed, num_in, num_out, groups, bits, act_order, symmetric)

    strategy = {"strategy": "channel"} if group_size == -1 else {"group_size": group_size}
    order = "group" if act_order else None
    return compressed(integers(num_bits=bits, symmetric=symmetric, actorder=order, **strategy), pack=pack)


def ct_mixed() -> Family:
    """Attention in 8 bits by an expression, the MLP in FP8 by its modules' names, one of them ignored."""
    attention = {**integers(num_bits=8), "targets": ["re:.*self_attn.*"]}
    mlp = {**floats(), "targets": [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "down")]}
    up = {**integers(symmetric=False), "targets": ["Linear"]}

    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part | None:
        if name.endswith("layers.1.self_attn.k_proj"):
            return None
        if "self_attn" in name:
            return ct_part(name, seed, num_in, num_out, in_order(num_in, 32), 8, symmetric=True)
        if name.endswith("up_proj"):
            return ct_part(name, seed, num_in, num_out, in_order(num_in, 32))
        return fp8_part(name, seed, num_out, num_in, "weight_scale", 1, num_in)

    family = compressed(attention, mlp, up, pack=pack, ignore=("lm_head", "re:.*layers.1.*k_proj"))
    family = apart(family, 1, 2)
    family.num_products["model.layers.1.self_attn.qkv_proj"] = 3
    return family


def ct_fp8(row_block: int, column_block: int, **weights: Any) -> Family:
    """0: as large as the matrix."""

    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part:
        return fp8_part(name, seed, num_out, num_in, "weight_scale", row_block or num_out, column_block or num_in)

    return compressed(floats(**weights), pack=pack)


def fp8(
    row_block: int, column_block: int, skip: str = "lm_head", scale: str = "weight_scale", **settings: Any
) -> Family:
    made = {"quant_method": "fp8", "activation_scheme": "dynamic", **settings}

    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part | None:
        if is_head(name) or skip in name:
            return None
        tensors, matrix = fp8_part(name, seed, num_out, num_in, scale, row_block or num_out, column_block or num_in)
        if settings.get("activation_scheme") == "static":
            tensors[f"{name}.input_scale"] = torch.tensor([0.01])
        return tensors, matrix

    return Family(made, pack)


def gptq_dynamic() -> Family:
    changes = {
        "-:.*down_proj": {},
        r"+:model\.layers\.1\.self_attn": {"bits": 8, "group_size": 96},
        r".*gate_proj": {"group_size": -1},
    }
    plain = gptq(dynamic=changes)

    def pack(name: str, seed: int, num_in: int, num_out: int) -> Part | None:
        if name.endswith("down_proj") or is_head(name):
            return None
        if "layers.1.self_attn" in name:
            return gptq_part(name, seed, num_in, num_out, in_order(num_in, 96), 8)
        size = -1 if name.endswith("gate_proj") else 32
        return gptq_part(name, seed, num_in, num_out, in_order(num_in, size), g_idx=False)

    return Family(plain.settings, pack)


def old_awq() -> Family:
    family = awq(skip="o_proj")
    family.settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    family.file = "quant_config.json"
    return family


def old_gptq() -> Family:
    family = gptq()
    del family.settings["quant_method"]
    family.file, family.weights = "quantize_config.json", "gptq_model-4bit-32g.safetensors"
    return family


def apart(family: Family, qkv: int, gate_up: int) -> Family:
    """The family with its fused layers in so many products."""
    for layer in (0, 1):
        family.num_products[f"model.layers.{layer}.self_attn.qkv_proj"] = qkv
        family.num_products[f"model.layers.{layer}.mlp.gate_up_proj"] = gate_up
    return family


FAMILIES: dict[str, Family] = {
    "awq": awq(),
    "awq in one group": awq(-1),
    "awq with plain modules that are not listed": awq(skip="o_proj"),
    "awq with listed plain modules": apart(awq(skip="v_proj", modules_to_not_convert=["v_proj"]), 2, 1),
    "awq that names a kernel": awq(version="exllama"),
    "awq of gptqmodel": awq(checkpoint_format="gemm", method="awq", version=None),
    "old awq": old_awq(),
    "gptq": gptq(),
    "gptq version 2": gptq(version=2, checkpoint_format="gptq_v2"),
    "gptq with 8 bits": gptq(8),
    "gptq with 8 bits, version 2": gptq(8, version=2, checkpoint_format="gptq_v2"),
    "gptq in one group": gptq(group_size=-1),
    "gptq with a ragged last group": gptq(group_size=64),
    "gptq with act-order": gptq(groups=permuted("block")),
    "gptq with act-order, groups numbered anyhow": gptq(groups=relabelled),
    "gptq with an order for each projection": apart(gptq(groups=permuted("projection")), 3, 2),
    "gptq with settings for single layers": gptq_dynamic(),
    "gptq with a quantized head": gptq(head=True),
    "old gptq": old_gptq(),
    "compressed-tensors": ct(),
    "compressed-tensors per channel": ct(group_size=-1),
    "compressed-tensors with zero points": ct(symmetric=False),
    "compressed-tensors with 8 bits": ct(8),
    "compressed-tensors with 8 bits and zero points": ct(8, symmetric=False),
    "compressed-tensors with act-order": ct(symmetric=False, act_order=True),
    "compressed-tensors with a ragged last group": ct(group_size=64),
    "compressed-tensors, mixed": ct_mixed(),
    "compressed-tensors fp8 per tensor": ct_fp8(0, 0, strategy="tensor"),
    "compressed-tensors fp8 per channel": ct_fp8(1, 0),
    "compressed-tensors fp8 in ragged blocks": ct_fp8(64, 64, strategy="block", block_structure=[64, 64]),
    "fp8 per tensor": fp8(0, 0),
    "fp8 per tensor, static": fp8(0, 0, activation_scheme="static"),
    "fp8 per channel": fp8(1, 0),
    "fp8 with ignored layers": apart(
        fp8(0, 0, "k_proj", ignored_layers=["lm_head", "model.layers.0.self_attn.k_proj"]), 3, 1
    ),
    "fp8 in ragged blocks": fp8(64, 64, scale="weight_scale_inv", weight_block_size=[64, 64]),
    "fp8 in blocks, plain modules": apart(
        fp8(32, 32, "v_proj", "weight_scale_inv", weight_block_size=[32, 32], modules_to_not_convert=["v_proj"]), 2, 1
    ),
    "fp8 in blocks under the other name": fp8(64, 64, weight_block_size=[64, 64]),
}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: list[str]) -> Path:
    """A checkpoint whose tensors are dealt out to the files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    for index, file in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in names[index :: len(files)]}, folder / file)
    if len(files) > 1:
        weight_map = {name: files[index % len(files)] for index, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def checkpoints(tmp_path: Path, kind: str, family: Family, num_files: int = 1) -> tuple[Path, Path]:
    """The packed checkpoint, and a plain one of the matrices that it stands for."""
    config, plain = plain_model(kind)
    packed = dict(plain)
    for seed, (name, num_in, num_out) in enumerate(linears(plain)):
        made = family.pack(name, seed, num_in, num_out)
        if made is not None:
            tensors, matrix = made
            del packed[f"{name}.weight"]
            packed.update({key: tensor for key, tensor in tensors.items() if f"{name}.bias" != key or key not in plain})
            plain[f"{name}.weight"] = matrix
    inside = {"quantization_config": family.settings} if family.file == SETTINGS else {}
    files = [family.weights]
    if num_files > 1:
        files = [f"model-{index + 1:05}-of-{num_files:05}.safetensors" for index in range(num_files)]
    quantized = write(tmp_path / "packed", {**config, **inside}, packed, files)
    if not inside:
        (quantized / family.file).write_text(json.dumps(family.settings))
    return quantized, write(tmp_path / "plain", config, plain, ["model.safetensors"])
