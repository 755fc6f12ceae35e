"""The prefix cache tells nobody what others have asked: the work for a prompt does not depend on their prompts.

Time to the first token is measured in computed tokens here, which is what it depends on and does not vary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import RunningServer, running

SECRET = "a secret of several blocks: the merger is signed on the fourth of May, at noon, in the old harbour"
NUM_CACHED = (len(SECRET) - 1) // 16 * 16  # a token is a byte, a block has 16


def num_computed(server: RunningServer) -> int:
    """Prompt tokens that the engine has computed since it started."""
    server.wait_idle()
    (line,) = [
        line for line in server.http.get("/metrics").text.splitlines() if line.startswith("octavo:prompt_tokens_total")
    ]
    return int(float(line.rpartition(" ")[2]))


def ask(server: RunningServer, key: str | None, **more: Any) -> tuple[int, int]:
    """Asks for the secret: prompt tokens computed, and the number of cached ones that the answer admits."""
    before = num_computed(server)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = server.post("/v1/completions", {"prompt": SECRET, "max_tokens": 2, **more}, **headers)
    assert response.status_code == 200, response.text
    cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return num_computed(server) - before, cached


def ask_together(server: RunningServer, requests: Iterable[tuple[str, dict[str, Any]]]) -> int:
    """Prompt tokens computed when all are sent at once: the first is long, so that the others find it under way."""
    before = num_computed(server)
    threads = [
        threading.Thread(
            target=server.post,
            args=("/v1/completions", {"prompt": SECRET, "max_tokens": 2, **more}),
            kwargs={"authorization": f"Bearer {key}"},
        )
        for key, more in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return num_computed(server) - before


FULL = (len(SECRET), 0)
REST = (len(SECRET) - NUM_CACHED, NUM_CACHED)


def test_one_principals_prompts_never_shorten_anothers(tiny_llama: Path) -> None:
    with running(tiny_llama, api_keys=("alice", "bob", "carol")) as server:
        assert ask(server, "alice") == FULL
        assert ask(server, "alice") == REST
        assert ask(server, "bob") == FULL
        assert ask(server, "carol") == FULL
        assert ask(server, "bob") == REST


def test_a_salt_narrows_and_cannot_reach_another_principals_namespace(tiny_llama: Path) -> None:
    with running(tiny_llama, api_keys=("alice", "bob")) as server:
        assert ask(server, "alice") == FULL
        assert ask(server, "alice", cache_salt="project") == FULL
        for salt in (None, "project", "alice", ""):
            expected = REST if salt == "" else FULL  # an empty salt is none
            assert ask(server, "bob", cache_salt=salt) == expected
        assert ask(server, "alice", cache_salt="project") == REST
        assert ask(server, "alice") == REST


@pytest.mark.parametrize(
    ("keys", "scope"), [(("alice", "bob"), "shared"), (("alice",), "principal"), ((), "principal")]
)
def test_where_the_cache_is_shared_a_salt_still_narrows(tiny_llama: Path, keys: tuple[str, ...], scope: str) -> None:
    first, last = (keys[0], keys[-1]) if keys else (None, None)
    with running(tiny_llama, api_keys=keys, prefix_cache_scope=scope) as server:
        assert ask(server, first) == FULL
        assert ask(server, last) == REST
        assert ask(server, last, cache_salt="mine") == FULL
        assert ask(server, first, cache_salt="mine") == REST
        assert ask(server, first, cache_salt="other") == FULL


def test_what_is_under_way_is_shared_within_a_namespace_only(tiny_llama: Path) -> None:
    engine = {"max_num_batched_tokens": 16}  # the prompt takes several steps
    with running(tiny_llama, engine=engine, api_keys=("alice", "bob")) as server:
        requests = [(key, {"cache_salt": salt}) for key in ("alice", "bob") for salt in (None, "s")] * 3
        assert ask_together(server, requests) == 4 * (len(SECRET) + 2 * REST[0])
