"""Listening, draining, leaving."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from octavo.errors import ConfigError
from octavo.server.service import Service

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5  # how long clients may take to read the end of their answers when the server leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where the server listens, and how it talks there."""

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: str | None = None  # listen here instead
    root_path: str = ""  # where a proxy shows this server
    certificate: str | None = None
    private_key: str | None = None

    def bind(self) -> socket.socket:
        """Take the address: before the model loads, so that a mistake shows at once.

        Raises:
            ConfigError: somebody else has it, or there is no such address.
        """
        if self.unix_socket is not None:
            return _bind_unix(self.unix_socket)
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            taken = socket.socket(family, kind, protocol)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self.host} port {self.port}: {error.strerror}; choose with --host and --port"
            ) from error
        return taken

    def url(self, taken: socket.socket) -> str:
        """The address that clients use."""
        if self.unix_socket is not None:
            return f"http://localhost{self.root_path}"
        host, port = taken.getsockname()[:2]
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self.root_path}"


def serve(app: FastAPI, service: Service, listen: ListenConfig, taken: socket.socket, ready: Callable[[], None]) -> int:
    """Answer on the socket until told to stop. The first SIGTERM or SIGINT drains, the second leaves at once.

    ``ready`` is called once the server answers. Returns the exit status.
    """
    server = DrainingServer(uvicorn_config(app, listen), service, ready)
    server.run(sockets=[taken])
    return 0 if server.started else 1


def uvicorn_config(app: FastAPI, listen: ListenConfig) -> uvicorn.Config:
    """How uvicorn talks; it logs only what goes wrong."""
    return uvicorn.Config(
        app,
        root_path=listen.root_path,
        ssl_certfile=listen.certificate,
        ssl_keyfile=listen.private_key,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """Keeps answering while running requests finish: new ones are refused with a reason instead of a closed door."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # what start-up made lives for ever: the collector need not look at it again and again
            gc.collect()
            gc.freeze()
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal arrived."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.config.drain_timeout
        logger.info("shutting down: %d requests may finish", self._service.frontend.num_open)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; true ends the server."""
        if self._deadline is not None:
            if self._service.frontend.num_open == 0:
                self.should_exit = True
            elif time.monotonic() >= self._deadline:
                logger.warning("aborting %d requests: the drain time is over", self._service.frontend.num_open)
                self._service.frontend.abort_all()
                await asyncio.sleep(0.2)  # the last chunks leave
                self.should_exit = True
        return await super().on_tick(counter)


def _bind_unix(path: str) -> socket.socket:
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            _remove_stale(path)
        taken.bind(path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror}; choose another with --uds") from error
    return taken


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that is gone."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigError(f"{path} exists and is no socket; choose another with --uds")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    else:
        raise ConfigError(f"another server listens on {path}; choose another with --uds")
    finally:
        probe.close()
