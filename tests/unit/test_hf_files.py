"""Reading slices of safetensors files, and refusing folders that are not whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.models import TensorFiles

TENSORS = {"a": torch.arange(15.0).reshape(5, 3), "b": torch.arange(4.0)}


def write(folder, weight_map, files):
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if weight_map is not None:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))


def sharded(folder):
    files = {"m1.safetensors": {"a": TENSORS["a"]}, "m2.safetensors": {"b": TENSORS["b"]}}
    write(folder, {"a": "m1.safetensors", "b": "m2.safetensors"}, files)


def single(folder):
    write(folder, None, {"model.safetensors": TENSORS})


@pytest.mark.parametrize("make", [single, sharded])
def test_slices(make, tmp_path):
    make(tmp_path)
    with TensorFiles(tmp_path) as files:
        assert files.shapes == {"a": (5, 3), "b": (4,)}
        assert torch.equal(files.rows("a", 1, 4), TENSORS["a"][1:4])
        assert torch.equal(files.columns("a", 1, 3), TENSORS["a"][:, 1:3])
        assert torch.equal(files.rows("b", 2, 4), TENSORS["b"][2:4])


def test_incomplete_folders_are_refused_with_everything_that_is_wrong(tmp_path):
    sharded(tmp_path)
    (tmp_path / "m1.safetensors").write_bytes(b"not a header")
    weight_map = {
        "a": "m1.safetensors",
        "b": "m3.safetensors",
        "c": "m2.safetensors",
        "d": "../model.safetensors",
    }
    write(tmp_path, weight_map, {})
    with pytest.raises(ConfigError, match="download them again") as caught:
        TensorFiles(tmp_path)
    for problem in (
        "m1.safetensors cannot be read",
        "m3.safetensors cannot be read",
        "b is in m2.safetensors, the index says m3.safetensors",
        "c is not in m2.safetensors, where the index says it is",
        "../model.safetensors cannot be read: the index names a file outside the folder",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="is not an index of weights"):
        TensorFiles(tmp_path)


def test_pickles_are_refused_unread(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin and no safetensors"):
        TensorFiles(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor"):
        TensorFiles(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="type I8; supported"):
        TensorFiles(tmp_path)
