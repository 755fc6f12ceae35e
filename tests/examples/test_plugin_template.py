"""A stranger's package: built, installed beside Octavo's own wheel in an environment of its own, served."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer
from transformers import GraniteConfig, GraniteForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "plugin_template"

pytestmark = pytest.mark.slow

SERVE = """
import json, queue, sys, time
from octavo import EngineConfig, SamplingParams
from octavo.client import ProcessClient
from octavo.messages import Submit
from octavo.startup import resolve

if __name__ == "__main__":
    path, plugins, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    config = EngineConfig(model=path, plugins=plugins, dtype="float32", device="cpu", cpu_kv_cache_gib=0.01)
    client, arrived = ProcessClient(resolve(config)), queue.SimpleQueue()
    client.start(arrived.put, arrived.put)
    tokens, finished = [], False
    client.submit(Submit("one", prompt, SamplingParams(temperature=0, max_tokens=16), seed=0, arrival=time.monotonic()))
    while not finished:
        for sequence in arrived.get(timeout=60).sequences:
            tokens += sequence.token_ids
            finished = sequence.finish_reason is not None
    client.close()
    import octavo, octavo_granite
    print(json.dumps({"tokens": tokens, "architecture": client.info.architecture,
                      "files": [octavo.__file__, octavo_granite.__file__]}))
"""


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

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [str(self.python), *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


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


def test_the_plugin_is_found_and_sound(environment: Environment) -> None:
    listed = environment.run(str(environment.folder / "bin" / "octavo"), "plugins", "list", "--json")
    records = [row for row in json.loads(listed.stdout) if row["name"] == "granite"]
    assert [(row["distribution"], row["version"]) for row in records] == [("octavo-granite", "0.1.0")]
    doctor = environment.run(str(environment.folder / "bin" / "octavo"), "plugins", "doctor", "--json")
    assert [row["status"] for row in json.loads(doctor.stdout) if row["name"] == "granite"] == ["ok"]


def test_the_engine_s_process_serves_a_checkpoint_of_it(environment: Environment, checkpoint: Path) -> None:
    prompt = list(b"A stranger's model")
    served = environment.run("-c", SERVE, str(checkpoint), "granite", json.dumps(prompt))
    assert served.returncode == 0, served.stderr
    answer = json.loads(served.stdout.splitlines()[-1])
    reference = GraniteForCausalLM.from_pretrained(checkpoint)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert answer["tokens"] == expected.tolist()
    assert answer["architecture"] == "GraniteForCausalLM"
    for file in answer["files"]:
        assert Path(file).is_relative_to(environment.folder), "not from the wheel"


def test_without_the_plugin_the_error_says_what_is_known_and_how_one_is_added(
    environment: Environment, checkpoint: Path
) -> None:
    refused = environment.run("-c", SERVE, str(checkpoint), "", "[1, 2]")
    assert refused.returncode != 0
    assert "no selected plugin provides the architecture 'GraniteForCausalLM'" in refused.stderr
    assert "LlamaForCausalLM" in refused.stderr
    assert "octavo.plugins" in refused.stderr
