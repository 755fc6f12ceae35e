"""The compiled kernels: which library fits this machine, and the C functions' types."""

from __future__ import annotations

import ctypes
import platform
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from octavo_cpu.build import AVX2, AVX512, AVX512_BF16, BASELINE, ERROR_FILE, library_path

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in vectors.h


def variants() -> list[str]:
    """The instruction sets that this machine runs, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return [BASELINE]
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX512" in capability:
        bfloat16 = [AVX512_BF16] if torch.cpu._is_avx512_bf16_supported() else []
        return [*bfloat16, AVX512, AVX2, BASELINE]
    return [AVX2, BASELINE] if "AVX2" in capability else [BASELINE]


def library_missing() -> list[str]:
    """Why there are no compiled kernels; empty: there are."""
    if any(library_path(variant).exists() for variant in variants()):
        return []
    if ERROR_FILE.exists():
        return [ERROR_FILE.read_text().strip()]
    return ["the C kernels were not compiled when octavo was installed; run `python -m octavo_cpu.build`"]


@cache
def library() -> ctypes.CDLL:
    """The best library for this machine. Ask :func:`library_missing` first."""
    return open_library(next(path for variant in variants() if (path := library_path(variant)).exists()))


def open_library(path: Path) -> ctypes.CDLL:
    """A library with its functions' types declared; the functions are described in the C sources."""
    opened = ctypes.CDLL(str(path))
    pointer, size = c_void_p, c_int64
    signatures = {
        "rms_norm": (None, (pointer, pointer, pointer, pointer, c_float, size, size, c_int32)),
        "silu_and_mul": (None, (pointer, pointer, size, size, c_int32)),
        "linear_supports": (c_int32, (c_int32,)),
        "linear_padded": (size, (size,)),
        "linear_pack": (None, (pointer, pointer, size, size, c_int32)),
        "linear": (None, (pointer, pointer, pointer, size, c_int32)),
        "quantized_bytes": (size, (size, size, c_int32)),
        "quantized_pack": (None, (pointer, pointer, size, size, c_int32, c_int32)),
        "quantized": (None, (pointer, pointer, pointer, pointer, size, c_int32)),
        "attention": (None, (pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(opened, name)
        function.restype, function.argtypes = result, arguments
    return opened


def common_lacks(device: torch.device, *dtypes: torch.dtype) -> list[str]:
    """What every compiled kernel needs and ``device`` or ``dtypes`` do not give."""
    if device.type != "cpu":
        return [f"runs on a CPU, not on {device.type}"]
    lacks = [
        f"computes in {', '.join(str(known) for known in DTYPES)}, not in {dtype}"
        for dtype in dict.fromkeys(dtypes)
        if dtype not in DTYPES
    ]
    return [*lacks, *library_missing()]
