"""Which part may import which, and what is in the distributions."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
CORE = [package for package in PACKAGES if package.name == "octavo"]
PLUGINS = [package for package in PACKAGES if package.name != "octavo"]

PUBLIC = {
    "octavo",
    "octavo.batch",
    "octavo.bench.kernel_cases",
    "octavo.bench.timing",
    "octavo.blocks",
    "octavo.config",
    "octavo.errors",
    "octavo.hooks",
    "octavo.interfaces",
    "octavo.layers",
    "octavo.loader",
    "octavo.messages",
    "octavo.operations",
    "octavo.outputs",
    "octavo.policies",
    "octavo.prefix",
    "octavo.quantization",
    "octavo.request",
    "octavo.runner",
    "octavo_kernels",
}
"""What plugins may import; of a package, all of its modules."""

WITHOUT_TORCH = ("octavo.scheduler", "octavo.blocks", "octavo.request", "octavo.messages", "octavo.hooks")


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """``(file and line, module)`` of every import of a file, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from ((where, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: a relative import"
            yield where, node.module or ""


def imports_of(packages: list[Path]) -> list[tuple[Path, str, str]]:
    found = [
        (file, where, module)
        for package in packages
        for file in package.rglob("*.py")
        for where, module in imports(file)
    ]
    assert found
    return found


def belongs(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed if name != "octavo") or (
        module == "octavo" and "octavo" in allowed
    )


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in {package.name for package in PACKAGES}


def test_the_core_imports_no_plugin_and_no_kernel() -> None:
    wrong = [
        f"{where} imports {module}"
        for _, where, module in imports_of(CORE)
        if is_ours(module) and module.partition(".")[0] != "octavo"
    ]
    assert not wrong


def test_plugins_import_public_names_their_own_package_and_the_kernels() -> None:
    wrong = [
        f"{where} imports {module}"
        for package in PLUGINS
        for _, where, module in imports_of([package])
        if is_ours(module) and not belongs(module, PUBLIC | {package.name})
    ]
    assert not wrong


def test_triton_kernels_import_torch_and_triton_only() -> None:
    """So that they can be read, measured and reused on their own. Four files connect them to Octavo: what the
    plugin provides, what is measured of it, and the attention backends, which derive from Octavo's."""
    wrong = [
        f"{where} imports {module}"
        for file, where, module in imports_of([ROOT / "kernels" / "octavo_kernels"])
        if file.name not in {"plugin.py", "bench.py", "backend.py", "hopper_backend.py"}
        and module.partition(".")[0] not in {"torch", "triton", "octavo_kernels"} | sys.stdlib_module_names
    ]
    assert not wrong


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_engine_s_bookkeeping_runs_without_torch(module: str) -> None:
    program = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr


def test_importing_octavo_costs_nothing() -> None:
    program = "import sys, octavo; print([m for m in sys.modules if m.startswith('octavo.')])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_every_public_name_exists() -> None:
    import octavo

    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert set(octavo.__all__) <= set(dir(octavo))


def test_every_package_is_typed() -> None:
    assert [package.name for package in PACKAGES if not (package / "py.typed").is_file()] == []


def test_every_package_is_shipped_and_every_entry_point_leads_to_a_module() -> None:
    folders = {
        init.parent
        for top in ("core", "kernels", "plugins")
        for init in (ROOT / top).rglob("__init__.py")
        if not (init.parent.parent / "__init__.py").is_file()
    }
    assert folders == set(PACKAGES)
    modules = {package.name: package for package in PACKAGES}
    for target in PROJECT["project"]["entry-points"]["octavo.plugins"].values():
        package, _, module = target.partition(".")
        assert (modules[package] / f"{module}.py").is_file(), target


def test_the_version_stands_in_one_piece() -> None:
    import octavo

    assert octavo.__version__ == PROJECT["project"]["version"]
    assert f"## [{octavo.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
