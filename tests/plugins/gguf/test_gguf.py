"""The GGUF plugin, checked against the ``gguf`` package and against what was written into the files."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo.default_model import local_default_model
from octavo.errors import CheckpointError
from octavo_gguf.checkpoint import GGUFCheckpoint, GGUFFormat, llama3_factors, unpermuted_rows
from octavo_gguf.dequantize import DEQUANTIZERS, dequantize
from octavo_gguf.reader import BLOCK_TYPES, GGUFFile
from octavo_gguf.tokenizer import PRE_TOKENIZERS

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 32, 4, 2, 8, 64, 300
BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
Change = Callable[[GGUFWriter], None]


def write(path: Path, change: Change = lambda writer: None, *, arch: str = "llama", **fields: Any) -> dict[str, Any]:
    """A one-layer model; returns its matrices as Hugging Face has them, before they are permuted."""
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model(fields.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    tokens = fields.get("tokens", [*BYTE_ALPHABET, "ab", "<|begin|>", "<|end|>", "<note>"])
    writer.add_token_list(tokens)
    writer.add_token_types(fields.get("types", [1] * (len(tokens) - 3) + [3, 3, 4]))
    if "merges" in fields or fields.get("tokenizer", "gpt2") == "gpt2":
        writer.add_token_merges(fields.get("merges", ["a b"]))
    writer.add_bos_token_id(fields.get("bos", len(tokens) - 3))
    writer.add_eos_token_id(fields.get("eos", len(tokens) - 2))
    writer.add_chat_template("{{ messages[0].content }}")
    for name, values in tensors.items():
        stored = values
        if arch == "llama" and name.split(".")[-1] in ("attn_q", "attn_k"):  # as llama.cpp's converter does
            heads = HEADS if name.endswith("_q") else KV_HEADS
            stored = values.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        kind = fields.get("kind")
        if kind is not None and values.ndim == 2:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", stored)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def default_model() -> Path:
    found = local_default_model()
    if found is None:
        pytest.skip("the default model is not on this machine; 'python -m octavo.default_model' fetches it")
    return found


# --- the file --------------------------------------------------------------------------------------------------------


def assert_same_as_gguf_package(path: Path) -> None:
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        value = ours.metadata[key]
        expected = field.contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    assert {t.name: (tuple(int(n) for n in reversed(t.shape)), t.data_offset) for t in theirs.tensors} == {
        t.name: (t.shape, t.offset) for t in ours.tensors.values()
    }


def test_layout_is_what_the_gguf_package_reads(path: Path) -> None:
    write(path, lambda w: (w.add_bool("x.bool", True), w.add_array("x.floats", [1.5, 2.5]), w.add_int8("x.i8", -3)))
    assert_same_as_gguf_package(path)


@pytest.mark.slow
def test_layout_of_the_default_model_is_what_the_gguf_package_reads(default_model: Path) -> None:
    assert_same_as_gguf_package(default_model)


def test_every_cut_file_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, *range(20, len(whole) - 1, 997), len(whole) - 40]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFCheckpoint(cut)


def test_a_broken_file_never_raises_anything_else(path: Path, tmp_path: Path) -> None:
    write(path)
    whole = path.read_bytes()[:6000]
    broken = tmp_path / "broken.gguf"
    generator = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(3):
            data[generator.randrange(4, 4000)] = generator.randrange(256)
        broken.write_bytes(data)
        with pytest.raises(CheckpointError):  # it is cut short besides
            GGUFCheckpoint(broken)


def test_format_goes_by_the_first_bytes_and_not_by_the_name(path: Path, tmp_path: Path) -> None:
    write(path)
    other = path.rename(tmp_path / "model.bin")
    named = tmp_path / "text.gguf"
    named.write_text("not a model")
    assert GGUFFormat.accepts(other)
    assert not GGUFFormat.accepts(named)
    assert not GGUFFormat.accepts(tmp_path)
    assert not GGUFFormat.accepts(tmp_path / "nothing")
    assert GGUFFormat.open(other).config()["model_type"] == "llama"


def test_unknown_kinds_are_refused_with_the_known_ones(path: Path) -> None:
    blocks = np.zeros((4, 66), np.uint8)
    write(path, lambda w: w.add_tensor("blk.0.x.weight", blocks, raw_dtype=GGMLQuantizationType.IQ2_XXS))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.x\.weight'.*ggml type 16.*known: .*Q4_K"):
        GGUFCheckpoint(path)
    write(path, lambda w: w.add_tensor("blk.0.attn_rot.weight", np.zeros((2, 2), np.float32)))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_rot\.weight"):
        GGUFCheckpoint(path).weights()
    write(path, arch="mamba")
    with pytest.raises(CheckpointError, match=r"'mamba'; known in GGUF files: llama, qwen2, qwen3"):
        GGUFCheckpoint(path)
    write(path, lambda w: w.add_uint16("split.count", 3))
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        GGUFCheckpoint(path)
    write(path, pre="klingon")
    with pytest.raises(CheckpointError, match=r"'klingon'.*known: .*smollm.*--tokenizer"):
        GGUFCheckpoint(path).tokenizer()
    write(path, tokenizer="bert")
    with pytest.raises(CheckpointError, match=r"'bert'; known: gpt2, llama"):
        GGUFCheckpoint(path).tokenizer()
    write(path)
    with pytest.raises(CheckpointError, match=r"'model\.norms\.weight' is missing.*model\.norm\.weight"):
        GGUFCheckpoint(path).weights().info("model.norms.weight")


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEQUANTIZERS)
def test_dequantized_values_are_those_of_the_gguf_package(kind: str) -> None:
    block = next(block for block in BLOCK_TYPES.values() if block.name == kind)
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (500, block.block_bytes), np.uint8)
    scale_places = {"Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}.get(kind, [0, 2])
    for place in scale_places:  # any bytes are valid but for the scales: no infinities
        scales = generator.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    expected = gguf.quants.dequantize(blocks, GGMLQuantizationType[kind]).reshape(len(blocks), block.block_size)
    np.testing.assert_array_equal(dequantize(blocks, kind), expected)


def test_every_type_that_is_located_can_be_read() -> None:
    assert {block.name for block in BLOCK_TYPES.values()} == {*DEQUANTIZERS, "F32", "F16", "BF16"}


@pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_weights_come_back_under_hugging_face_names_and_in_their_order(path: Path, arch: str, kind: str | None) -> None:
    quantization = GGMLQuantizationType[kind] if kind else None
    written = write(path, arch=arch, kind=quantization)
    weights = GGUFCheckpoint(path).weights()
    names = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down",
    }
    assert set(weights.names()) == set(names)
    for name, stored in names.items():
        values = written[stored]
        if quantization is not None and values.ndim == 2:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, quantization), quantization)
        tensor = weights.read(name)
        assert weights.info(name).shape == tuple(tensor.shape)
        assert weights.info(name).dtype == tensor.dtype
        np.testing.assert_array_equal(tensor.float().numpy(), values.reshape(tensor.shape), name)


@pytest.mark.parametrize("kind", [None, GGMLQuantizationType.Q8_0])
def test_a_part_of_a_tensor_is_the_part_of_the_whole(path: Path, kind: GGMLQuantizationType | None) -> None:
    write(path, kind=kind)
    weights = GGUFCheckpoint(path).weights()
    for name in weights.names():
        whole = weights.read(name)
        for index in ((slice(4, 9),), (slice(0, 8), slice(3, 20)), (slice(None), slice(8, 16)))[: whole.ndim * 2 - 1]:
            torch.testing.assert_close(weights.read(name, index), whole[index], rtol=0, atol=0)


def test_rows_are_put_back_into_hugging_face_order() -> None:
    rows = np.arange(12)
    stored = rows.reshape(2, 2, 3).swapaxes(1, 2).reshape(-1)  # two heads of six, as the converter writes them
    np.testing.assert_array_equal(stored[unpermuted_rows(12, 2)], rows)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_configuration_is_in_hugging_face_terms(path: Path) -> None:
    write(path)
    config = GGUFCheckpoint(path).config()
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": None,
        "dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected


def test_configuration_of_variants(path: Path) -> None:
    write(
        path, lambda w: (w.add_sliding_window(16), w.add_tensor("output.weight", np.zeros((VOCAB, HIDDEN), np.float32)))
    )
    config = GGUFCheckpoint(path).config()
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 16)
    assert config["tie_word_embeddings"] is False
    write(path, lambda w: w.add_key_length(16), arch="qwen3")
    config = GGUFCheckpoint(path).config()
    assert (config["model_type"], config["head_dim"]) == ("qwen3", 16)
    write(path, lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32)), arch="qwen2")
    assert GGUFCheckpoint(path).config()["attention_bias"] is True
    write(path, lambda w: (w.add_key_length(16), w.add_rope_dimension_count(8)))
    with pytest.raises(CheckpointError, match="rotates 8 of 16"):
        GGUFCheckpoint(path).config()


def test_rope_scaling_of_every_kind(path: Path) -> None:
    def scaled(kind: gguf.RopeScalingType) -> Change:
        return lambda w: (
            w.add_rope_scaling_type(kind),
            w.add_rope_scaling_factor(4.0),
            w.add_rope_scaling_orig_ctx_len(64),
        )

    write(path, scaled(gguf.RopeScalingType.LINEAR))
    config = GGUFCheckpoint(path).config()
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}
    write(path, scaled(gguf.RopeScalingType.YARN))
    assert GGUFCheckpoint(path).config()["rope_scaling"]["original_max_position_embeddings"] == 64
    write(path, scaled(gguf.RopeScalingType.LONGROPE))
    with pytest.raises(CheckpointError, match=r"longrope.*known"):
        GGUFCheckpoint(path).config()


def test_llama3_factors_are_recognised_and_others_refused(path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(50000.0, HEAD_DIM, scaling).astype(np.float32)
    write(path, lambda w: w.add_tensor("rope_freqs.weight", factors))
    assert GGUFCheckpoint(path).config()["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in GGUFCheckpoint(path).weights().names()
    write(path, lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 8], np.float32)))
    with pytest.raises(CheckpointError, match="rope_freqs"):
        GGUFCheckpoint(path).config()


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / frequencies.numpy(), llama3_factors(500000.0, 128, scaling), rtol=1e-5)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_added_tokens_template_and_ends_come_from_the_file(path: Path) -> None:
    write(path, lambda w: (w.add_add_bos_token(True), w.add_eot_token_id(5)))
    checkpoint = GGUFCheckpoint(path)
    tokenizer = checkpoint.tokenizer()
    begin, end, note = (len(BYTE_ALPHABET) + i for i in (1, 2, 3))
    ids = tokenizer("<|end|>ab<note>").input_ids
    assert ids == [begin, end, len(BYTE_ALPHABET), note]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<note>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert checkpoint.generation_config() == {"eos_token_id": [end, 5]}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["Ġ", "Ġ12", "Ċ", "can", "'t"]),
        ("smollm", ["ĠĠ", "1", "2", "Ċ", "can", "'t"]),
        ("llama-bpe", ["Ġ", "Ġ", "12", "Ċ", "can", "'t"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "Ċ", "can", "'t"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_do(pre: str, words: list[str]) -> None:
    cut = PRE_TOKENIZERS[pre].make().pre_tokenize_str("  12\ncan't")
    assert [word for word, _place in cut] == words


def test_sentencepiece_merges_follow_the_scores(path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "a", "b", "c", "ab", "bc", "abc", "▁a"]
    types = [2, 3, 3, *[6] * 256, *[1] * 8]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]
    write(path, lambda w: w.add_token_scores(scores), tokenizer="llama", tokens=tokens, types=types, bos=1, eos=2)
    tokenizer = GGUFCheckpoint(path).tokenizer()
    assert tokenizer.tokenize("abc") == ["▁", "abc"]  # "bc" has the best score, then "abc"; "▁a" comes too late
    assert tokenizer("é").input_ids == [1, tokens.index("▁"), 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer("abc é").input_ids, skip_special_tokens=True) == "abc é"


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_metadata_of_a_wrong_type_is_named(path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands under whichever key: it is read, or it is refused with the file's name and the key's."""
    write(path, lambda w: w.add_token_scores([0.0] * (len(BYTE_ALPHABET) + 4)), tokenizer=tokenizer)
    GGUFCheckpoint(path).tokenizer()  # as it is, nothing is wrong
    whole = GGUFFile(path)
    optional = {
        *(f"llama.{name}" for name in ("rope.dimension_count", "attention.key_length", "attention.sliding_window")),
        *(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "add_space_prefix")),
        *(f"tokenizer.ggml.{name}_token_id" for name in ("eot", "unknown", "padding")),
        *("llama.rope.scaling.type", "split.count"),
    }
    unread = {"tokenizer.ggml.add_space_prefix"} if tokenizer == "gpt2" else set()
    strange: list[Any] = [-1, 0, 2.5, 10**9, True, "x", ["a", "b c"], np.array([1, 2]), np.array([1.5])]
    refused: dict[tuple[str, str], str] = {}
    for key in {*whole.metadata, *optional}:
        for value in strange:
            monkeypatch.setattr(whole, "metadata", {**GGUFFile(path).metadata, key: value})
            monkeypatch.setattr("octavo_gguf.checkpoint.GGUFFile", lambda _: whole)
            try:
                checkpoint = GGUFCheckpoint(path)
                checkpoint.config()
                checkpoint.generation_config()
                checkpoint.tokenizer()
            except CheckpointError as error:
                refused[key, str(value)] = str(error)
    for (key, value), message in refused.items():
        assert str(path) in message, (key, value)
        assert key.rpartition(".")[2] in message or "--tokenizer" in message or "parts" in message, (key, value)
    assert {key for key, _ in refused} >= {
        key for key in whole.metadata if key.startswith("llama.")
    } | optional - unread


# --- the default model -----------------------------------------------------------------------------------------------


def test_the_default_model_is_read_within_two_seconds(default_model: Path) -> None:
    import transformers  # noqa: F401 - its import is not what is measured

    started = time.process_time()
    checkpoint = GGUFCheckpoint(default_model)
    checkpoint.config()
    checkpoint.tokenizer()
    weights = checkpoint.weights()
    num_parameters = sum(weights.read(name).numel() for name in weights.names())
    assert time.process_time() - started < 2.0
    assert num_parameters == 134_515_008


def test_values_of_the_default_model_are_those_of_the_gguf_package(default_model: Path) -> None:
    file = GGUFFile(default_model)
    weights = GGUFCheckpoint(default_model).weights()
    tensor = file.tensors["blk.7.attn_k.weight"]
    stored = gguf.quants.dequantize(file.rows(tensor), GGMLQuantizationType[tensor.type.name])
    expected = stored.reshape(3, 32, 2, 576).swapaxes(1, 2).reshape(192, 576)
    np.testing.assert_array_equal(weights.read("model.layers.7.self_attn.k_proj.weight").numpy(), expected)


def test_the_default_tokenizer_cuts_every_text_as_the_original(default_model: Path) -> None:
    """20 000 texts against the original's pipeline: single digits, then GPT-2's words as bytes."""
    metadata = GGUFFile(default_model).metadata
    vocabulary = {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    generator = random.Random(0)
    pieces = [" ", "   ", "\n", "12", "3", "½", "a", "The", "don't", "é", "我", "🎉", "-", "\t", "x_y", "()", "Ⅷ", "٣"]
    texts = ["".join(generator.choices(pieces, k=generator.randint(1, 10))) for _ in range(20_000)]
    ours = GGUFCheckpoint(default_model).tokenizer().backend_tokenizer
    assert [e.ids for e in ours.encode_batch(texts)] == [e.ids for e in reference.encode_batch(texts)]


def test_the_default_chat_template_and_special_tokens(default_model: Path) -> None:
    tokenizer = GGUFCheckpoint(default_model).tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer.all_special_ids) >= 2
    assert tokenizer.decode(tokenizer("<|im_start|>a<|im_end|>").input_ids, skip_special_tokens=True) == "a"
    assert sum(token.special for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()) == 17
