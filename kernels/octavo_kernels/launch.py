"""What every launch needs to know of the device, and the reasons why a kernel cannot run on one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

DTYPES = (torch.bfloat16, torch.float16)

GLUON = "3.6"
"""The version of Triton whose Gluon kernels are written in; it is experimental and changes from version to version."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device's figures that decide how work is cut.

    ``dependent_launch`` says that a kernel may be launched while its predecessor still runs (programmatic dependent
    launch, compute capability 9.0 and above): it then waits inside, before it touches what the predecessor writes.
    """

    num_processors: int
    dependent_launch: bool

    @property
    def options(self) -> dict[str, bool]:
        """Keyword arguments of a launch."""
        return {"launch_pdl": True} if self.dependent_launch else {}


@lru_cache
def describe(device: torch.device) -> Device:
    """The figures of a CUDA device; of any other (Triton's interpreter), small ones that exercise every path."""
    if device.type != "cuda":
        return Device(num_processors=4, dependent_launch=False)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, dependent_launch=properties.major >= 9)


def missing_device(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why kernels for 16-bit activations cannot run on ``device``; empty: they can."""
    if device.type != "cuda":
        return [f"it needs a CUDA device, not '{device.type}'"]
    reasons = []
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        reasons.append(f"it needs compute capability 8.0 or above, and this device has {capability[0]}.{capability[1]}")
    if dtype not in DTYPES:
        reasons.append(f"it computes in bfloat16 and float16, not {str(dtype).removeprefix('torch.')}")
    return reasons


def missing_hopper(device: torch.device) -> list[str]:
    """Why kernels in Gluon, made for Hopper GPUs, cannot run on ``device``; empty: they can."""
    reasons = []
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device))[0] != 9:
        reasons.append(f"it is made for compute capability 9.0 (Hopper), not {capability[0]}.{capability[1]}")
    if triton.__version__.split(".")[:2] != GLUON.split("."):
        reasons.append(f"it is written for Triton {GLUON}, and this is {triton.__version__}")
    return reasons


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(value - 1, 0).bit_length()
