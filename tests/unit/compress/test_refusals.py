"""What is no collection to compress, and what is none to read."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlora_megatron.compress import (
    CompressOptions,
    FolderSource,
    compress_adapters,
    read_collection,
)
from bdlora_megatron.convert import read_adapter, write_adapter
from bdlora_megatron.errors import AdapterFormatError, BDLoRAError, ConfigError, UnsupportedError
from tests.unit.cli.adapters import make_adapters, run
from tests.unit.compress.planted import sources_of
from tests.unit.convert.peft_files import vanilla_tensors, write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0; wanted 1 or more"),
        ({"core": "half"}, "core='half'; wanted one of full, diagonal"),
        ({"form": "cut"}, "form='cut'; wanted one of shared, blocked"),
        ({"form": "blocked"}, "the blocked form needs the tensor-parallel size"),
        ({"tp": 2}, "tp=2 is for the blocked form"),
        ({"form": "blocked", "tp": 3, "rank": 8}, "rank=8 is no multiple of tp=3"),
        ({"form": "blocked", "tp": 0}, "tp=0; wanted 1 or more"),
        ({"clusters": 0}, "clusters=0; wanted 1 or more"),
        ({"cluster_modules": -1}, "cluster_modules=-1; wanted"),
        ({"max_error": 1.5}, "max_error=1.5; wanted"),
        ({"max_error": math.nan}, "max_error"),
        ({"dtype": torch.int8}, "dtype=torch.int8; wanted one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        CompressOptions(**({"rank": 4} | options))


def test_all_options_that_are_wrong_are_told_at_once():
    with pytest.raises(ConfigError, match=r"core='x'.*rank=0.*clusters=0"):
        CompressOptions(rank=0, core="x", clusters=0)


def test_everything_wrong_with_adapters_is_told_at_once(tmp_path):
    good = make_adapters(tmp_path / "good", 2)
    other = {
        name: tensor[:, :40].contiguous() if "q_proj.lora_A" in name else tensor
        for name, tensor in vanilla_tensors(rank=4, layers=1, modules=["self_attn.q_proj"]).items()
    }
    wide = write(tmp_path / "wide", other, r=4)
    broken = write(tmp_path / "broken", vanilla_tensors(rank=4), r=4, use_dora=True)
    nan = write(
        tmp_path / "nan", {n: t.fill_(math.nan) for n, t in vanilla_tensors(rank=4).items()}, r=4
    )
    sources = sources_of(*good, wide, broken, nan, tmp_path / "missing")
    sources.append(FolderSource(name=good[0].name, path=good[0]))
    sources.append(FolderSource(name="../up", path=good[0]))
    with pytest.raises(ConfigError) as caught:
        compress_adapters(sources, tmp_path / "out", CompressOptions(rank=41, clusters=9))
    told = str(caught.value)
    for part in (
        "2 adapters are named 'a00'; rename one",
        "'../up', which is no name of a folder",
        "hidden_size is 40 and not 48 as in a00",
        "(in wide)",
        "use_dora is set",
        "NaN or infinity",
        "missing is no folder",
        "rank 41 is more than 40",
        "layers.0.self_attn.k_proj",
        "9 clusters are wanted of 8 adapters",
    ):
        assert part in told, part
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".out*"))


def test_there_is_nothing_to_compress(tmp_path):
    with pytest.raises(ConfigError, match="no adapters to compress"):
        compress_adapters([], tmp_path / "out", CompressOptions(rank=4))
    folders = make_adapters(tmp_path / "src", 1)
    with pytest.raises(ConfigError, match="workers=0"):
        compress_adapters(
            sources_of(*folders), tmp_path / "out", CompressOptions(rank=4), workers=0
        )


def test_a_size_that_does_not_divide_a_module(tmp_path):
    folders = make_adapters(tmp_path / "src", 1)
    with pytest.raises(ConfigError, match=r"not a multiple of num_blocks=16; use a .* 1, 2, 4, 8"):
        compress_adapters(
            sources_of(*folders),
            tmp_path / "out",
            CompressOptions(rank=16, form="blocked", tp=16),
        )


def test_a_type_that_is_too_small_for_cores(tmp_path):
    tensors = {n: t * 1e4 for n, t in vanilla_tensors(rank=4, layers=1).items()}
    folder = write(tmp_path / "large", tensors, r=4)
    with pytest.raises(
        UnsupportedError, match=r"exceed 65504, the largest number of torch.float16"
    ):
        compress_adapters(
            sources_of(folder), tmp_path / "out", CompressOptions(rank=4, dtype=torch.float16)
        )
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_alike(tmp_path, capsys):
    folders = make_adapters(tmp_path / "src", 2)
    out = ["--out", tmp_path / "out", "--rank", 4, "--workers", 1]
    for arguments, message in (
        ([tmp_path], "is no adapter of a known format"),
        ([*folders, tmp_path / "src"], "2 adapters are named 'a00'"),
        ([*folders, "--ignore-unknown", "r"], "r cannot be ignored"),
        ([*folders, "--clusters", 3], "3 clusters are wanted of 2 adapters"),
        ([*folders, "--out", folders[0] / "in"], "over or into the source"),
    ):
        status, _, said = run(capsys, "compress", *out, *arguments)
        assert (status, message in said) == (2, True), said


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A collection of two adapters in two clusters."""
    root = tmp_path_factory.mktemp("made")
    folders = make_adapters(root / "src", 1)
    tensors = {n: t.roll(1, 0) for n, t in vanilla_tensors(rank=4, layers=1).items()}
    folders.append(write(root / "src" / "b", tensors, r=4))
    options = CompressOptions(rank=4, clusters=2)
    compress_adapters(sources_of(*folders), root / "out", options)
    # Clusters are numbered by their contents; tests damage the first.
    assert [entry.cluster for entry in read_collection(root / "out").manifest.adapters] == [1, 0]
    return root / "out"


@pytest.fixture
def collection(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def edited(path, **changes):
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | changes))


def test_a_collection_may_be_moved_whole(collection):
    assert len(read_adapter(collection / "adapters" / "b").modules) == 7
    assert read_collection(collection).manifest.clusters == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2; wanted 'bdlora-collection', version 1"),
        ({"rank": "4"}, "rank is '4'; wanted a whole number"),
        ({"more": 1}, "more is"),
        ({"clusters": 1}, r"there are 1 clusters, counted from 0 \(in a00\)"),
        ({"num_blocks": 2}, "form shared, num_blocks 2 and rank 4 disagree"),
        ({"adapters": [{"name": "../a", "cluster": 0, "error": 0.0}]}, "adapters.0.name"),
        ({"adapters": 2 * [{"name": "a", "cluster": 0, "error": 0.0}]}, "one name twice"),
        ({"modules": []}, "tensors are of no module in collection.json"),
        ({"dtype": "bfloat16"}, "no bfloat16|not bfloat16|in bfloat16"),
        ({"core": "diagonal"}, "no diagonal core"),
        ({"rank": 3}, "one number of columns each"),
        ({"fingerprint": "0"}, "is of another collection"),
    ],
)
def test_a_broken_collection_is_refused(changes, message, collection):
    edited(collection / "collection.json", **changes)
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(collection / "adapters" / "b")


def test_a_core_alone_means_nothing(collection, tmp_path):
    alone = shutil.copytree(collection / "adapters" / "b", tmp_path / "alone" / "a00")
    with pytest.raises(AdapterFormatError, match="needs the basis in its collection"):
        read_adapter(alone)
    (collection / "adapters" / "b").rename(collection / "adapters" / "c")
    with pytest.raises(AdapterFormatError, match="holds the core of 'b'"):
        read_adapter(collection / "adapters" / "c")
    with pytest.raises(AdapterFormatError, match="it is a collection; pass"):
        read_adapter(collection)
    with pytest.raises(AdapterFormatError, match=r"holds no collection\.json"):
        read_collection(tmp_path)


def test_bases_of_another_cluster_are_refused(collection):
    core = collection / "adapters" / "b" / "core.json"
    edited(core, cluster=1)
    with pytest.raises(AdapterFormatError, match="another collection"):
        read_adapter(core.parent)


@pytest.mark.parametrize("file", ["cluster_000/basis.safetensors", "adapters/b/core.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "nan", "shape", "less", "columns"])
def test_damaged_tensors_are_refused(file, damage, collection):
    path = collection / file
    tensors = load_file(path)
    name = min(tensors)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        if damage == "nan":
            tensors[name][0, 0, 0] = math.nan
        elif damage == "shape":
            tensors[name] = tensors[name][0]
        elif damage == "columns":
            tensors[name] = tensors[name][..., :-1].contiguous()
        else:
            del tensors[name]
        save_file(tensors, path)
    with pytest.raises(AdapterFormatError):
        read_adapter(collection / "adapters" / "b")


@pytest.mark.parametrize(
    "file", ["collection.json", "adapters/b/core.json", "cluster_000/basis.safetensors"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_files_of_anything_are_refused(file, content, collection):
    (collection / file).write_bytes(content)
    with pytest.raises(BDLoRAError) as caught:
        read_adapter(collection / "adapters" / "b")
    assert len(str(caught.value)) < 10_000


def test_an_activated_lora_is_refused_by_name(tmp_path):
    tensors = vanilla_tensors(rank=4, layers=1, modules=["self_attn.q_proj"])
    write(tmp_path / "plain", tensors, r=4)
    write(
        tmp_path / "activated", tensors, r=4, task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4]
    )
    sources = [FolderSource(name=n, path=tmp_path / n) for n in ("plain", "activated")]
    with pytest.raises(ConfigError, match="activated: it acts from its invocation tokens on"):
        compress_adapters(sources, tmp_path / "out", CompressOptions(rank=4))
    assert not (tmp_path / "out").exists()


def test_an_adapter_cannot_be_written_compressed_by_itself(collection, tmp_path):
    adapter = read_adapter(collection / "adapters" / "b")
    with pytest.raises(UnsupportedError, match="bdlora compress makes one"):
        write_adapter(adapter, tmp_path / "x", "compressed")
