"""What the compiler makes of the streamed products for an H200, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

PROGRAM = r"""
import json, re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon import language as gl
from octavo_kernels import hopper_gated, hopper_packed
from octavo_kernels.hopper_linear import fp8_tiling, int4_tiling, packed_tiling
from octavo_kernels.hopper_stream import _stream

FLOATS, INTEGERS = ("partial_ptr", "scale_ptr"), ("arrivals_ptr", "words_ptr", "params_ptr")

def assemble(kernel, constants, kinds, options):
    names = kernel.arg_names
    pointers = [name for name in names if name.endswith("_ptr")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "num_rows"]}
    compiled = triton.compile(
        GluonASTSource(kernel, kinds, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/kernel.ptx", "w") as file:
            file.write(ptx)
        assembler = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a"]
        command = [*assembler, folder + "/kernel.ptx", "-o", folder + "/cubin"]
        assembled = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [triton.knobs.nvidia.nvdisasm.path, folder + "/cubin"]
        machine = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (.)", ptx)
    return {
        "serialized": "serialized" in assembled,
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", assembled)),
        "registers": int(re.search(r"Used (\d+) registers", assembled).group(1)),
        "most": options["maxnreg"],
        "shared": compiled.metadata.shared,
        "products": len(products), "from_registers": products.count("{"),
        "conversions": len(re.findall(r"\bI2F", machine.split("HGMMA", 1)[1].rsplit("HGMMA", 1)[0])),
    }

def kinds_of(kernel, constants, dtype, **others):
    return {
        name: "constexpr" if name in constants else others.get(name) or
        ("*fp32" if name in FLOATS else "*i32" if name in INTEGERS else "*" + dtype if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names}

def report(num_tokens, fp8, group, dtype):
    tile = (fp8_tiling if fp8 else int4_tiling)(4096, num_tokens, 132)
    constants = dict(
        K=4096, GROUP=group, TOKEN_TILES=-(-num_tokens // tile.block_m), BLOCK_M=tile.block_m,
        STAGES=tile.num_stages, FP8=fp8, BIAS=True, PDL=True)
    options = {"num_warps": tile.num_warps, "launch_pdl": True, "maxnreg": tile.max_registers}
    found = assemble(_stream, constants, kinds_of(_stream, constants, dtype), options)
    return found | {"shared": found["shared"] * tile.resident}

def report_packed(num_tokens, group, dtype):
    tile = packed_tiling(28672, 4096, num_tokens, 132)
    constants = dict(
        K=4096, GROUP=group, BLOCK_M=tile.block_m, STAGES=tile.num_stages, BIAS=True,
        MULTIPLYING_REGISTERS=hopper_packed.MULTIPLYING_REGISTERS, LOADING_REGISTERS=hopper_packed.LOADING_REGISTERS,
        PDL=True)
    inputs, words = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=n, rank=2) for n in (16, 32))
    kinds = kinds_of(
        hopper_packed._multiply_packed, constants, dtype,
        x_descriptor=f"tensordesc<{dtype}[{tile.block_m}, 64],{inputs!r}>",
        words_descriptor=f"tensordesc<i32[64, 32],{words!r}>")
    options = {"num_warps": 4, "launch_pdl": True, "maxnreg": hopper_packed.MAX_REGISTERS}
    return assemble(hopper_packed._multiply_packed, constants, kinds, options)

def report_gated(dtype, num_tokens):
    tile = hopper_gated.gated_tiling(num_tokens)
    constants = dict(
        NUM_PARTS=tile.num_parts, PART_ROWS=hopper_gated.PART_ROWS, BLOCK_N=hopper_gated.BLOCK_N,
        STEP=hopper_gated.STEP, NUM_STEPS=64, STAGES=tile.num_stages, NEIGHBOURS=16,
        INSTRUCTION_ROWS=tile.instruction_rows, MULTIPLYING_REGISTERS=tile.multiplying_registers,
        LOADING_REGISTERS=tile.loading_registers)
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows = dict(x=hopper_gated.PART_ROWS, weight=hopper_gated.BLOCK_N)
    kinds = kinds_of(hopper_gated._multiply_gated, constants, dtype, **{
        f"{name}_descriptor": f"tensordesc<{dtype}[{count}, 64],{shared!r}>" for name, count in rows.items()})
    options = {"num_warps": 4, "maxnreg": tile.max_registers}
    return assemble(hopper_gated._multiply_gated, constants, kinds, options)

print(json.dumps({
    "gated, 1024 tokens": report_gated("bf16", 1024),
    "gated, 8192 tokens": report_gated("bf16", 8192),
    "1 token": report(1, False, 128, "bf16"),
    "32 tokens in half precision": report(32, False, 64, "fp16"),
    "128 tokens": report_packed(128, 128, "bf16"),
    "1024 tokens": report_packed(1024, 64, "fp16"),
    "1 token, FP8": report(1, True, 0, "bf16"),
    "32 tokens, FP8 in blocks": report(32, True, 128, "fp16"),
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


def test_quantized_weights_go_from_registers_into_asynchronous_products(reports: dict[str, dict[str, int]]) -> None:
    for name, report in reports.items():
        assert report["products"] >= 8, name
        assert report["from_registers"] == (0 if name.startswith("gated") else report["products"]), name
        assert not report["serialized"], name


def test_nothing_spills_and_programs_share_a_processor(reports: dict[str, dict[str, int]]) -> None:
    for name, report in reports.items():
        # tiles of 256 tokens keep half of a group's registers for their sums
        assert report["spilled"] <= (64 if name == "1024 tokens" else 0), name
        assert report["registers"] <= report["most"], name
        assert report["shared"] <= 227 * 1024, name


def test_no_integer_is_converted_in_the_loop(reports: dict[str, dict[str, int]]) -> None:
    divided = ("128 tokens", "1024 tokens", "gated, 1024 tokens", "gated, 8192 tokens")  # to find a tile
    for name, report in reports.items():
        if name not in divided:
            assert report["conversions"] == 0, name
