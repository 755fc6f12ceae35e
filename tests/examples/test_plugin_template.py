"""A stranger's package: built, installed beside Octavo's own wheel in an environment of its own, served."""

from __future__ import annotations

import json
import re
import site
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from tests.conftest import byte_tokenizer
from transformers import GraniteConfig, GraniteForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "plugin_template"

pytestmark = pytest.mark.slow


class Environment:
    """A virtual environment that sees this one's packages behind its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        behind = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
        lines = [f"import site; site.addsitedir({path!r})" for path in behind]
        (packages / "behind.pth").write_text("\n".join(lines) + "\n")

    def command(self, *words: str) -> list[str]:
        return [str(self.python), str(self.folder / "bin" / "octavo"), *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``octavo`` with these words, to its end."""
        return subprocess.run(
            self.command(*words), cwd=self.folder, capture_output=True, text=True, check=False, timeout=120
        )

    @contextmanager
    def serving(self, *words: str) -> Iterator[str]:
        """``octavo serve`` with these words: the address of the ready server, which is stopped in the end."""
        server = subprocess.Popen(
            self.command("serve", "--port", "0", *words), cwd=self.folder, stderr=subprocess.PIPE, text=True
        )
        try:
            assert server.stderr is not None
            log = ""
            for line in server.stderr:
                log += line
                address = re.search(r"http://127\.0\.0\.1:\d+", line)
                if address:
                    break
            else:
                pytest.fail(log)
            drain = threading.Thread(target=server.stderr.read, daemon=True)  # so that the log never blocks it
            drain.start()
            yield address[0]
        finally:
            server.terminate()
            server.wait(timeout=60)


def wheel_of(source: Path, into: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(into), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Octavo and the plugin, both from their wheels and nothing of them from the source tree."""
    folder = tmp_path_factory.mktemp("clean")
    wheels = [wheel_of(ROOT, folder / "octavo"), wheel_of(TEMPLATE, folder / "granite")]
    environment = Environment(folder / "venv")
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python), "install", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, *map(str, wheels)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return environment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("granite")
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        embedding_multiplier=3.0,
        attention_multiplier=0.1,
        residual_multiplier=0.7,
        logits_scaling=2.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    GraniteForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_it_is_installed_from_wheels(environment: Environment) -> None:
    program = "import octavo, octavo_granite; print(octavo.__file__, octavo_granite.__file__)"
    done = subprocess.run([environment.python, "-c", program], capture_output=True, text=True, check=True)
    assert all(Path(file).is_relative_to(environment.folder) for file in done.stdout.split())


def test_the_plugin_is_found_and_sound(environment: Environment) -> None:
    listed = json.loads(environment.run("plugins", "list", "--json").stdout)
    records = [(row["distribution"], row["version"]) for row in listed if row["name"] == "granite"]
    assert records == [("octavo-granite", "0.1.0")]
    examined = json.loads(environment.run("plugins", "doctor", "--json").stdout)
    assert [row["status"] for row in examined if row["name"] == "granite"] == ["ok"]


def test_a_checkpoint_of_it_is_served(environment: Environment, checkpoint: Path) -> None:
    """Over HTTP, by the engine's process, with the tokens that Transformers has."""
    prompt = "A stranger's model"
    options = ("--plugins", "granite", "--dtype", "float32", "--device", "cpu", "--cpu-kv-cache-gib", "0.01")
    with environment.serving(str(checkpoint), *options) as address:
        body = {"model": checkpoint.name, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
    reference = GraniteForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([list(byte_tokenizer()(prompt)["input_ids"])])
    expected = reference.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == byte_tokenizer().decode(expected, skip_special_tokens=True)


def test_without_the_plugin_the_error_says_what_is_known_and_how_one_is_added(
    environment: Environment, checkpoint: Path
) -> None:
    refused = environment.run("serve", str(checkpoint), "--plugins", "", "--device", "cpu")
    assert refused.returncode == 2
    assert "no selected plugin provides the architecture 'GraniteForCausalLM'" in refused.stderr
    assert "LlamaForCausalLM" in refused.stderr
    assert "octavo.plugins" in refused.stderr
