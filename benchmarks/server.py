"""The server at full rate: ``python benchmarks/server.py api`` here, ``python benchmarks/server.py rates`` on a GPU.

``api`` measures the API process alone: an engine that computes nothing hands out tokens at a given rate to many
streams at once, and what counts is the CPU time of the process that turns them into text and HTTP.

``rates`` starts ``octavo serve`` over a model with the shape of Llama-3.1-8B and random weights, and loads it from
processes of its own on the same machine with the trace: Poisson arrivals at several rates, then everything at once.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.bench import client, metrics, report
from octavo.bench.arrivals import arrival_times
from octavo.bench.datasets import BenchRequest, trace_requests

TRACE = Path(__file__).parent / "traces" / "sharegpt_like.json"
VOCAB_SIZE = 128256


# --- a tokenizer that needs no network -------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of invented words: decoding costs what it costs with a real one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    generator = random.Random(0)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < VOCAB_SIZE - 2:
        word = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 7)))
        words["Ġ" + word if generator.random() < 0.6 else word] = None
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>").save_pretrained(folder)


# --- the API process over an engine that computes nothing ------------------------------------------------------------


def idle_engine(address: str, num_rows: int, steps_per_second: float) -> None:
    """The other end of a ProcessClient: every running sequence gets a token in each step."""
    import zmq

    from octavo.messages import (
        EngineInfo,
        SequenceOutput,
        StepOutputs,
        StepStats,
        Submit,
        Timing,
        decode_command,
        encode,
    )
    from octavo.request import FinishReason

    engine_socket = zmq.Context().socket(zmq.PAIR)
    engine_socket.set_hwm(0)
    engine_socket.bind(address)
    engine_socket.recv()
    engine_socket.send(
        encode(EngineInfo("m", "M", "none", "none", VOCAB_SIZE, 16384, 9999, 16, num_rows, 8192, "none", 0))
    )
    submits: list[Submit] = []
    running: dict[str, tuple[Submit, int]] = {}
    generator, due = random.Random(0), time.perf_counter()
    while True:
        while engine_socket.poll(0 if running or submits else 1000):
            command = decode_command(engine_socket.recv())
            if isinstance(command, Submit):
                submits.append(command)
        while submits and len(running) < num_rows:
            submit = submits.pop(0)
            running[submit.request_id] = (submit, 0)
        outputs = []
        for name, (submit, count) in list(running.items()):
            output = SequenceOutput(name, 0, [generator.randrange(300, VOCAB_SIZE - 2)])
            running[name] = (submit, count + 1)
            if count + 1 == submit.params.max_tokens:
                del running[name]
                output.finish_reason = FinishReason.LENGTH
                output.timing = Timing(submit.arrival, submit.arrival, submit.arrival, time.monotonic())
            outputs.append(output)
        if outputs:
            stats = StepStats(len(running), len(submits), 9999, 9999, 0, len(outputs))
            engine_socket.send(encode(StepOutputs(outputs, stats)))
        due = max(due + 1.0 / steps_per_second, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))


def api(folder: Path, port: int, engine: Sequence[str], profile: Path | None) -> None:
    """What ``octavo serve`` runs in its first process, with the idle engine behind it."""
    import cProfile

    from transformers import AutoTokenizer

    from octavo.client import ProcessClient
    from octavo.server.app import create_app
    from octavo.server.lifecycle import ListenConfig, serve
    from octavo.server.service import ServerConfig, Service
    from octavo.text import TextProcessor

    class IdleClient(ProcessClient):
        def _start_child(self) -> subprocess.Popen[bytes]:
            self._socket.send(b"start")
            return subprocess.Popen([sys.executable, __file__, "engine", self._address, *engine], stdin=subprocess.PIPE)

    text = TextProcessor(AutoTokenizer.from_pretrained(folder), VOCAB_SIZE, eos_token_ids=[])
    service = Service(IdleClient(None), text, ServerConfig(model_names=("m",)))  # type: ignore[arg-type]
    service.frontend.start()
    listen = ListenConfig(port=port)
    profiler = cProfile.Profile() if profile is not None else None
    if profiler is not None:
        profiler.enable()
    with listen.bind() as taken:
        serve(create_app(service), service, listen, taken, lambda: print("ready", flush=True))
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(profile)
    service.client._child.kill()  # type: ignore[attr-defined]
    os._exit(0)


def cpu_seconds(process_id: int) -> float:
    """User and system time of a process with all its threads."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_api(args: argparse.Namespace) -> dict[str, Any]:
    """Stream to many at once and report CPU time per token."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        write_tokenizer(folder)
        command = [sys.executable, __file__, "api-process", str(folder), str(port), str(args.streams), str(args.steps)]
        command += [str(args.profile)] if args.profile else []
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        assert server.stdout.readline().strip() == "ready"
        requests = [BenchRequest(200, args.tokens, [300 + i % 1000] * 200) for i in range(args.streams)]
        target = client.Target(f"http://127.0.0.1:{port}", model="m", ignore_eos=True)
        load([target, requests[:8], [0.0] * 8], 1)
        before = cpu_seconds(server.pid)
        client_before = sum(os.times()[:4])
        results, seconds = load([target, requests, [0.0] * len(requests)], args.clients)
        spent, client_spent = cpu_seconds(server.pid) - before, sum(os.times()[:4]) - client_before
        server.send_signal(signal.SIGTERM)
        server.wait()
    failed = [result.error for result in results if not result.completed]
    assert not failed, failed[0]
    num_tokens = sum(result.num_output_tokens for result in results)
    num_chunks = sum(len(result.chunk_times) for result in results)
    figures = {
        "streams": args.streams,
        "tokens": num_tokens,
        "chunks": num_chunks,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "api_cpu_seconds": spent,
        "api_cpu_us_per_token": spent / num_tokens * 1e6,
        "api_core_share_at_12000_per_second": spent / num_tokens * 12000,
        "client_cpu_us_per_token": client_spent / num_tokens * 1e6,
    }
    for name, value in figures.items():
        print(f"{name:<36}{value:12.4g}")
    return figures


# --- load ------------------------------------------------------------------------------------------------------------


def load(work: Sequence[Any], num_processes: int) -> tuple[list[metrics.RequestResult], float]:
    """Send (target, requests, arrivals) from several processes, which begin together: results in order, seconds."""
    target, requests, arrivals = work
    shares = [range(i, len(requests), num_processes) for i in range(num_processes)]
    begin = time.perf_counter() + 0.5 + 0.2 * num_processes
    jobs = [(target, [requests[i] for i in share], [arrivals[i] for i in share], begin) for share in shares]
    results: list[metrics.RequestResult] = [metrics.RequestResult(0, 0.0)] * len(requests)
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for share, found in zip(shares, pool.map(_send, jobs), strict=True):
            for index, result in zip(share, found, strict=True):
                results[index] = result
    return results, max(result.ended_at for result in results) - begin


def _send(job: tuple[client.Target, list[BenchRequest], list[float], float]) -> list[metrics.RequestResult]:
    target, requests, arrivals, begin = job

    async def send() -> list[metrics.RequestResult]:
        await asyncio.sleep(max(0.0, begin - time.perf_counter()))
        return (await client.drive(target, requests, arrivals))[0]

    found: list[metrics.RequestResult] = client.run_loop(send())
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- octavo serve on a GPU -------------------------------------------------------------------------------------------

# vLLM 0.26: TTFT p50, p99, ITL p50, p99 in ms, output tokens per second
RATES: dict[float, tuple[float, float, float, float, float]] = {
    10: (20.0, 51.9, 5.2, 11.5, 1763),
    20: (22.6, 50.2, 5.5, 19.4, 3153),
    40: (30.8, 65.5, 6.4, 22.5, 6421),
    float("inf"): (5348, 12860, 15.4, 45.1, 10314),
}


@contextmanager
def octavo_serve(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A server over random weights: its address and process id."""
    from gpu import LLAMA_8B

    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "octavo", "serve", str(folder), "--load-format", "dummy", "--port", str(port)]
    begin = time.perf_counter()
    log = folder / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        while not re.search("listening on", log.read_text()):
            if server.poll() is not None or time.perf_counter() - begin > 120:
                sys.exit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        print(f"server ready after {time.perf_counter() - begin:.1f} s", flush=True)
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        print("".join(line for line in log.read_text().splitlines(True) if "ready:" in line or "WARN" in line))


def measure_rates(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of rates beside vLLM's."""
    rows = []
    print(f"{'':<12}{'TTFT p50':>10}{'p99':>8}{'ITL p50':>9}{'p99':>8}{'tok/s':>9}{'API core':>10}")
    with (
        tempfile.TemporaryDirectory() as name,
        octavo_serve(Path(name), "--max-model-len", "16384", "--max-num-seqs", str(args.max_num_seqs)) as (
            url,
            process,
        ),
    ):
        target = client.Target(url, model=Path(name).name, ignore_eos=True)
        for rate in args.rates:
            count = args.num_all_at_once if rate == float("inf") else min(args.num_requests, int(rate * args.seconds))
            warmups = trace_requests(TRACE, 32, vocab_size=VOCAB_SIZE, salt=99)
            if not rows:
                load([target, warmups, [0.0] * 32], 1)
            requests = trace_requests(TRACE, count, vocab_size=VOCAB_SIZE, salt=len(rows))
            before = cpu_seconds(process)
            results, seconds = load([target, requests, arrival_times(count, rate, 1.0, 0)], args.clients)
            share = (cpu_seconds(process) - before) / seconds
            summary = metrics.summarize(results, seconds, percentiles=(50, 99), metrics=("ttft", "itl"), objectives={})
            figures = (
                *(summary[kind][f"p{percentile}_ms"] for kind in ("ttft", "itl") for percentile in (50, 99)),
                summary["output_throughput"],
            )
            for label, values in ((f"{rate:g} req/s", figures), ("  vLLM 0.26", RATES[rate])):
                print(
                    f"{label:<12}{values[0]:>10.1f}{values[1]:>8.1f}{values[2]:>9.2f}{values[3]:>8.1f}{values[4]:>9.0f}",
                    end="",
                )
                print(f"{share:>10.0%}" if values is figures else "", flush=True)
            rows.append({"rate": str(rate), "requests": count, "api_core_share": share, **summary})
    return rows


def main() -> None:
    """One of the two measurements; the other parts are processes of these."""
    if sys.argv[1:2] == ["engine"]:
        idle_engine(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
        return
    if sys.argv[1:2] == ["api-process"]:
        folder, port, rows, steps, *profile = sys.argv[2:]
        api(Path(folder), int(port), (rows, steps), Path(profile[0]) if profile else None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("api", "rates"))
    parser.add_argument("--clients", type=int, default=1, help="processes that send (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=256, help="api: at once (default: %(default)s)")
    parser.add_argument("--steps", type=float, default=50, help="api: of the engine, a second (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="api: for each stream (default: %(default)s)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="api: profile the event loop's thread")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="rates: requests a second")
    parser.add_argument("--num-requests", type=int, default=300, help="rates: at most, for each rate")
    parser.add_argument("--seconds", type=float, default=20, help="rates: at most, for each rate")
    parser.add_argument("--num-all-at-once", type=int, default=1000, help="rates: requests that come all at once")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="rates: of the server")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every figure as JSON")
    args = parser.parse_args()
    result = {"api": measure_api(args)} if args.part == "api" else {"rates": measure_rates(args)}
    if args.save is not None:
        arguments = {name: value for name, value in vars(args).items() if name != "save"}
        arguments["rates"] = [f"{rate:g}" for rate in args.rates]  # infinity is no JSON
        report.save(args.save, f"benchmarks/server.py {args.part}", arguments, result)


if __name__ == "__main__":
    main()
