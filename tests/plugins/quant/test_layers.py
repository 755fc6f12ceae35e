"""Layers that are not among the real checkpoints, made from random weights by the formats' definitions; and errors."""

from __future__ import annotations

import json

import pytest
import torch
from tests.plugins.quant.conftest import Tensors
from tests.plugins.quant.packers import awq_part, ct_part, gptq_part

from octavo.errors import CheckpointError, ConfigError
from octavo.interfaces import LinearPart, LinearSpec
from octavo.loader import HuggingFaceFolder
from octavo.quantization import needed_plugins, quantization_settings
from octavo_quant.awq import AWQ
from octavo_quant.compressed_tensors import CompressedTensors
from octavo_quant.fp8 import FP8Quantization
from octavo_quant.fp8_weight import FP8
from octavo_quant.gptq import GPTQ
from octavo_quant.packed_linear import ReferencePacked


def spec(*parts: LinearPart, num_in: int, columns: slice | None = None, bias: bool = False) -> LinearSpec:
    return LinearSpec("layer.fused", parts, num_in, columns or slice(0, num_in), bias)


def part(name: str, num_out: int, rows: slice | None = None) -> LinearPart:
    return LinearPart(name, num_out, rows or slice(0, num_out))


def ct_settings(**weights):
    scheme = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return {"format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}


def check(quantization, tensors, wanted: LinearSpec, matrix, bias=None):
    method = quantization.linear(wanted, tensors.loader())
    x = torch.randn(5, matrix.shape[1], generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(method.apply(x), torch.nn.functional.linear(x, matrix, bias), atol=1e-4, rtol=1e-4)
    return method


@pytest.mark.parametrize("names", ["new", "old"])
def test_awq_with_biases_and_both_generations_of_settings(names):
    settings = {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    if names == "old":
        settings = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    (one, first), (two, second) = awq_part("a", 1, 64, 16, 32), awq_part("b", 2, 64, 8, 32)
    biases = {"a.bias": torch.randn(16), "b.bias": torch.randn(8)}
    tensors = Tensors({**one, **two, **biases})
    fused = spec(part("a", 16), part("b", 8), num_in=64, bias=True)
    matrix, bias = torch.cat([first, second]), torch.cat(list(biases.values()))
    assert isinstance(check(AWQ.from_checkpoint(settings, tensors), tensors, fused, matrix, bias), ReferencePacked)


def test_awq_shards_anywhere_even_through_words_and_groups():
    tensors, matrix = awq_part("a", 1, 96, 24, 32)
    source = Tensors(tensors)
    rows, columns = slice(6, 18), slice(48, 96)
    sharded = spec(part("a", 24, rows), num_in=96, columns=columns)
    quantization = AWQ.from_checkpoint({"bits": 4, "group_size": 32}, source)
    check(quantization, source, sharded, matrix[rows, columns])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["sequential", "absent", "permuted", "relabelled", "ragged", "one"])
def test_gptq_in_every_width_and_order(version, bits, order):
    num_in, size = 96, 32
    groups = torch.arange(num_in) // size
    if order == "permuted":
        groups = groups[torch.randperm(num_in, generator=torch.Generator().manual_seed(1))]
    if order == "relabelled":
        groups = 2 - groups
    if order == "ragged":
        size, groups = 64, torch.arange(num_in) // 64
    if order == "one":
        size, groups = -1, torch.zeros(num_in, dtype=torch.long)
    tensors, matrix = gptq_part("a", bits, num_in, 32, groups, bits, version, g_idx=order != "absent")
    source = Tensors(tensors)
    settings = {"bits": bits, "group_size": size, "sym": False, "checkpoint_format": ["", "gptq", "gptq_v2"][version]}
    check(GPTQ.from_checkpoint(settings, source), source, spec(part("a", 32), num_in=num_in), matrix)


def test_gptq_keeps_parts_apart_whose_inputs_are_in_different_orders():
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) // 32 for seed in (1, 2)]
    (one, first), (two, second) = (gptq_part(name, 3, 64, 8, g) for name, g in zip("ab", orders, strict=True))
    source = Tensors({**one, **two})
    quantization = GPTQ.from_checkpoint({"bits": 4, "group_size": 32, "sym": False}, source)
    method = check(quantization, source, spec(part("a", 8), part("b", 8), num_in=64), torch.cat([first, second]))
    assert len(method.parts) == 2


def test_gptq_dynamic_settings_change_or_skip_single_layers():
    groups = torch.arange(64) // 32
    (one, first), plain = gptq_part("a", 3, 64, 8, groups, bits=8), torch.randn(8, 64)
    source = Tensors({**one, "b.weight": plain})
    settings = {"bits": 4, "group_size": 64, "sym": False, "dynamic": {"+:a": {"bits": 8, "group_size": 32}, "-:b": {}}}
    quantization = GPTQ.from_checkpoint(settings, source)
    check(quantization, source, spec(part("a", 8), part("b", 8), num_in=64), torch.cat([first, plain]))
    assert quantization.linear(spec(part("b", 8), num_in=64), source.loader()) is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("g_idx", [False, True])
def test_compressed_tensors_integers_with_zero_points(bits, g_idx):
    groups = torch.arange(64) // 32
    if g_idx:
        groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    tensors, matrix = ct_part("a", 1, 64, 16, groups, bits, g_idx)
    source = Tensors(tensors)
    quantization = CompressedTensors.from_checkpoint(ct_settings(num_bits=bits), source)
    check(quantization, source, spec(part("a", 16), num_in=64), matrix)


@pytest.mark.parametrize(
    "cut", [(slice(0, 40), slice(0, 72)), (slice(8, 24), slice(0, 72)), (slice(0, 40), slice(24, 48))]
)
def test_ragged_fp8_blocks_whole_and_sharded(cut):
    num_out, num_in, block = 40, 72, 16
    values = torch.randn(num_out, num_in).to(FP8)
    scales = torch.rand(3, 5)
    matrix = values.float() * scales.repeat_interleave(block, 0)[:40].repeat_interleave(block, 1)[:, :72]
    source = Tensors({"a.weight": values, "a.weight_scale_inv": scales})
    settings = {"activation_scheme": "dynamic", "weight_block_size": [block, block]}
    rows, columns = cut
    method = FP8Quantization.from_checkpoint(settings, source).linear(
        spec(part("a", num_out, rows), num_in=num_in, columns=columns), source.loader()
    )
    identity = torch.eye(columns.stop - columns.start)  # one value per token is rounded without loss
    torch.testing.assert_close(method.apply(identity).T, matrix[rows, columns])


def test_fused_fp8_parts_keep_their_own_scales():
    values = {name: torch.randn(8, 16).to(FP8) for name in "ab"}
    scales = {"a": torch.tensor(0.5), "b": torch.tensor([2.0])}
    source = Tensors(
        {
            **{f"{name}.weight": tensor for name, tensor in values.items()},
            **{f"{name}.weight_scale": tensor for name, tensor in scales.items()},
            **{f"{name}.input_scale": torch.tensor(1 / 448) for name in "ab"},
        }
    )
    method = FP8Quantization.from_checkpoint({"activation_scheme": "static"}, source).linear(
        spec(part("a", 8), part("b", 8), num_in=16), source.loader()
    )
    expected = torch.cat([values["a"].float() * 0.5, values["b"].float() * 2.0])
    torch.testing.assert_close(method.apply(torch.eye(16)).T, expected)


# --- which method -----------------------------------------------------------------------------------------------------


def folder(tmp_path, config, **files):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    ("config", "files", "method"),
    [
        ({"quantization_config": {"quant_method": "AWQ"}}, {}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, {}, "compressed-tensors"),
        ({}, {"quant_config": {"w_bit": 4}}, "awq"),
        ({}, {"quantize_config": {"bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, {"quantize_config": {"bits": 4}}, "fp8"),
    ],
)
def test_the_method_is_found_where_the_makers_put_it(tmp_path, config, files, method):
    checkpoint = folder(tmp_path, config, **files)
    assert quantization_settings(checkpoint)[0] == method
    assert list(needed_plugins(checkpoint, None)) == [method]
    assert needed_plugins(checkpoint, method, provided=[method]) == {}


def test_a_method_that_contradicts_the_checkpoint_is_explained(tmp_path):
    checkpoint = folder(tmp_path, {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ConfigError, match=r"--quantization fp8 contradicts .* quantized with awq; leave the option"):
        needed_plugins(checkpoint, "fp8")


@pytest.mark.parametrize("quantization", [AWQ, GPTQ, CompressedTensors])
def test_only_fp8_is_made_while_loading(quantization):
    with pytest.raises(CheckpointError, match="--quantization fp8"):
        quantization.from_checkpoint({}, Tensors({}))


# --- bad checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "settings", "message"),
    [
        (AWQ, {"bits": 8}, "bits 8 of the awq"),
        (AWQ, {"bits": 4, "version": "gemv"}, "version 'gemv'"),
        (AWQ, {"bits": 4, "version": "marlin"}, "version 'marlin'"),
        (AWQ, {"bits": 4, "group_size": 0}, "group_size 0"),
        (GPTQ, {"bits": 5}, "bits 5 of the gptq"),
        (GPTQ, {"bits": 4, "checkpoint_format": "gptq_v9"}, "checkpoint_format 'gptq_v9'"),
        (GPTQ, {"bits": 4, "is_marlin_format": True}, "checkpoint_format 'marlin'"),
        (GPTQ, {"bits": 4, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        (GPTQ, {"bits": 4, "dynamic": {"(": {}}}, "no regular expression"),
        (FP8Quantization, {"activation_scheme": "sometimes"}, "activation_scheme 'sometimes'"),
        (FP8Quantization, {"activation_scheme": "dynamic", "fmt": "e5m2"}, "fmt 'e5m2'"),
        (FP8Quantization, {"activation_scheme": "static", "weight_block_size": [128, 128]}, "weight_block_size"),
        (CompressedTensors, ct_settings(num_bits=3), "num_bits 3"),
        (CompressedTensors, {**ct_settings(), "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        (CompressedTensors, {**ct_settings(), "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
    ],
)
def test_settings_that_are_not_supported_are_named(quantization, settings, message):
    with pytest.raises(CheckpointError, match=message):
        quantization.from_checkpoint(settings, Tensors({}))
