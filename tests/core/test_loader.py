"""Checkpoints: what is read, and what is said when files are missing, broken or of another kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import CheckpointError
from octavo.hooks import KernelProvider
from octavo.interfaces import Placement
from octavo.layers.norm import TorchRMSNorm
from octavo.loader import (
    CheckpointLoader,
    DummyLoader,
    HuggingFaceFolder,
    SafetensorsWeights,
    choose_dtype,
    open_checkpoint,
    resolve_model_path,
)
from octavo.operations import NormNeed, Operations

CPU = torch.device("cpu")
PLACEMENT = Placement(CPU, torch.float32)
OPERATIONS = Operations([KernelProvider("torch", TorchRMSNorm, operation="rms_norm")], {})
TENSORS = {
    "model.norm.weight": torch.arange(6.0),
    "model.q_proj.weight": torch.arange(24.0).view(4, 6),
    "model.half": torch.arange(4.0).to(torch.bfloat16),
    "model.packed": torch.arange(8, dtype=torch.int32).view(2, 4),
    "model.scale": torch.tensor(0.5),
    "model.scale_in_a_list": torch.tensor([0.25]),
    "model.eight_bit": torch.arange(4.0).to(torch.float8_e4m3fn),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in a single file."""
    (tmp_path / "config.json").write_text('{"architectures": ["OakForCausalLM"]}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in two files and an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(TENSORS)
    shards = {"model-1-of-2.safetensors": names[:3], "model-2-of-2.safetensors": names[3:]}
    for file, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def loader_of(path: Path) -> CheckpointLoader:
    return CheckpointLoader(HuggingFaceFolder(path).weights(), PLACEMENT, OPERATIONS)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_every_tensor_comes_back_as_it_was_stored(kind: str, request: pytest.FixtureRequest) -> None:
    weights = HuggingFaceFolder(request.getfixturevalue(kind)).weights()
    assert set(weights.names()) == set(TENSORS)
    for name, expected in TENSORS.items():
        info = weights.info(name)
        assert (info.shape, info.dtype) == (tuple(expected.shape), expected.dtype)
        read = weights.read(name)
        assert (read.shape, read.dtype, bits(read)) == (expected.shape, expected.dtype, bits(expected))


def test_a_part_of_a_tensor(folder: Path) -> None:
    name, whole = "model.q_proj.weight", TENSORS["model.q_proj.weight"]
    load = loader_of(folder)
    assert load.tensor(name, (4, 6), (slice(1, 3), slice(2, 6))).equal(whole[1:3, 2:6])
    assert load.tensor(name, (4, 6), (slice(1, 3),)).equal(whole[1:3])
    assert load.num_bytes_read == (2 * 4 + 2 * 6) * 4


def test_a_tensor_is_converted_when_a_dtype_is_named_and_kept_otherwise(folder: Path) -> None:
    load = loader_of(folder)
    assert load.tensor("model.half", (4,)).dtype == torch.bfloat16
    converted = load.tensor("model.half", (4,), dtype=torch.float32)
    assert converted.dtype == torch.float32
    assert converted.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_scalar_may_be_stored_as_a_list_of_one(folder: Path) -> None:
    load = loader_of(folder)
    assert load.tensor("model.scale", ()).item() == 0.5
    assert load.tensor("model.scale_in_a_list", ()).item() == 0.25


def test_what_is_loaded_does_not_hang_on_to_the_file(folder: Path) -> None:
    loaded = loader_of(folder).tensor("model.norm.weight", (6,))
    loaded += 1
    assert loader_of(folder).tensor("model.norm.weight", (6,)).equal(TENSORS["model.norm.weight"])


def test_tensors_that_no_layer_asked_for_are_known(folder: Path) -> None:
    load = loader_of(folder)
    for name in sorted(TENSORS)[:-1]:
        load.tensor(name, tuple(TENSORS[name].shape))
    assert load.unread() == [sorted(TENSORS)[-1]]


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named_with_its_nearest(folder: Path) -> None:
    load = loader_of(folder)
    assert not load.has("model.k_proj.weight")
    with pytest.raises(CheckpointError, match=r"'model.k_proj.weight' is missing .* nearest are model.q_proj.weight"):
        load.tensor("model.k_proj.weight", (2, 6))


def test_a_wrong_shape_names_tensor_file_and_both_shapes(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        loader_of(folder).tensor("model.q_proj.weight", (6, 4))
    for part in ("'model.q_proj.weight'", "model.safetensors", "[4, 6]", "[6, 4]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file.*fetch it again"):
        HuggingFaceFolder(folder).weights()


def test_a_shard_that_is_not_there_is_named(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names model-2-of-2\.safetensors, which is not there"):
        HuggingFaceFolder(sharded).weights()


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{"])
def test_an_index_that_is_none_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        HuggingFaceFolder(sharded).weights()


def test_a_tensor_in_two_files_is_an_error(folder: Path) -> None:
    save_file({"model.scale": TENSORS["model.scale"]}, folder / "extra.safetensors")
    files = [folder / "model.safetensors", folder / "extra.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"'model\.scale' is in both .*model\.safetensors and .*extra\.safetensors"
    ):
        SafetensorsWeights(files)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} may run code when opened and is not read; convert it"):
        HuggingFaceFolder(folder).weights()


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        HuggingFaceFolder(folder).config()


def test_a_folder_without_tokenizer_says_which_option_names_one(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="name one with --tokenizer"):
        HuggingFaceFolder(folder).tokenizer()


# --- finding ---------------------------------------------------------------------------------------------------------


class OakFormat:
    """A plugin's format: files that end in .oak."""

    name = "oak"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.suffix == ".oak" and path.is_file()

    @classmethod
    def open(cls, path: Path) -> Any:
        return f"opened {path.name}"


def test_the_first_format_that_accepts_a_path_opens_it(folder: Path) -> None:
    (folder / "tree.oak").touch()
    assert isinstance(open_checkpoint(folder, [OakFormat]), HuggingFaceFolder)
    assert open_checkpoint(folder / "tree.oak", [OakFormat]) == "opened tree.oak"


def test_a_path_that_no_format_accepts(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json; formats that were tried: huggingface, oak"):
        open_checkpoint(tmp_path, [OakFormat])
    with pytest.raises(CheckpointError, match="is not a model file; formats that were tried: huggingface, oak"):
        open_checkpoint(tmp_path / "notes.txt", [OakFormat])
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing", [OakFormat])


def test_a_local_path_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_model_path(str(folder)) == folder


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "smollm2", "a/b/c"])
def test_what_is_neither_here_nor_a_hub_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a file or folder here nor a name on the hub"):
        resolve_model_path(name)


# --- dummy weights and dtypes ----------------------------------------------------------------------------------------


def test_dummy_weights_depend_on_the_name_only() -> None:
    one, two = DummyLoader(PLACEMENT, OPERATIONS), DummyLoader(PLACEMENT, OPERATIONS)
    one.tensor("other", (3, 3))
    first = one.tensor("layer.weight", (8, 16))
    assert first.equal(two.tensor("layer.weight", (8, 16)))
    assert not first.equal(two.tensor("layer.weight_2", (8, 16)))
    assert not one.has("layer.weight")


def test_dummy_weights_have_the_shape_and_dtype_asked_for() -> None:
    load = DummyLoader(PLACEMENT, OPERATIONS)
    assert load.tensor("w", (8, 16), (slice(2, 4), slice(0, 8))).shape == (2, 8)
    assert load.tensor("q", (4, 4), dtype=torch.int32).dtype == torch.int32
    assert load.tensor("e", (4, 4), dtype=torch.float8_e4m3fn).dtype == torch.float8_e4m3fn
    assert load.tensor("norm", (16,)).equal(torch.ones(16))
    assert load.tensor("w", (64, 64)).std().item() == pytest.approx(0.02, rel=0.1)


def test_both_loaders_hand_out_kernels() -> None:
    need = NormNeed(CPU, torch.float32, 8)
    assert DummyLoader(PLACEMENT, OPERATIONS).kernel("rms_norm", need) is TorchRMSNorm


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_checkpoints_dtype_is_read_in_both_spellings(key: str) -> None:
    cuda = torch.device("cuda")
    assert choose_dtype({key: "float16"}, "auto", cuda) == torch.float16
    assert choose_dtype({key: "bfloat16"}, "auto", cuda) == torch.bfloat16
    assert choose_dtype({key: "float16"}, "float32", cuda) == torch.float32
