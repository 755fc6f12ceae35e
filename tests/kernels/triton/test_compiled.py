"""What the compiler makes of the kernels for an H200, without one: matrix instructions, and no spilled registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = r"""
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from octavo_kernels import (
    activation, argmax, attention, candidate_sample, candidates, fp8_linear, fp8_tokens, hopper_attention,
    hopper_decode, hopper_linear, invariant_linear, linear, logprobs, norm, packed_linear, rotary, sample,
)

FLOATS = {"eps", "scale", "soft_cap", "value_scale", "key_inverse_scale", "value_inverse_scale"}
TYPES = {
    "partial_ptr": "*fp32", "statistics_ptr": "*fp32", "arrivals_ptr": "*i32", "block_tables_ptr": "*i32",
    "item_rows_ptr": "*i32", "first_items_ptr": "*i32",
    "query_start_ptr": "*i32", "seq_lens_ptr": "*i32", "positions_ptr": "*i64", "slots_ptr": "*i64",
    "table_ptr": "*fp32", "values_ptr": "*fp32", "ids_ptr": "*i32", "zero_ptr": "*u8",
}

def compile(kernel, num_warps, constants, make=ASTSource, registers=None, **types):
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        return types.get(name) or TYPES.get(name) or ("*bf16" if name.endswith("_ptr") else "i32")
    names = kernel.arg_names
    aligned = [
        param.num for param in kernel.params if param.name.endswith(("_ptr", "stride"))
        and not (param.do_not_specialize or param.do_not_specialize_on_alignment)
    ]
    source = make(
        kernel, {name: kind(name) for name in names}, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": num_warps, "launch_pdl": True, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage).groups()
    ptx = compiled.asm["ptx"]
    return {
        "spilled": int(stack) + int(local), "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
        "async": ptx.count("cp.async.cg") + ptx.count("cp.async.bulk.tensor"),
        "waits": ptx.count("griddepcontrol.wait"),
    }

def attend(rows, one_tile, split, items=False):
    tile = attention.tiling(rows, 128)
    return compile(attention._paged_attention, tile.num_warps, dict(
        NUM_KV_HEADS=8, GROUP=4, HEAD_DIM=128, BLOCK_D=128, BLOCK_SIZE=16, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        SPLIT=split, ITEMS=items, SPLIT_TILES=0, ONE_TILE=one_tile, WINDOW=0, SOFT_CAP=False, EIGHT_BIT=False,
        STAGES=tile.num_stages, PDL=True))

def attend_hopper(rows, items):
    tile = hopper_decode.tiling(rows, 128)
    return compile(hopper_decode._decode_attention, tile.num_warps, dict(
        NUM_KV_HEADS=8, GROUP=4, HEAD_DIM=128, BLOCK_SIZE=16, ROWS=tile.block_m, BLOCK_N=tile.block_n, SPLIT=True,
        ITEMS=items, STAGES=tile.num_stages, LOADING_REGISTERS=hopper_decode.LOADING_REGISTERS, PDL=True),
        GluonASTSource, hopper_decode.max_registers(tile), kv_descriptor=f"tensordesc<bf16[16, 64],{shared!r}>")

def packed(num_tokens):
    tile = packed_linear.packed_tiling(4096, 28672, num_tokens)
    return compile(packed_linear._packed, tile.num_warps, dict(
        K=4096, GROUP=128, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, NUM_SPLITS=tile.num_splits,
        SYMMETRIC=False, BIAS=False, STAGES=tile.num_stages, PDL=True),
        weight_ptr="*i32", scale_ptr="*fp16")

SAMPLE = {name: "*fp32" for name in (
    "maxima_ptr", "masses_ptr", "temperature_ptr", "uniform_ptr", "top_p_ptr", "min_p_ptr", "largest_ptr")}
SAMPLE |= {name: "*i32" for name in ("pivots_ptr", "counts_ptr", "ranks_ptr")}
SAMPLE |= {name: "*i64" for name in ("out_ptr", "greedy_ptr", "top_k_ptr", "chosen_ptr")}
shared = hopper_attention.gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
few = linear.few_tokens_tiling(4096, 6144, 16)
wide = linear.few_tokens_tiling(4096, 28672, 64)
fp8 = fp8_linear.few_tokens_fp8_tiling(4096, 6144, 4096, 16)
ROUNDED = dict(out_ptr="*fp8e4nv", scales_ptr="*fp32")
FP8 = dict(K=4096, ROW_BLOCK=1, COLUMN_BLOCK=4096, BIAS=False, PDL=True)
one = linear.one_token_tiling(4096)
print(json.dumps({
    "decode": attend(4, True, True),
    "decode, shared out": attend(4, True, True, items=True),
    "share_out": compile(attention._share_out, 4, dict(BLOCK_N=64, BLOCK_ROWS=256, PDL=True)),
    "verification": attend(20, True, True),
    "prefill": attend(4096, False, False),
    "prefill_hopper": compile(hopper_attention._prefill_attention, 4, dict(
        NUM_KV_HEADS=8, GROUP=4, HEAD_DIM=128, BLOCK_SIZE=16, BLOCK_M=hopper_attention.BLOCK_M,
        BLOCK_N=hopper_attention.BLOCK_N, STAGES=hopper_attention.STAGES,
        COMPUTING_REGISTERS=hopper_attention.COMPUTING_REGISTERS,
        LOADING_REGISTERS=hopper_attention.LOADING_REGISTERS, PDL=True),
        GluonASTSource, hopper_attention.MAX_REGISTERS, kv_descriptor=f"tensordesc<bf16[16, 64],{shared!r}>"),
    "decode_hopper": attend_hopper(4, True),
    "decode_hopper, one row": attend_hopper(4, False),
    "verification_hopper": attend_hopper(20, True),
    "one_token": compile(linear._one_token, one.num_warps, dict(
        K=4096, BLOCK_N=one.block_n, BLOCK_K=one.block_k, BIAS=False, PDL=True)),
    "few_tokens": compile(linear._few_tokens, few.num_warps, dict(
        K=4096, BLOCK_M=16, BLOCK_N=few.block_n, BLOCK_K=few.block_k, NUM_SPLITS=few.num_splits, GATED=False,
        BIAS=False, STAGES=few.num_stages, PDL=True)),
    "few_tokens, wide": compile(linear._few_tokens, wide.num_warps, dict(
        K=4096, BLOCK_M=64, BLOCK_N=wide.block_n, BLOCK_K=wide.block_k, NUM_SPLITS=wide.num_splits, GATED=True,
        BIAS=False, STAGES=wide.num_stages, PDL=True)),
    "rms_norm": compile(
        norm._rms_norm, 8, dict(SIZE=4096, BLOCK=4096, ADD=True, ROUND=False, REORDERED=False, PDL=True)),
    "rms_norm_rounded": compile(norm._rms_norm, 8, dict(
        SIZE=4096, BLOCK=4096, ADD=True, ROUND=True, REORDERED=True, PDL=True), **ROUNDED),
    "silu_and_mul": compile(
        activation._silu_and_mul, 4, dict(SIZE=14336, BLOCK=1024, ROUND=False, REORDERED=False, PDL=True)),
    "silu_and_mul_rounded": compile(activation._silu_and_mul, 16, dict(
        SIZE=14336, BLOCK=16384, ROUND=True, REORDERED=True, PDL=True), **ROUNDED),
    "silu_and_mul_rounded, widest": compile(activation._silu_and_mul, 16, dict(
        SIZE=32768, BLOCK=32768, ROUND=True, REORDERED=True, PDL=True), **ROUNDED),
    "rotate_and_store": compile(rotary._rotate_and_store, 1, dict(
        NUM_HEADS=32, NUM_KV_HEADS=8, HEAD_DIM=128, ROTARY_DIM=128, NORM=True, BLOCK_SIZE=16, EIGHT_BIT=False,
        FP8_MAX=448.0, HEADS=4, BLOCK_D=128, PDL=True)),
    "argmax_part": compile(argmax._argmax_part, 8, dict(BLOCK=4096, PDL=True), logits_ptr="*fp32"),
    "packed_one": compile(packed_linear._one_token_packed, 4, dict(
        K=4096, GROUP=128, BLOCKS=8, NUM_SPLITS=4, SYMMETRIC=False, BIAS=False, PDL=True),
        x_ptr="*i32", weight_ptr="*i32", scale_ptr="*fp16"),
    "packed_few": packed(16),
    "packed_many": packed(64),
    "fp8_one": compile(fp8_linear._one_token_fp8, 4, dict(FP8, BLOCK_N=4, BLOCK_K=2048, PART=128),
        weight_ptr="*fp8e4nv", scale_ptr="*fp32"),
    "fp8_few": compile(fp8_linear._few_tokens_fp8, fp8.num_warps, dict(
        FP8, BLOCK_M=16, BLOCK_N=fp8.block_n, BLOCK_K=fp8.block_k, NUM_SPLITS=fp8.num_splits, STAGES=fp8.num_stages),
        weight_ptr="*fp8e4nv", scale_ptr="*fp32"),
    "round_tokens": compile(
        fp8_tokens._round_tokens, 8, dict(SIZE=4096, BLOCK=4096, REORDERED=True, PDL=True), **ROUNDED),
    "invariant_many": compile(invariant_linear._many_tokens, 8, dict(
        K=14336, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, NUM_SPLITS=2, SPLIT_K=7168, BIAS=False, STAGES=4,
        PDL=True)),
    "survey": compile(candidates.survey, 8, dict(BLOCK=4096, GROUPS=64, PDL=True), **SAMPLE),
    "sample_prepare": compile(candidate_sample._prepare, 4, dict(
        TOP_K=True, CANDIDATES=True, NUM_WANTED=1024, PARTS=32, GROUPS=64, PDL=True), **SAMPLE),
    "sample_weigh": compile(candidate_sample._weigh, 8, dict(
        MIN_P=True, CANDIDATES=True, CAPACITY=1024, BLOCK=4096, PDL=True), **SAMPLE),
    "sample_draw": compile(candidate_sample._draw, 8, dict(
        TOP_K=True, TOP_P=True, MIN_P=True, CANDIDATES=4096, CAPACITY=1024, PARTS=32, BLOCK=4096, PDL=True), **SAMPLE),
    "logprobs_count": compile(logprobs._count, 8, dict(CAPACITY=1024, BLOCK=4096, PDL=True), **SAMPLE),
    "logprobs_list": compile(logprobs._list, 8, dict(
        CANDIDATES=2048, CAPACITY=1024, PARTS=32, BLOCK=4096, PDL=True), **SAMPLE, logprobs_ptr="*fp32",
        out_ranks_ptr="*i64", top_ids_ptr="*i64", top_logprobs_ptr="*fp32"),
    "dequantize_int4": compile(hopper_linear._dequantize_int4, 4, dict(K=4096, GROUP=128, FACTOR=2.0**23),
        words_ptr="*i32", params_ptr="*i32"),
    "dequantize_fp8": compile(hopper_linear._dequantize_fp8, 4, dict(
        K=4096, ROW_BLOCK=128, COLUMN_BLOCK=128, BLOCK=1024), values_ptr="*fp8e4nv", scales_ptr="*fp32"),
    "sample": compile(sample._sample, 8, dict(TOP_K=True, TOP_P=True, MIN_P=True, BLOCK=4096, PDL=True),
        out_ptr="*i64", weights_ptr="*fp32", logits_ptr="*fp32", greedy_ptr="*i64", temperature_ptr="*fp32",
        uniform_ptr="*fp32", top_k_ptr="*i64", top_p_ptr="*fp32", min_p_ptr="*fp32"),
    "argmax_join": compile(argmax._argmax_join, 1, dict(BLOCK=32, PDL=True), out_ptr="*i64"),
}))
"""


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, int]]:
    """Kernel -> what its machine code holds; compiled in a process where the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_nothing_spills_except_prefill_by_a_few_bytes(reports: dict[str, dict[str, int]]) -> None:
    spilled = {name: report["spilled"] for name, report in reports.items() if report["spilled"]}
    assert spilled.pop("prefill", 0) <= 512  # it was the fastest of its kind all the same
    assert not spilled


def test_wide_tiles_use_the_matrix_units_of_hopper(reports: dict[str, dict[str, int]]) -> None:
    assert reports["prefill"]["wgmma"] > 0
    assert all(reports[name]["wgmma"] > 0 for name in ("prefill_hopper", "decode_hopper", "verification_hopper"))
    assert all(
        reports[name]["wgmma"] > 0
        for name in ("few_tokens", "few_tokens, wide", "packed_few", "packed_many", "fp8_few")
    )
    assert reports["decode"]["mma"] > 0  # 16 rows are too few for them


READ_AHEAD = {
    "decode", "decode_hopper", "verification", "verification_hopper", "prefill", "prefill_hopper", "few_tokens",
    "few_tokens, wide", "packed_few", "packed_many", "fp8_few",
}  # fmt: skip


def test_caches_and_weights_are_read_asynchronously(reports: dict[str, dict[str, int]]) -> None:
    assert all(reports[name]["async"] > 0 for name in reports if name in READ_AHEAD)


def test_programs_that_decode_share_a_processor(reports: dict[str, dict[str, int]]) -> None:
    for name, programs in (("decode_hopper", 3), ("decode_hopper, one row", 3), ("verification_hopper", 2)):
        assert programs * (reports[name]["shared"] + 1024) <= 228 * 1024


def test_every_kernel_waits_for_its_predecessor(reports: dict[str, dict[str, int]]) -> None:
    # those that write weights out are launched plainly: the device waits for them
    waits = {name: report["waits"] for name, report in reports.items() if not name.startswith("dequantize")}
    assert all(waits.values()), waits
