"""What the server adds to the engine: the same streams through HTTP and without it, on one CPU thread each.

    OMP_NUM_THREADS=1 python benchmarks/server_path.py --model FOLDER

The engine is driven in this process, then by ``octavo serve`` in its own two, in turn, with the same requests. CPU
seconds are those of each process: the client's own work does not count, and a shared machine matters little.
``engine with the server / alone`` is what talking to a server costs the engine's process; the API's process (HTTP,
detokenizing) works beside it, on another core where there is one. The median of --repeats is taken of everything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from cpu import Octavo, commit, hardware, versions

MAX_NUM_SEQS = 64  # as in cpu.py


class Server:
    """``octavo serve`` as a user starts it."""

    def __init__(self, model: Path, dtype: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        options = ["--dtype", dtype, "--device", "cpu", "--threads", "1", "--max-model-len", "2048"]
        options += ["--max-num-seqs", str(MAX_NUM_SEQS), "--no-enable-prefix-caching", "--log-level", "warning"]
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", str(self.port), *options]
        self._process = subprocess.Popen(command)

    def wait(self) -> None:
        """Until it answers."""
        while True:
            if self._process.poll() is not None:
                raise RuntimeError("the server did not start; see its output above")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if b" 200 " in connection.recv(64):
                    break
            time.sleep(0.2)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.processes = {"API": self._process.pid, "engine": int(children[0])}

    def cpu_seconds(self) -> dict[str, float]:
        """What each process has spent so far, all threads together."""
        return {name: _cpu_seconds(process) for name, process in self.processes.items()}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(model: Path, dtype: str) -> Iterator[Server]:
    server = Server(model, dtype)
    try:
        server.wait()
        yield server
    finally:
        server.close()


async def _stream(port: int, prompt: Sequence[int], num_tokens: int) -> int:
    """One streamed completion; how many events it had."""
    settings = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps(settings).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    if b"data: [DONE]" not in answer:
        raise RuntimeError(f"a stream broke: {answer[-500:]!r}")
    return answer.count(b"data: ") - 1


async def _streams(port: int, prompts: Sequence[Sequence[int]], num_tokens: int) -> int:
    return sum(await asyncio.gather(*(_stream(port, prompt, num_tokens) for prompt in prompts)))


def through_the_server(server: Server, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, float]:
    """CPU seconds of each process, and the wall clock's."""
    before, started = server.cpu_seconds(), time.perf_counter()
    asyncio.run(_streams(server.port, prompts, num_tokens))
    wall = time.perf_counter() - started
    return {**{name: seconds - before[name] for name, seconds in server.cpu_seconds().items()}, "wall": wall}


def alone(engine: Octavo, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, float]:
    """The same of the engine in this process."""
    before, started = time.process_time(), time.perf_counter()
    engine.run(prompts, num_tokens)
    return {"engine": time.process_time() - before, "wall": time.perf_counter() - started}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint with its tokenizer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    engine = Octavo(arguments.model, arguments.dtype, dummy=False)
    rounds: list[dict[str, dict[str, float]]] = []
    with serving(arguments.model, arguments.dtype) as server:
        for repeat in range(-1, arguments.repeats):  # the first of each is not counted
            shape = (arguments.streams, arguments.prompt_len)
            prompts: list[list[int]] = torch.randint(1000, 40000, shape, generator=generator).tolist()
            both = {
                "alone": alone(engine, prompts, arguments.output_len),
                "served": through_the_server(server, prompts, arguments.output_len),
            }
            if repeat >= 0:
                rounds.append(both)
                print(f"{repeat + 1}/{arguments.repeats}", both, file=sys.stderr)

    def median(where: str, what: str) -> float:
        return statistics.median(one[where][what] for one in rounds)

    num_tokens = arguments.streams * arguments.output_len
    results = {
        "engine alone, CPU seconds": median("alone", "engine"),
        "engine with the server, CPU seconds": median("served", "engine"),
        "API process, CPU seconds": median("served", "API"),
        "engine with the server / alone": statistics.median(
            one["served"]["engine"] / one["alone"]["engine"] for one in rounds
        ),
        "API process / engine alone": statistics.median(
            one["served"]["API"] / one["alone"]["engine"] for one in rounds
        ),
        "tokens per second of wall clock, alone": num_tokens / median("alone", "wall"),
        "tokens per second of wall clock, served": num_tokens / median("served", "wall"),
    }
    for name, value in results.items():
        print(f"{name:45}{value:10.3f}")
    if arguments.output is not None:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
            "model": arguments.model.name,
            "settings": {
                key: getattr(arguments, key) for key in ("dtype", "streams", "prompt_len", "output_len", "repeats")
            },
            "results": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
