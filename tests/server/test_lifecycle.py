"""Where the server listens, and the options that are refused before anything is loaded."""

from __future__ import annotations

import argparse
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tests.server.scripted import ScriptedEngine, make_processor

from octavo.cli import serve as command
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server import lifecycle
from octavo.server.app import create_app
from octavo.server.lifecycle import DrainingServer, ListenConfig, uvicorn_config
from octavo.server.service import ServerConfig, Service
from octavo.startup import resolve


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_a_port_that_is_in_use_is_said_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: Address already in use"):
            command.run(parse("--port", str(port)), EngineConfig(model="/there/is/no/such/model"))


def test_a_host_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on no-such-host\.invalid"):
        ListenConfig(host="no-such-host.invalid").bind()


def test_the_address_is_one_that_clients_can_use() -> None:
    with ListenConfig(port=0).bind() as taken:
        port = taken.getsockname()[1]
        assert ListenConfig(port=0).url(taken) == f"http://127.0.0.1:{port}"
        assert ListenConfig(port=0, root_path="/llm", certificate="c").url(taken) == f"https://127.0.0.1:{port}/llm"


def test_the_proxys_path_and_the_certificate_reach_the_http_server() -> None:
    listen = ListenConfig(root_path="/llm", certificate="c.pem", private_key="k.pem")
    config = uvicorn_config(FastAPI(), listen)
    assert (config.root_path, config.ssl_certfile, config.ssl_keyfile) == ("/llm", "c.pem", "k.pem")


def test_a_socket_that_was_left_behind_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    ListenConfig(unix_socket=str(path)).bind().close()
    with ListenConfig(unix_socket=str(path)).bind() as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="another server listens"):
            ListenConfig(unix_socket=str(path)).bind()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        ListenConfig(unix_socket=str(path)).bind()
    assert path.read_text() == "precious"


def test_it_serves_on_a_unix_socket_until_it_is_told_to_stop(tmp_path: Path) -> None:
    listen = ListenConfig(unix_socket=str(tmp_path / "s"), root_path="/llm")
    engine = ScriptedEngine()
    service = Service(engine, make_processor(), ServerConfig(model_names=("tiny",)))
    service.frontend.start()
    answers: list[int] = []

    def ready() -> None:
        threading.Thread(target=ask).start()

    def ask() -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=listen.unix_socket), base_url="http://localhost") as http:
            answers.append(http.get("/health").status_code)
            answers.append(http.post("/v1/completions", json={"prompt": "x"}).status_code)
        server.handle_exit(15, None)

    with listen.bind() as taken:
        server = DrainingServer(lifecycle.uvicorn_config(create_app(service), listen), service, ready)
        server.run(sockets=[taken])
    engine.close()
    assert answers == [200, 200]


def test_a_second_signal_does_not_wait() -> None:
    service = Service(ScriptedEngine(), make_processor(), ServerConfig(model_names=("tiny",)))
    server = DrainingServer(lifecycle.uvicorn_config(create_app(service), ListenConfig()), service, lambda: None)
    server.handle_exit(15, None)
    assert service.draining
    assert not server.should_exit
    server.handle_exit(15, None)
    assert server.should_exit
    assert server.force_exit


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--ssl-certfile", "x"], "belong together"),
        (["--ssl-certfile", "/none/c", "--ssl-keyfile", "/none/k"], "--ssl-certfile /none/c: there is no such file"),
        (["--root-path", "llm"], "--root-path must begin with a slash"),
        (["--root-path", "/llm/"], "not end with one"),
        (["--max-body-mib", "0"], "--max-body-mib must be above 0"),
        (["--drain-timeout", "-1"], "--drain-timeout at least 0"),
        (["--max-num-waiting", "-1"], "--max-num-waiting and --drain-timeout at least 0"),
        (["--api-key", " "], "--api-key must not be empty"),
        (["--chat-template", "/none/template.jinja"], "--chat-template /none/template.jinja"),
    ],
)
def test_options_that_cannot_work_say_why(words: list[str], said: str, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        command.run(parse("--port", "0", *words), EngineConfig(model=str(tiny_llama), cpu_kv_cache_gib=0.05))


def settings(tiny_llama: Path, *words: str, **generation: Any) -> ServerConfig:
    config = EngineConfig(model=str(tiny_llama))
    resolved = resolve(config)
    resolved.checkpoint.generation_config = lambda: generation  # type: ignore[method-assign]
    return command._server_config(parse(*words), config, resolved)


def test_the_models_generation_configuration_sets_defaults(tiny_llama: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "eos_token_id": 3}
    assert settings(tiny_llama, **given).sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert settings(tiny_llama, "--generation-config", "none", **given).sampling_defaults == {}


@pytest.mark.parametrize("given", [{"temperature": -1.0}, {"top_p": "much"}])
def test_a_generation_configuration_that_cannot_work_is_refused(tiny_llama: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--generation-config none"):
        settings(tiny_llama, **given)


def test_keys_come_from_options_or_from_the_environment(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "a,b")
    assert settings(tiny_llama).api_keys == ("a", "b")
    assert settings(tiny_llama, "--api-key", "c", "--api-key", "d").api_keys == ("c", "d")
