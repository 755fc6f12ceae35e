"""``octavo quantize`` makes checkpoints that load, and says what it needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import transformers
from tests.plugins.quant.conftest import FIXTURES, LoadedModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import octavo_quant.command
from octavo.errors import CheckpointError, ConfigError
from octavo_quant.quantize import add_quantize

TOKENS = list(range(20))
TEXT = "A sheet is folded three times .\nEight leaves make sixteen pages .\n"


def quantize(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    add_quantize(parser)
    arguments = parser.parse_args([str(word) for word in words])
    assert arguments.run(arguments) == 0


@pytest.fixture
def plain_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(tmp_path / "plain", max_shard_size="60KB")  # several files
    vocabulary = {word: index for index, word in enumerate(["?", *sorted(set(TEXT.split()))])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_quantizing_while_loading_and_beforehand_give_the_same_model(plain_model: Path, tmp_path: Path) -> None:
    quantize(plain_model, tmp_path / "made", "--method", "fp8")
    online, made, plain = (
        LoadedModel(plain_model, wanted="fp8"),
        LoadedModel(tmp_path / "made"),
        LoadedModel(plain_model),
    )
    torch.testing.assert_close(online.logits(TOKENS), made.logits(TOKENS))
    difference = (online.logits(TOKENS) - plain.logits(TOKENS)).abs()
    assert 0 < difference.mean() < 0.3 * plain.logits(TOKENS).std()
    assert online.build.num_bytes() < 0.75 * plain.build.num_bytes()


def test_large_checkpoints_are_written_in_several_files(
    plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(plain_model, tmp_path / "whole", "--method", "fp8")
    monkeypatch.setattr(octavo_quant.command, "SHARD_BYTES", 50_000)
    quantize(plain_model, tmp_path / "parts", "--method", "fp8")
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert torch.equal(LoadedModel(tmp_path / "parts").logits(TOKENS), LoadedModel(tmp_path / "whole").logits(TOKENS))


def test_layers_that_stay_plain_are_listed_for_other_servers(plain_model: Path, tmp_path: Path) -> None:
    quantize(plain_model, tmp_path / "made", "--method", "fp8")
    settings = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head"]
    assert settings["quant_method"] == "compressed-tensors"
    assert (tmp_path / "made" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_llm_compressor_makes_checkpoints_of_4_bits(method: str, plain_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor", reason="needs octavo[quantize]")
    (tmp_path / "text.txt").write_text(TEXT * 8)
    with torch.inference_mode(False):
        quantize(
            *(plain_model, tmp_path / "made", "--method", method, "--group-size", "32"),
            *("--calibration", tmp_path / "text.txt"),
        )
    made, plain = LoadedModel(tmp_path / "made"), LoadedModel(plain_model)
    assert made.operations.log["linear_packed"]
    difference = (made.logits(TOKENS) - plain.logits(TOKENS)).abs()
    assert 0 < difference.mean() < plain.logits(TOKENS).std()


def test_what_is_quantized_and_what_exists_is_refused(tmp_path: Path) -> None:
    awq = FIXTURES / "awq-gemm-g64-skip-oproj"
    with pytest.raises(CheckpointError, match="quantized with awq already"):
        quantize(awq, tmp_path / "out", "--method", "fp8")
    with pytest.raises(ConfigError, match="not empty"):
        quantize(awq, awq, "--method", "fp8")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibration_says_how_to_install_what_it_needs(
    method: str, plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[quantize\]'"):
        quantize(plain_model, tmp_path / "out", "--method", method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--calibration FILE, a sample a line$"),
        (("--calibration", "absent.txt"), "absent.txt is no file"),
        (("--calibration", __file__), r"--group-size 128 does not divide the .* of the usual sizes .* can have 32$"),
        (("--calibration", __file__, "--group-size", "0"), "--group-size 0 does not divide"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_is_loaded(
    options: tuple[str, ...], message: str, plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=message):
        quantize(plain_model, tmp_path / "out", "--method", "awq", *options)
