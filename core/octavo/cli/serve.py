"""``octavo serve``: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from octavo.client import ProcessClient
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
    # imported here: describing the command must not cost what running it does
    from concurrent.futures import ThreadPoolExecutor

    from octavo.client import ProcessClient
    from octavo.server.service import Service
    from octavo.startup import make_text, resolve

    resolved = resolve(config)
    server_config = _server_config(args, config, resolved)
    client = ProcessClient(resolved)
    try:
        client.launch()  # the engine loads in its process while the tokenizer loads in this one
        with ThreadPoolExecutor(1) as pool:
            text = pool.submit(make_text, resolved, chat_template=_chat_template(args.chat_template)).result()
        service = Service(
            client,
            text,
            server_config,
            on_finished=resolved.host.observers("octavo_request_finished"),
            on_step=resolved.host.observers("octavo_step_finished"),
            seed=config.seed,
        )
        service.frontend.start()
        service.metrics.ready(client.info)
        return _listen(args, service, resolved, client, started)
    finally:
        client.close()


def _listen(
    args: argparse.Namespace, service: Service, resolved: Resolved, client: ProcessClient, started: float
) -> int:
    from octavo.server.app import create_app
    from octavo.server.lifecycle import serve

    host = resolved.host
    service.metrics.add(collector for _, collector in host.items("octavo_metrics"))
    service.metrics.watch_hooks(host.seconds)
    app: FastAPI = create_app(service, host.items("octavo_routes"))

    def announce(address: str) -> None:
        parts = {**client.info.startup_seconds, "in all": time.perf_counter() - started}
        spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
        logger.info("ready: %s (%s)", service.config.model_names[0], spent)
        logger.info("listening on %s", address)
        logger.info(
            "try: curl %s/v1/chat/completions -H 'Content-Type: application/json' "
            '-d \'{"messages": [{"role": "user", "content": "Hello!"}]}\'',
            address,
        )

    return serve(app, service, args.host, args.port, args.log_level, announce)


def _server_config(args: argparse.Namespace, config: EngineConfig, resolved: Resolved) -> ServerConfig:
    from octavo.server.service import ServerConfig

    if args.max_body_mib <= 0 or args.drain_timeout < 0:
        raise ConfigError("--max-body-mib must be above 0 and --drain-timeout at least 0")
    keys = args.api_key or [key for key in os.environ.get("OCTAVO_API_KEY", "").split(",") if key]
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key must not be empty")
    defaults: Mapping[str, Any] = {}
    if args.generation_config == "auto":
        defaults = resolved.checkpoint.generation_config()
    return ServerConfig(
        model_names=tuple(args.served_model_name or [_display_name(config, resolved)]),
        api_keys=tuple(keys),
        allowed_origins=tuple(args.allowed_origins),
        unknown_fields=args.unknown_fields,
        prefix_cache_scope=args.prefix_cache_scope,
        max_body_bytes=int(args.max_body_mib * 2**20),
        drain_timeout=args.drain_timeout,
        max_num_waiting=config.max_num_waiting,
        sampling_defaults={name: defaults[name] for name in SAMPLING_DEFAULTS if defaults.get(name) is not None},
    )


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
