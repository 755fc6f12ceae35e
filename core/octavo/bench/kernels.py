"""``octavo bench kernels``: each kernel against its reference, and against what the device can do at best."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.bench import report
from octavo.cli.options import add_engine_arguments, engine_config
from octavo.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from octavo.bench.kernel_cases import Case, Setting
    from octavo.hooks import Provider
    from octavo.plugins import PluginHost

ENGINE_FIELDS = ("revision", "dtype", "device", "hf_overrides", "num_threads", "plugins", "prefer")
NUM_TOKENS = {"cuda": (1, 8, 32, 256, 2048), "cpu": (1, 8, 64)}
LEGEND = """\
*: what the engine would choose
µs: median; on a GPU a CUDA graph is replayed; weights, caches and logits lie in none of the device's caches
floor: bytes over the bandwidth or operations over the rate above, whichever is more
error: ‖result - float32‖ / ‖float32‖; of sample, the share of rows with another token than torch's"""


@dataclass(frozen=True, slots=True)
class Result:
    """One kernel at one size; times in microseconds."""

    operation: str
    size: str
    kernel: str
    chosen: bool  # by the engine, unless told otherwise
    time: float
    floor: float
    error: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes, the device and which kernels."""
    add_engine_arguments(parser, ENGINE_FIELDS)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--operations", nargs="+", metavar="NAME", help="such as linear and attention (default: all)")
    group.add_argument(
        "--num-tokens",
        nargs="+",
        type=int,
        metavar="N",
        help=f"tokens in a step (default: {_words(NUM_TOKENS['cuda'])} on a GPU, {_words(NUM_TOKENS['cpu'])} on a CPU)",
    )
    group.add_argument("--context-len", type=int, default=1024, metavar="N", help="of decodes (default: 1024)")
    group.add_argument("--save-result", type=Path, metavar="FILE", help="write every figure as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status.

    Raises:
        ConfigError: a value can never work, or the model's configuration lacks a size.
    """
    import torch

    from octavo.bench import kernel_cases
    from octavo.bench.timing import Ceilings
    from octavo.loader import choose_dtype
    from octavo.startup import choose_device, resolve, set_num_threads

    config = replace(engine_config(args), load_format="dummy")  # of the model, only the sizes are needed
    device = choose_device(config.device)
    num_tokens = args.num_tokens or NUM_TOKENS[device.type]
    for name, value in (("num-tokens", min(num_tokens)), ("context-len", args.context_len)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}")
    resolved = resolve(config)
    benchmarks: dict[str, Callable[[Setting], Iterable[Case]]] = {
        operation: partial(kernel_cases.cases, operation=operation) for operation in kernel_cases.OPERATIONS
    }
    benchmarks |= {name: provider.resolve() for name, provider in resolved.host.kernel_benchmarks().items()}
    unknown = [name for name in args.operations or () if name not in benchmarks]
    if unknown:
        raise ConfigError(f"--operations {unknown[0]}: there is no such benchmark; there are: {', '.join(benchmarks)}")
    set_num_threads(config, device)
    dtype = choose_dtype(resolved.model_config, config.dtype, device)
    setting = kernel_cases.Setting.from_config(resolved.model_config, device, dtype, num_tokens, args.context_len)
    torch.manual_seed(0)
    ceilings = Ceilings.measure(device, dtype)
    print(f"{config.model} on {device} in {str(dtype).removeprefix('torch.')}")
    print(f"reads {ceilings.bytes_per_us / 1e3:.1f} GB/s, multiplies {ceilings.flops_per_us / 1e6:.2f} TFLOP/s\n")
    print(f"{'operation':14}{'size':22}{'kernel':26}{'µs':>12}{'floor':>12}{'of floor':>10}{'error':>10}")
    bench = KernelBench(resolved.host, device)
    results: list[Result] = []
    with torch.inference_mode():
        for operation in args.operations or benchmarks:
            bench.compile(benchmarks[operation](setting))
            for case in benchmarks[operation](setting):
                for result in bench.measure(case, ceilings.floor(case.num_bytes, case.num_operations)):
                    results.append(result)
                    print(row(result), flush=True)
    print(f"\n{LEGEND}")
    for reason in bench.passed_over:
        print(f"not run: {reason}")
    if args.save_result is not None:
        arguments = {name: value for name, value in vars(args).items() if name not in ("start", "debug")}
        figures = {
            "ceilings": asdict(ceilings),
            "unit": "microseconds",
            "kernels": [asdict(result) for result in results],
            "passed_over": list(bench.passed_over),
        }
        report.save(args.save_result, "bench kernels", arguments, figures)
        print(f"wrote {args.save_result}")
    return 0


def row(result: Result) -> str:
    """A line of the table."""
    kernel = result.kernel + (" *" if result.chosen else "")
    return (
        f"{result.operation:14}{result.size:22}{kernel:26}{result.time:12.1f}{result.floor:12.1f}"
        f"{result.floor / result.time:10.0%}{result.error:10.1e}"
    )


class KernelBench:
    """Runs cases with every implementation that core and plugins provide and that can serve them."""

    def __init__(self, host: PluginHost, device: torch.device) -> None:
        from octavo.attention.registry import REFERENCE
        from octavo.bench.kernel_cases import ATTENTION
        from octavo.startup import BUILTIN_KERNELS, make_compilers

        self._compilers = make_compilers(host, device, None)
        self._device = device
        self._providers: dict[str, list[Provider]] = {ATTENTION: [REFERENCE, *host.attention_backends().values()]}
        for provider in [*BUILTIN_KERNELS, *host.kernels().values()]:
            self._providers.setdefault(provider.operation, []).append(provider)
        self.passed_over: dict[str, None] = {}  # kernels with the reasons, in order

    def compile(self, cases: Iterable[Case]) -> None:
        """Have what these cases launch compiled side by side, where there is something to compile."""
        if not self._compilers:
            return
        with ExitStack() as stack:
            for compiler in self._compilers:
                stack.enter_context(compiler)
            for case in cases:
                for _, implementation in self._implementations(case):
                    case.prepare(implementation).calls[0]()

    def measure(self, case: Case, floor: float) -> list[Result]:
        """A result for each implementation, the one that the engine would choose first."""
        from octavo.bench.timing import microseconds

        results: list[Result] = []
        for name, implementation in self._implementations(case):
            prepared = case.prepare(implementation)
            error = prepared.error()
            time = microseconds(self._device, prepared.calls)
            results.append(Result(case.operation, case.size, name, not results, time, floor, error))
        return results

    def _implementations(self, case: Case) -> list[tuple[str, Any]]:
        """Names and classes, highest priority first; the others are noted."""
        found = []
        for provider in sorted(self._providers.get(case.operation, ()), key=lambda provider: -provider.priority):
            lacking = provider.lacking()
            if not lacking:
                implementation = provider.resolve()
                lacking = implementation.missing(case.need)
                if not lacking:
                    found.append((provider.name, implementation))
                    continue
            self.passed_over[f"{provider.name} ({case.operation}): {'; '.join(lacking)}"] = None
        return found


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
