"""``octavo quantize``: a quantized checkpoint in a standard format out of a plain one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError
from octavo.interfaces import WeightSource
from octavo.loader import HuggingFaceFolder, resolve_model_path
from octavo.quantization import quantization_settings
from octavo_quant.fp8_weight import Fp8Weight

SHARD_BYTES = 4 << 30
INSTALL = "pip install 'octavo[quantize]'"

EMBEDDING = "embed_tokens"
KEPT_LINEARS = ("lm_head", "gate", "router")
"""Linear layers that stay as they are: what they decide is worth their few bytes."""

FP8_SETTINGS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "type": "float",
                "num_bits": 8,
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "type": "float",
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "kv_cache_scheme": None,
}
"""What llm-compressor calls FP8_DYNAMIC: a scale per output, inputs scaled per token while serving; no ``ignore``."""


def run(arguments: argparse.Namespace) -> int:
    """Quantize as the command line says.

    Raises:
        ConfigError: the input is quantized already, the output exists, or a library is missing.
    """
    source, out = resolve_model_path(arguments.model), Path(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; name another folder")
    checkpoint = HuggingFaceFolder(source)
    found = quantization_settings(checkpoint)
    if found is not None:
        raise CheckpointError(f"{source} is quantized with {found[0]} already; name the checkpoint it was made from")
    if arguments.method == "fp8":
        quantize_fp8(checkpoint, out)
    else:
        quantize_calibrated(checkpoint, out, arguments.method, arguments.group_size, arguments.calibration)
    return 0


def quantize_fp8(checkpoint: HuggingFaceFolder, out: Path) -> None:
    """Write the checkpoint with its linear layers in FP8, one tensor in memory at a time but for a file's worth."""
    out.mkdir(parents=True, exist_ok=True)
    weights = checkpoint.weights()
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total, size = 0, 0

    def flush() -> None:
        nonlocal size
        if pending:
            save_file(pending, out / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()
            size = 0

    for name in sorted(weights.names()):
        for key, tensor in quantized_tensors(name, weights):
            pending[key] = tensor.contiguous()
            size += tensor.nbytes
            total += tensor.nbytes
        if size >= SHARD_BYTES:
            flush()
    flush()
    weight_map = {}
    for number, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (out / f"part-{number}.safetensors").rename(out / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for other in checkpoint.path.iterdir():
        kept = other.suffix in (".json", ".jinja", ".txt", ".model") and not other.name.endswith(".index.json")
        if kept and other.name != "config.json":
            shutil.copy2(other, out / other.name)
    modules = {name.removesuffix(".weight") for name in weights.names()}
    ignored = {"lm_head"} | {module for module in modules if module.rpartition(".")[2] in KEPT_LINEARS}
    config = {**checkpoint.config(), "quantization_config": {**FP8_SETTINGS, "ignore": sorted(ignored)}}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def quantized_tensors(name: str, weights: WeightSource) -> list[tuple[str, Tensor]]:
    """What becomes of a tensor: a linear layer's matrix gets a scale beside it, the rest stays."""
    tensor = weights.read(name)
    if not is_quantizable(name, weights):
        return [(name, tensor)]
    made = Fp8Weight.online(tensor)
    return [(name, made.values), (f"{name}_scale", made.scales)]


def is_quantizable(name: str, weights: WeightSource) -> bool:
    """Whether the tensor is the matrix of a linear layer that is worth it."""
    info, (module, _, kind) = weights.info(name), name.rpartition(".")
    is_matrix = kind == "weight" and len(info.shape) == 2 and info.dtype.is_floating_point
    return is_matrix and module.rpartition(".")[2] not in (EMBEDDING, *KEPT_LINEARS)


def check_group_size(weights: WeightSource, group_size: int) -> None:
    """Raises ConfigError, naming a matrix, where groups of that many inputs do not come out even."""
    inputs = {weights.info(name).shape[1]: name for name in weights.names() if is_quantizable(name, weights)}
    uneven = [size for size in inputs if group_size < 1 or size % group_size]
    if uneven:
        fitting = [str(size) for size in (128, 64, 32) if not math.gcd(*inputs) % size]
        raise ConfigError(
            f"--group-size {group_size} does not divide the {uneven[0]} inputs of '{inputs[uneven[0]]}'; of the usual "
            f"sizes this model can have {', '.join(fitting) or 'none, only --method fp8'}"
        )


def quantize_calibrated(
    checkpoint: HuggingFaceFolder, out: Path, method: str, group_size: int, calibration: Path | None
) -> None:
    """4 bits through llm-compressor, which writes the compressed-tensors format.

    Raises:
        ConfigError: the library is not installed, the groups do not come out even, or there is no text to calibrate
            with.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise ConfigError(
            f"--method {method} needs llm-compressor, which is not installed: {INSTALL}, best in an environment of its "
            f"own, as it wants transformers 5.15 to 5.17. --method fp8 needs no library"
        )
    if calibration is None or not calibration.is_file():
        named = "" if calibration is None else f"; {calibration} is no file"
        raise ConfigError(
            f"--method {method} needs text like what will be served: --calibration FILE, a sample a line{named}"
        )
    check_group_size(checkpoint.weights(), group_size)
    import datasets
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = checkpoint.path
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = [line for line in calibration.read_text(encoding="utf-8").splitlines() if line.strip()]
    samples = datasets.Dataset.from_list(
        [{"input_ids": tokenizer(line, truncation=True, max_length=2048)["input_ids"]} for line in lines]
    )
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": method == "gptq",
    }
    layers: dict[str, Any] = {
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    recipe = [GPTQModifier(**layers)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**layers)]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if not torch.accelerator.is_available():
        # llm-compressor 0.14 pins memory for copies to a device, which torch refuses where there is none
        IntermediatesCache.pin_memory = lambda *_, **__: None
    oneshot(model=model, dataset=samples, recipe=recipe, num_calibration_samples=len(samples))
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
