"""How a program talks to an engine: in a thread of its own process, or in a child process over a Unix socket."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from octavo.errors import ConfigError, EngineDead, OctavoError
from octavo.messages import (
    Abort,
    Command,
    EngineFailed,
    EngineInfo,
    Shutdown,
    StepOutputs,
    StepStats,
    Submit,
    decode_event,
    encode,
)

if TYPE_CHECKING:
    from octavo.engine import Engine, InFlight
    from octavo.startup import Resolved

logger = logging.getLogger(__name__)

OutputsCallback = Callable[[StepOutputs], None]
DeathCallback = Callable[[EngineDead], None]


class EngineClient(Protocol):
    """One engine, wherever it runs. Callbacks run in the client's own receiving thread, one at a time."""

    info: EngineInfo  # after start()
    stats: StepStats  # the latest
    dead: EngineDead | None

    def start(self, on_outputs: OutputsCallback, on_death: DeathCallback) -> None:
        """Build the engine and wait until it is ready. Raises ConfigError when it cannot be built."""
        ...

    def submit(self, submit: Submit) -> None:
        """Raises EngineDead. What the engine refuses comes back as an output with FinishReason.ERROR."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request or one sample; does nothing when the engine is dead or the id unknown."""
        ...

    def close(self, drain: float = 0.0) -> None:
        """Stop the engine; leave running requests ``drain`` seconds to finish. May be called more than once."""
        ...


def drive(engine: Engine, receive: Callable[[float | None], list[Command]], send: OutputsCallback) -> None:
    """The engine's loop, until it is told to shut down.

    ``receive(timeout)`` returns the commands that have arrived, waiting for the first at most ``timeout`` seconds
    (None: for ever). With overlap the next step is launched before the last one is settled, but not earlier than the
    device needs it: a request that arrives in time joins it.
    """
    in_flight: InFlight | None = None
    deadline: float | None = None
    while True:
        idle = in_flight is None and not engine.has_work
        if deadline is not None and (idle or time.monotonic() >= deadline):
            return
        for command in receive(None if idle else engine.patience(in_flight)):
            if isinstance(command, Submit):
                engine.submit(command)
            elif isinstance(command, Abort):
                engine.abort(command)
            else:
                deadline = time.monotonic() + command.drain
        launched = engine.launch()
        if in_flight is not None or (launched is None and engine.has_work):
            send(engine.settle(in_flight))
        in_flight = launched
        if in_flight is not None and not engine.overlap:
            send(engine.settle(in_flight))
            in_flight = None


class ThreadClient:
    """The engine in a thread of this process: for scripts, tests and notebooks."""

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.stats = StepStats()
        self.dead: EngineDead | None = None

    def start(self, on_outputs: OutputsCallback, on_death: DeathCallback) -> None:
        from octavo.startup import build_engine

        engine = build_engine(self._resolved)
        self.info = engine.info
        # the thread's own: its memory comes back when the thread ends
        self._thread = threading.Thread(
            target=self._run, args=(engine, on_outputs, on_death), name="octavo-engine", daemon=True
        )
        self._thread.start()

    def submit(self, submit: Submit) -> None:
        if self.dead is not None:
            raise EngineDead(str(self.dead))
        self._commands.put(submit)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._commands.put(Abort(request_id, index))

    def close(self, drain: float = 0.0) -> None:
        self._commands.put(Shutdown(drain))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=drain + 10.0)

    def _run(self, engine: Engine, on_outputs: OutputsCallback, on_death: DeathCallback) -> None:
        def send(outputs: StepOutputs) -> None:
            self.stats = outputs.stats
            on_outputs(outputs)

        try:
            drive(engine, self._receive, send)
            self.dead = EngineDead("the engine was shut down")
        except Exception as error:
            logger.exception("the engine failed")
            self.dead = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
        on_death(self.dead)

    def _receive(self, timeout: float | None) -> list[Command]:
        commands: list[Command] = []
        with contextlib.suppress(queue.Empty):
            commands.append(self._commands.get(timeout != 0.0, timeout or None))
            while True:
                commands.append(self._commands.get_nowait())
        return commands


class ProcessClient:
    """The engine in a child process: its Python shares no lock with HTTP and detokenizing.

    The child holds the other end of two things: the socket, and a pipe that closes when this process dies.
    """

    STOP_SECONDS = 10.0  # how long a child may take to stop after its drain time before it is killed

    def __init__(self, resolved: Resolved | None = None) -> None:
        """``resolved`` is what the child builds; without it, :meth:`build` says so later."""
        self._lock = threading.Lock()  # guards the outbox, and that nothing is sent once ``dead`` is set
        self._closing = False
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self.stats = StepStats()
        self.dead: EngineDead | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="octavo-")
        self._context = zmq.Context()
        self._address = f"ipc://{self._folder.name}/engine"
        self._socket = self._make_socket(zmq.PAIR)
        # a connected socket takes messages at once and keeps them, whether the child listens, starts or is dead
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._socket.connect(self._address)
        # a zmq socket belongs to one thread: others hand their messages to it through this pair
        self._inbox = self._make_socket(zmq.PULL)
        self._inbox.bind("inproc://commands")
        self._outbox = self._make_socket(zmq.PUSH)
        self._outbox.connect("inproc://commands")
        if resolved is not None:
            self.build(resolved)

    def launch(self) -> None:
        """Start the child and return at once; :meth:`start` waits for it. May be called more than once."""
        if self._child is None:
            self._child = self._start_child()

    def build(self, resolved: Resolved) -> None:
        """Tell the child, started or not, what to build."""
        self._socket.send(msgspec.msgpack.encode({"config": resolved.config, "manifest": resolved.manifest}))

    def start(self, on_outputs: OutputsCallback, on_death: DeathCallback) -> None:
        self.launch()
        child = self._child
        assert child is not None
        while True:
            event = self._receive(0.2)
            if isinstance(event, EngineInfo):
                self.info = event
                break
            if isinstance(event, EngineFailed):
                self.close()
                if not event.traceback:
                    raise ConfigError(event.cause)
                logger.error("the engine failed to start:\n%s", event.traceback)
                raise EngineDead(f"the engine failed to start: {event.cause}")
            if event is None and child.poll() is not None:
                self.close()
                raise EngineDead(
                    f"the engine process ended with {_exit(child.returncode)} before it was ready; see its output above"
                )
        self._thread = threading.Thread(
            target=self._run, args=(child, on_outputs, on_death), name="octavo-client", daemon=True
        )
        self._thread.start()

    def submit(self, submit: Submit) -> None:
        with self._lock:
            if self.dead is not None:
                raise EngineDead(str(self.dead))
            self._outbox.send(encode(submit))

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._send_if_alive(Abort(request_id, index))

    def close(self, drain: float = 0.0) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
        child, thread = self._child, self._thread
        if child is not None:
            if thread is None:
                child.terminate()  # still starting: it does not listen
            self._send_if_alive(Shutdown(drain))
            try:
                child.wait(timeout=drain + self.STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdin is not None:
                child.stdin.close()
        if thread is None:
            self._close_sockets()
        elif thread is not threading.current_thread():
            thread.join(timeout=self.STOP_SECONDS)
        self._folder.cleanup()

    @property
    def process_id(self) -> int:
        """The child's."""
        assert self._child is not None, "the engine was not started"
        return self._child.pid

    def _make_socket(self, kind: int) -> zmq.Socket[bytes]:
        """Queues have no limit: the engine refuses what is too much, with a reason."""
        socket = self._context.socket(kind)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        return socket

    def _close_sockets(self) -> None:
        for socket in (self._socket, self._inbox, self._outbox):
            socket.close()
        self._context.term()

    def _start_child(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve everybody else on small machines
        return subprocess.Popen(
            [sys.executable, "-m", "octavo.worker", self._address], stdin=subprocess.PIPE, env=environment
        )

    def _send_if_alive(self, command: Command) -> None:
        with self._lock:
            if self.dead is None:
                self._outbox.send(encode(command))

    def _receive(self, timeout: float) -> StepOutputs | EngineInfo | EngineFailed | None:
        if self._socket.poll(int(timeout * 1000)):
            return decode_event(self._socket.recv())
        return None

    def _run(self, child: subprocess.Popen[bytes], on_outputs: OutputsCallback, on_death: DeathCallback) -> None:
        try:
            cause = self._listen(child, on_outputs)
        except Exception as error:
            logger.exception("the engine's client failed")
            cause = f"the engine's client failed: {type(error).__name__}: {error}"
            child.kill()
        with self._lock:
            self.dead = EngineDead(cause)
            self._close_sockets()
        on_death(self.dead)

    def _listen(self, child: subprocess.Popen[bytes], on_outputs: OutputsCallback) -> str:
        """Pass messages both ways until the engine has ended; returns why it has."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._inbox, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(100))
            while self._inbox in ready and self._inbox.poll(0):
                self._socket.send(self._inbox.recv())
            if self._socket in ready:
                event = decode_event(self._socket.recv())
                if isinstance(event, StepOutputs):
                    self.stats = event.stats
                    on_outputs(event)
                elif isinstance(event, EngineFailed):
                    logger.error("the engine failed: %s\n%s", event.cause, event.traceback)
                    return f"the engine failed: {event.cause}"
            elif child.poll() is not None:
                ended = "was shut down" if self._closing else f"ended unexpectedly with {_exit(child.returncode)}"
                return f"the engine process {ended}"


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def failure(error: BaseException) -> EngineFailed:
    """An exception as the engine's last words; one that explains itself needs no traceback."""
    if isinstance(error, OctavoError):
        return EngineFailed(str(error), "")
    return EngineFailed(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
