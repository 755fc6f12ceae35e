"""The engine's process: ``python -m octavo.worker ADDRESS``. Started by :class:`octavo.client.ProcessClient`."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading

import msgspec
import zmq

from octavo.client import drive, failure
from octavo.config import EngineConfig
from octavo.messages import Command, StepOutputs, decode_command, encode
from octavo.plugins import PluginRecord


class Start(msgspec.Struct):
    """The first message: what the parent resolved."""

    config: EngineConfig
    manifest: tuple[PluginRecord, ...]


def main(address: str) -> int:
    """Build the engine, run it until told to stop, report a failure as the last message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's matter: it drains and then says so
    logging.basicConfig(level=os.environ.get("OCTAVO_LOG_LEVEL", "INFO"), format="%(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        socket.setsockopt(option, 0)
    socket.setsockopt(zmq.LINGER, 5000)
    socket.bind(address)
    try:
        _run(socket)
        return 0
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must learn it
        socket.send(encode(failure(error)))
        return 1
    finally:
        socket.close()
        context.term()


def _run(socket: zmq.Socket[bytes]) -> None:
    # imported here, so that the parent is told whatever goes wrong, and before the parent says what to build: torch is
    # the slowest part, and the parent finds that out meanwhile
    from octavo.plugins import PluginHost
    from octavo.startup import build_engine, reproduce

    start = msgspec.msgpack.decode(socket.recv(), type=Start)
    host = PluginHost.reproduce(start.manifest, prefer=start.config.prefer)
    engine = build_engine(reproduce(start.config, start.manifest, host))
    # what start-up made lives for ever: the collector need not look at it again and again
    gc.collect()
    gc.freeze()
    socket.send(encode(engine.info))

    def receive(timeout: float | None) -> list[Command]:
        commands: list[Command] = []
        if socket.poll(None if timeout is None else int(timeout * 1000)):
            commands.append(decode_command(socket.recv()))
            while socket.poll(0):
                commands.append(decode_command(socket.recv()))
        return commands

    def send(outputs: StepOutputs) -> None:
        socket.send(encode(outputs))

    drive(engine, receive, send)


def _leave_with_parent() -> None:
    """Standard input is a pipe that the parent holds: it ends when the parent does, however that happens.

    Read by its number: the stream object has a lock that must not be held when the interpreter ends.
    """
    while os.read(0, 1024):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
