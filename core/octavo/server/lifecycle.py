"""Listening, draining, leaving."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from octavo.server.service import Service

logger = logging.getLogger(__name__)


def serve(app: FastAPI, service: Service, host: str, port: int, log_level: str, announce: Callable[[str], None]) -> int:
    """Listen until told to stop. The first SIGTERM or SIGINT drains, the second leaves at once.

    ``announce`` is told the address once it answers. Returns the exit status.
    """
    config = uvicorn.Config(app, host, port, log_level="warning" if log_level == "info" else log_level)
    server = DrainingServer(config, service, announce)
    server.run()
    return 0 if server.started else 1


class DrainingServer(uvicorn.Server):
    """Keeps answering while running requests finish: new ones are refused with a reason instead of a closed door."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service = service
        self._announce = announce
        self._deadline: float | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

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
