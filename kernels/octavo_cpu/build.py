"""Compiles the C kernels: run by the build hook on installation, or by hand with ``python -m octavo_cpu.build``.

One library is made per instruction set, from the same source; :mod:`octavo_cpu.library` loads the best that the machine
runs. Imports nothing outside the standard library, since it runs before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("attention.c", "linear.c", "pointwise.c", "pool.c", "quantized.c")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
ERROR_FILE = HERE / "build_error.txt"

BASELINE = "baseline"
AVX2 = "avx2"
AVX512 = "avx512"
AVX512_BF16 = "avx512_bf16"

_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
X86_FLAGS: Mapping[str, tuple[str, ...]] = {
    BASELINE: (),
    AVX2: ("-mavx2", "-mfma"),
    AVX512: _AVX512_FLAGS,
    AVX512_BF16: (*_AVX512_FLAGS, "-mavx512bf16"),
}


def library_path(variant: str) -> Path:
    """Where the library for an instruction set lies."""
    return HERE / f"kernels-{variant}.so"


def find_compiler() -> str | None:
    """The C compiler that ``CC`` names, or one of the usual names."""
    named = os.environ.get("CC")
    return next(
        (found for name in ([named] if named else ["cc", "gcc", "clang"]) if (found := shutil.which(name))), None
    )


def build() -> list[Path]:
    """Compiles every variant for this kind of machine that is older than its sources; returns the libraries there are.

    Nothing is raised when that fails: the kernels are optional. What went wrong is written beside the sources and shown
    by whatever is asked to use them.
    """
    ERROR_FILE.unlink(missing_ok=True)
    for library in HERE.glob("kernels-*.so"):
        if not _is_current(library):
            library.unlink()
    compiler = find_compiler()
    if compiler is None:
        ERROR_FILE.write_text("no C compiler was found when octavo was installed; install gcc and reinstall\n")
        return []
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [str(HERE / source) for source in SOURCES]
    variants = X86_FLAGS if x86 else {BASELINE: ()}
    made = [library_path(variant) for variant in variants if library_path(variant).exists()]
    running = {}
    for variant, flags in variants.items():
        if library_path(variant) in made:
            continue
        command = [compiler, *FLAGS, *flags, *sources, "-o", str(library_path(variant)), "-lm"]
        running[variant] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    errors = []
    for variant, process in running.items():
        said, _ = process.communicate()
        if process.returncode == 0:
            made.append(library_path(variant))
        else:
            errors.append(f"the C kernels ({variant}) could not be compiled with {compiler}: {said.strip()[-1000:]}")
    if errors:
        ERROR_FILE.write_text("\n".join(errors) + "\n")
    return made


def _is_current(library: Path) -> bool:
    """Whether the library is newer than everything it is made from, this file and its flags included."""
    inputs = [*HERE.glob("*.c"), *HERE.glob("*.h"), Path(__file__)]
    return library.stat().st_mtime >= max(path.stat().st_mtime for path in inputs)


if __name__ == "__main__":
    libraries = build()
    print("\n".join(str(path) for path in libraries))
    if ERROR_FILE.exists():
        sys.exit(ERROR_FILE.read_text())
