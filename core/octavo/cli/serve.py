"""``octavo serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import socket

    from octavo.server.lifecycle import ListenConfig
    from octavo.server.service import ServerConfig, Service
    from octavo.startup import Resolved

logger = logging.getLogger(__name__)

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set for requests that do not say."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the server; those of the engine are there already."""
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks a free one (default: %(default)s)")
    add("--uds", metavar="PATH", help="Unix socket to listen on instead")
    add("--root-path", default="", metavar="PATH", help="path under which a proxy shows this server")
    add("--ssl-certfile", metavar="FILE", help="certificate for HTTPS, with --ssl-keyfile")
    add("--ssl-keyfile", metavar="FILE", help="the certificate's private key")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that clients call the model by")
    add(
        "--api-key",
        action="append",
        metavar="KEY",
        help="a key that clients must send; may be repeated (default: those in OCTAVO_API_KEY, separated by commas)",
    )
    add("--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="web origins that browsers may call from")
    add("--chat-template", metavar="FILE", help="a Jinja file (or its text) that replaces the model's chat template")
    add(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="auto: the model's generation_config.json sets sampling defaults (default: %(default)s)",
    )
    add(
        "--unknown-fields",
        choices=("refuse", "ignore"),
        default="refuse",
        help="what happens to request fields that nobody knows (default: %(default)s)",
    )
    add(
        "--prefix-cache-scope",
        choices=("principal", "shared"),
        default="principal",
        help="principal: with several keys, each has its own part of the prefix cache (default: %(default)s)",
    )
    add(
        "--max-num-waiting",
        type=int,
        default=8192,
        metavar="N",
        help="sequences that may wait beside the --max-num-seqs that run; what is more is refused with status 503 "
        "(default: %(default)s)",
    )
    add("--max-body-mib", type=float, default=32.0, help="largest request body, in MiB (default: %(default)s)")
    add("--drain-timeout", type=float, default=30.0, help="seconds left to requests on SIGTERM (default: %(default)s)")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: %(default)s)")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Serve until told to stop; the exit status.

    Raises:
        ConfigError: an option or the model cannot work.
    """
    started = time.perf_counter()
    log_level = args.log_level.upper()
    os.environ["OCTAVO_LOG_LEVEL"] = log_level  # the engine's process logs likewise
    logging.basicConfig(level=log_level, format="%(levelname)s %(name)s: %(message)s")
    listen = _listen_config(args)
    chat_template = _chat_template(args.chat_template)
    with listen.bind() as taken:
        # imported here: a mistake in the options must not cost what running costs
        from octavo.client import ProcessClient

        client = ProcessClient()
        try:
            client.launch()  # the engine's process imports what it needs, then loads, while this one does
            from octavo.server.service import Service
            from octavo.startup import make_text, resolve

            resolved = resolve(config)
            server_config = _server_config(args, config, resolved)
            client.build(resolved)
            service = Service(
                client,
                make_text(resolved, chat_template=chat_template),
                server_config,
                on_finished=resolved.host.observers("octavo_request_finished"),
                on_step=resolved.host.observers("octavo_step_finished"),
                seed=config.seed,
            )
            service.frontend.start()
            return _serve(service, resolved, listen, taken, started)
        finally:
            client.close()


def _serve(service: Service, resolved: Resolved, listen: ListenConfig, taken: socket.socket, started: float) -> int:
    from octavo.server.app import create_app
    from octavo.server.lifecycle import serve

    host, info, metrics = resolved.host, service.client.info, service.metrics
    metrics.add(collector for _, collector in host.items("octavo_metrics"))
    metrics.watch_hooks(host.seconds)
    app = create_app(service, host.items("octavo_routes"))

    def ready() -> None:
        parts = {**info.startup_seconds, "in all": time.perf_counter() - started}
        metrics.started(parts)
        spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
        url = listen.url(taken)
        logger.info("ready: %s (%s)", ", ".join(service.config.model_names), spent)
        logger.info("listening on %s", url if listen.unix_socket is None else listen.unix_socket)
        logger.info(
            "try: curl %s%s/v1/chat/completions -H 'Content-Type: application/json'%s "
            '-d \'{"messages": [{"role": "user", "content": "Hello!"}]}\'',
            f"--unix-socket {listen.unix_socket} " if listen.unix_socket is not None else "",
            url,
            " -H 'Authorization: Bearer KEY'" if service.config.api_keys else "",
        )

    return serve(app, service, listen, taken, ready)


def _listen_config(args: argparse.Namespace) -> ListenConfig:
    from octavo.server.lifecycle import ListenConfig

    if (args.ssl_certfile is None) != (args.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile belong together; give both or neither")
    for option, name in (("--ssl-certfile", args.ssl_certfile), ("--ssl-keyfile", args.ssl_keyfile)):
        if name is not None and not Path(name).is_file():
            raise ConfigError(f"{option} {name}: there is no such file")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, not {args.port}")
    if args.root_path and (not args.root_path.startswith("/") or args.root_path.endswith("/")):
        raise ConfigError(f"--root-path must begin with a slash and not end with one, unlike '{args.root_path}'")
    return ListenConfig(
        host=args.host,
        port=args.port,
        unix_socket=args.uds,
        root_path=args.root_path,
        certificate=args.ssl_certfile,
        private_key=args.ssl_keyfile,
    )


def _server_config(args: argparse.Namespace, config: EngineConfig, resolved: Resolved) -> ServerConfig:
    from octavo.server.service import ServerConfig

    if args.max_body_mib <= 0 or args.drain_timeout < 0 or args.max_num_waiting < 0:
        raise ConfigError("--max-body-mib must be above 0, --max-num-waiting and --drain-timeout at least 0")
    keys = args.api_key or [key for key in os.environ.get("OCTAVO_API_KEY", "").split(",") if key]
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key must not be empty")
    defaults = _sampling_defaults(resolved) if args.generation_config == "auto" else {}
    return ServerConfig(
        model_names=tuple(args.served_model_name or [_display_name(config, resolved)]),
        api_keys=tuple(keys),
        allowed_origins=tuple(args.allowed_origins),
        unknown_fields=args.unknown_fields,
        prefix_cache_scope=args.prefix_cache_scope,
        max_body_bytes=int(args.max_body_mib * 2**20),
        drain_timeout=args.drain_timeout,
        max_num_waiting=args.max_num_waiting,
        sampling_defaults=defaults,
    )


def _sampling_defaults(resolved: Resolved) -> dict[str, Any]:
    """What the model's generation configuration says about sampling."""
    from octavo.request import SamplingParams

    given = resolved.checkpoint.generation_config()
    defaults = {name: given[name] for name in SAMPLING_DEFAULTS if given.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except (RequestError, TypeError) as error:
        raise ConfigError(
            f"the model's generation_config.json cannot be used: {error}; to do without it: --generation-config none"
        ) from error
    if defaults:
        said = ", ".join(f"{name} {value}" for name, value in defaults.items())
        logger.info("sampling defaults of the model: %s (--generation-config none: OpenAI's)", said)
    return defaults


def _display_name(config: EngineConfig, resolved: Resolved) -> str:
    """What clients call the model: its name on the hub, or that of its folder or file."""
    from octavo.default_model import DISPLAY_NAME, FILE_NAME

    path = Path(config.model)
    if path.name == FILE_NAME:
        return DISPLAY_NAME
    if not path.exists():
        return config.model
    return path.stem if path.is_file() else path.resolve().name


def _chat_template(given: str | None) -> str | None:
    if given is None:
        return None
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--chat-template {given}: {error}") from error
