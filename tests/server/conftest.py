"""A real server in this process: uvicorn in a thread, the engine in another, a tiny random model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from octavo.client import EngineClient, ThreadClient
from octavo.config import EngineConfig
from octavo.hooks import RouteProvider
from octavo.outputs import RequestSummary
from octavo.server.app import create_app
from octavo.server.service import ServerConfig, Service
from octavo.startup import make_text, resolve
from octavo.text import TextProcessor


class RunningServer:
    """A server that answers, and its parts."""

    def __init__(self, url: str, service: Service) -> None:
        self.url = url
        self.service = service
        self.http = httpx.Client(base_url=url, timeout=60.0)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60.0)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def refused(self, path: str, body: object, status: int = 400) -> dict[str, object]:
        """The error of a request that must be refused; the server must be well afterwards."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error: dict[str, object] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert self.http.get("/health").status_code == 200
        return error

    def wait_idle(self) -> None:
        deadline = time.monotonic() + 10.0
        client = self.service.client
        while self.service.frontend.num_open or client.stats.num_running or client.stats.num_waiting:
            assert time.monotonic() < deadline, "requests are left running"
            time.sleep(0.01)


@contextmanager
def running(model: Path, *, engine: dict[str, object] | None = None, **options: object) -> Iterator[RunningServer]:
    """A server over a real engine in a thread."""
    config = EngineConfig(model=str(model), dtype="float32", num_threads=1, cpu_kv_cache_gib=0.05, **(engine or {}))
    resolved = resolve(config)
    with listening(ThreadClient(resolved), make_text(resolved), **options) as server:
        yield server


@contextmanager
def listening(
    client: EngineClient,
    text: TextProcessor,
    routes: Iterable[tuple[str, RouteProvider]] = (),
    on_finished: Callable[[RequestSummary], None] | None = None,
    **options: object,
) -> Iterator[RunningServer]:
    """A server over any engine; ``options`` are fields of ServerConfig."""
    service = Service(client, text, ServerConfig(**{"model_names": ("tiny",), **options}), on_finished=on_finished)
    service.frontend.start()
    config = uvicorn.Config(create_app(service, routes), "127.0.0.1", 0, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    made = RunningServer(f"http://127.0.0.1:{port}", service)
    try:
        yield made
    finally:
        made.http.close()
        server.should_exit = True
        thread.join()
        client.close()


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[RunningServer]:
    with running(tiny_llama) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()
