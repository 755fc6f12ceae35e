"""``octavo bench kernels``: whatever can run, a plugin's kernels too, is timed and compared with float32."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.attention.torch_backend import TorchAttention
from octavo.bench.kernel_cases import OPERATIONS, Setting, cases, paged_batch
from octavo.bench.kernels import KernelBench, Result
from octavo.bench.timing import Ceilings, microseconds, relative_error
from octavo.cli import main
from octavo.errors import CheckpointError
from octavo.hooks import KernelProvider, Provider
from octavo.layers.activation import TorchSiluAndMul

CPU = torch.device("cpu")
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def setting(**config: Any) -> Setting:
    return Setting.from_config({**CONFIG, **config}, CPU, torch.float32, [1, 5], context_len=20)


def measured(operation: str, *providers: KernelProvider, backends: tuple[Provider, ...] = ()) -> list[list[Result]]:
    """By case: the results of core's implementations and of these."""
    host = SimpleNamespace(
        kernels=lambda: {provider.name: provider for provider in providers},
        attention_backends=lambda: {provider.name: provider for provider in backends},
        kernel_compilers=dict,
    )
    bench = KernelBench(host, CPU)
    return [bench.measure(case, floor=1.0) for case in cases(setting(), operation)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that are as short as can be."""
    monkeypatch.setattr("octavo.bench.timing.CPU_SECONDS", 0.0)
    monkeypatch.setattr("octavo.bench.kernel_cases.ROTATION_BYTES", {"cpu": 1})


@pytest.mark.usefixtures("quick")
def test_every_operation_is_measured_at_the_sizes_of_the_model(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    words = ["--device", "cpu", "--num-tokens", "1", "3", "--context-len", "20", "--dtype", "float32"]
    words += ["--plugins", "triton,no:cpu", "--save-result", str(file)]
    assert main(["bench", "kernels", str(tiny_llama), *words]) == 0
    out = capsys.readouterr().out
    assert "multiplies" in out
    assert "not run: triton-linear (linear): it needs a CUDA device, not 'cpu'" in out
    found = json.loads(file.read_text())["result"]["kernels"]
    assert {row["operation"] for row in found} == set(OPERATIONS)
    assert {row["kernel"] for row in found} == {"torch"}
    assert all(row["chosen"] and row["time"] > 0 and row["floor"] > 0 for row in found)
    assert [row for row in found if not row["error"] < 1e-5] == []
    sizes = [row["size"] for row in found if row["operation"] in ("linear", "attention")]
    assert "lm_head, 3" in sizes
    assert "3 x 1 of 20" in sizes
    assert "1 x 3 of 3" in sizes


class Doubling(TorchSiluAndMul):
    """Wrong by a factor of two."""

    def __call__(self, gate_up: Tensor) -> Tensor:
        return 2 * super().__call__(gate_up)


class Elsewhere(TorchSiluAndMul):
    @classmethod
    def missing(cls, need: object) -> list[str]:
        return ["it needs a device from elsewhere"]


@pytest.mark.usefixtures("quick")
def test_a_plugins_kernel_is_measured_and_its_error_seen() -> None:
    doubling = KernelProvider("doubling", Doubling, priority=10, operation="silu_and_mul")
    for results in measured("silu_and_mul", doubling):
        assert [(result.kernel, result.chosen) for result in results] == [("doubling", True), ("torch", False)]
        assert results[0].error == pytest.approx(1.0)
        assert results[1].error < 1e-6


@pytest.mark.usefixtures("quick")
def test_what_cannot_run_is_passed_over_with_its_reason() -> None:
    provider = KernelProvider("elsewhere", Elsewhere, priority=10, operation="silu_and_mul")
    host = SimpleNamespace(kernels=lambda: {"elsewhere": provider}, attention_backends=dict, kernel_compilers=dict)
    bench = KernelBench(host, CPU)
    for case in cases(setting(), "silu_and_mul"):
        assert [result.kernel for result in bench.measure(case, floor=1.0)] == ["torch"]
    assert list(bench.passed_over) == ["elsewhere (silu_and_mul): it needs a device from elsewhere"]


class Forgetful(TorchAttention):
    """Sees each row's own tokens only."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spec: Any, kv: Tensor, batch: Any, plan: Any) -> Tensor:
        return super().attend(query, key, value, spec, torch.zeros_like(kv), batch, plan)


@pytest.mark.usefixtures("quick")
def test_a_backend_that_forgets_its_cache_is_seen() -> None:
    results = measured("attention", backends=(Provider("forgetful", Forgetful, priority=10),))
    errors = {result.size: (result.kernel, result.error) for first, _ in results for result in [first]}
    assert errors["1 x 1 of 20"][0] == "forgetful"
    assert errors["1 x 1 of 20"][1] > 0.1
    assert errors["1 x 5 of 5"][1] < 1e-5, "a whole prompt needs no cache"
    assert all(right.error < 1e-5 for _, right in results)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_floors_count_what_must_move(operation: str) -> None:
    for case in cases(setting(), operation):
        assert case.num_bytes > 0
        assert (case.num_operations > 0) == (operation in ("linear", "attention"))


def test_a_product_reads_its_weights_once_and_multiplies_each_with_each_token() -> None:
    down = {case.size: case for case in cases(setting(), "linear")}["down, 5"]
    assert down.num_bytes == 4 * (48 * 32 + 5 * 48 + 5 * 32)
    assert down.num_operations == 2 * 5 * 48 * 32


def test_a_prompts_attention_is_causal() -> None:
    case = {case.size: case for case in cases(setting(), "attention")}["1 x 5 of 5"]
    assert case.num_operations == 4 * (1 + 2 + 3 + 4 + 5) * 32


def test_a_paged_batch_holds_each_token_in_a_place_of_its_own() -> None:
    batch = paged_batch(CPU, num_rows=3, query_len=4, context_len=37)
    assert sorted(batch.block_tables.flatten().tolist()) == list(range(9))
    assert len(set(batch.slots.tolist())) == batch.num_tokens == 12
    assert batch.positions.tolist() == [33, 34, 35, 36] * 3
    last = batch.block_tables[:, 36 // 16].long() * 16 + 36 % 16
    assert batch.slots.view(3, 4)[:, -1].tolist() == last.tolist()


def test_sizes_that_the_model_does_not_give_are_named() -> None:
    with pytest.raises(CheckpointError, match="no 'intermediate_size'"):
        setting(intermediate_size=None)
    assert setting(num_key_value_heads=None).num_kv_heads == 4
    assert setting(head_dim=16).linears["qkv"] == (32, (4 + 2 * 2) * 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--operations", "linear", "sorting"],
            "--operations sorting: there is no such benchmark; there are: rms_norm,",
        ),
        (["--num-tokens", "4", "0"], "--num-tokens must be at least 1, not 0"),
        (["--context-len", "0"], "--context-len must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], said: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", str(tiny_llama), "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_times_are_those_of_one_call() -> None:
    assert 2000 <= microseconds(CPU, [lambda: time.sleep(0.002)] * 3, repeats=1) < 20000


def test_the_floor_is_the_slower_of_moving_and_multiplying() -> None:
    ceilings = Ceilings(bytes_per_us=10.0, flops_per_us=100.0)
    assert ceilings.floor(50.0) == 5.0
    assert ceilings.floor(50.0, 1000.0) == 10.0


def test_errors_are_relative_to_what_is_right() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
