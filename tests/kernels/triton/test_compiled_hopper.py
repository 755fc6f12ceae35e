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
from octavo_kernels.hopper_linear import fp8_tiling, int4_tiling
from octavo_kernels.hopper_stream import _stream

FLOATS, INTEGERS = ("partial_ptr", "scale_ptr"), ("arrivals_ptr", "words_ptr", "params_ptr")

def report(num_tokens, fp8, group, dtype):
    tile = (fp8_tiling if fp8 else int4_tiling)(4096, num_tokens, 132)
    constants = dict(
        K=4096, GROUP=group, TOKEN_TILES=-(-num_tokens // tile.block_m), BLOCK_M=tile.block_m,
        STAGES=tile.num_stages, FP8=fp8, BIAS=True, PDL=True)
    names = _stream.arg_names
    kinds = {name: "constexpr" if name in constants else "i32" for name in names}
    pointers = [name for name in names if name.endswith("_ptr")]
    kinds |= {name: "*fp32" if name in FLOATS else "*i32" if name in INTEGERS else "*" + dtype for name in pointers}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "num_rows"]}
    options = {"num_warps": tile.num_warps, "launch_pdl": True, "maxnreg": tile.max_registers}
    source = GluonASTSource(_stream, kinds, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
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
        "most": tile.max_registers,
        "shared": compiled.metadata.shared * tile.resident,
        "products": len(products), "from_registers": products.count("{"),
        "conversions": len(re.findall(r"\bI2F", machine.split("HGMMA", 1)[1].rsplit("HGMMA", 1)[0])),
    }

print(json.dumps({
    "1 token": report(1, False, 128, "bf16"),
    "32 tokens in half precision": report(32, False, 64, "fp16"),
    "256 tokens": report(256, False, 128, "bf16"),
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


def test_weights_go_from_registers_into_asynchronous_products(reports: dict[str, dict[str, int]]) -> None:
    for name, report in reports.items():
        assert report["products"] >= 8, name
        assert report["from_registers"] == report["products"], name
        assert not report["serialized"], name


def test_nothing_spills_and_programs_share_a_processor(reports: dict[str, dict[str, int]]) -> None:
    for name, report in reports.items():
        assert report["spilled"] == 0, name
        assert report["registers"] <= report["most"], name
        assert report["shared"] <= 227 * 1024, name


def test_no_integer_is_converted_in_the_loop(reports: dict[str, dict[str, int]]) -> None:
    for name, report in reports.items():
        if name != "256 tokens":  # where the tile of a step is found by a division
            assert report["conversions"] == 0, name
