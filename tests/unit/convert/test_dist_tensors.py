"""Distributed checkpoints from strangers: nothing runs, nothing is taken on trust."""

from __future__ import annotations

import io
import os
import pickle
import resource
import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bdlora_megatron.convert.megatron.dist_tensors import Chunk, open_dist_tensors
from bdlora_megatron.convert.megatron.dist_writer import write_dist_tensors
from bdlora_megatron.errors import AdapterFormatError

TALL = torch.arange(24.0).view(6, 4)


def halves(folder):
    """A tensor in two chunks, and a stack of two layers."""
    folder.mkdir()
    chunks = [
        Chunk(name="a", size=(6, 4), offsets=(3 * n, 0), sizes=(3, 4), dtype=torch.float32)
        for n in range(2)
    ] + [
        Chunk(name="b", size=(2, 6, 4), offsets=(n, 0, 0), sizes=(1, 6, 4), dtype=torch.float32)
        for n in range(2)
    ]
    parts = [TALL[:3], TALL[3:], TALL.unsqueeze(0), -TALL.unsqueeze(0)]
    write_dist_tensors(folder, chunks, lambda number: parts[number], {})
    return folder


def change(folder, edit):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def refused(folder, name="a", layer=None):
    with pytest.raises(AdapterFormatError) as caught:
        open_dist_tensors(folder).load(name, layer)
    return str(caught.value)


def test_tensors_and_layers_are_put_together(tmp_path):
    tensors = open_dist_tensors(halves(tmp_path / "x"))
    assert torch.equal(tensors.load("a", None), TALL)
    assert torch.equal(tensors.load("b", 0), TALL)
    assert torch.equal(tensors.load("b", 1), -TALL)
    assert torch.equal(tensors.load("b", None), torch.stack([TALL, -TALL]))
    assert tensors.row_parts == {"a": 2, "b": 1}
    assert tensors.facts["b"].is_meta


def test_what_older_releases_save_is_read(tmp_path):
    """Megatron-Core 0.14 and 0.15 save metadata and plans of classes of their own."""
    strategy = "megatron.core.dist_checkpointing.strategies.torch"
    old = {
        name: type(name, (), {"__module__": strategy})
        for name in ("MCoreMetadata", "MCoreSavePlan")
    }
    folder = halves(tmp_path / "x")
    path = folder / ".metadata"
    saved, plan = old["MCoreMetadata"](), old["MCoreSavePlan"]()
    vars(plan).update(items=[], mcore_data={"a": {"nd_reformulated_orig_global_shape": (6, 4)}})
    vars(saved).update(vars(pickle.loads(path.read_bytes())), mcore_data={}, all_local_plans=[plan])
    with pytest.MonkeyPatch.context() as patch:
        module = ModuleType(strategy)
        vars(module).update(old)
        patch.setitem(sys.modules, strategy, module)
        path.write_bytes(pickle.dumps(saved))
    assert torch.equal(open_dist_tensors(folder).load("a", None), TALL)


class _ByName(pickle.Pickler):
    """As Python 3.11.2, Debian's, pickles the members of enumerations."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_members_pickled_by_name_are_read(tmp_path):
    folder = halves(tmp_path / "x")
    path, stream = folder / ".metadata", io.BytesIO()
    _ByName(stream).dump(pickle.loads(path.read_bytes()))
    assert b"getattr" in stream.getvalue()
    path.write_bytes(stream.getvalue())
    assert torch.equal(open_dist_tensors(folder).load("a", None), TALL)


class _Asks:
    """An attribute of a class that metadata may name."""

    def __reduce__(self):
        return getattr, (TensorProperties, "__init__")


def test_no_other_attribute_is_given(tmp_path):
    folder = halves(tmp_path / "x")
    (folder / ".metadata").write_bytes(pickle.dumps(_Asks()))
    assert "asks for '__init__' of " in refused(folder)


class _RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("was-run",))


@pytest.mark.parametrize("place", ["metadata", "part"])
def test_pickled_code_is_never_run(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = halves(tmp_path / "x")
    if place == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(_RunsCode()))
        assert "names posix.mkdir, which has no place there" in refused(folder)
    else:
        file = next(folder.glob("*.distcp"))
        data = file.read_bytes()
        code = pickle.dumps(_RunsCode())
        file.write_bytes(code + data[len(code) :])
        assert "cannot be read as a distributed checkpoint" in refused(folder)
    assert not (tmp_path / "was-run").exists()


def test_a_pickle_that_is_cut_or_missing_is_refused(tmp_path):
    folder = halves(tmp_path / "x")
    whole = (folder / ".metadata").read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (folder / ".metadata").write_bytes(whole[:length])
        assert "cannot be read" in refused(folder)
    (folder / ".metadata").unlink()
    assert "cannot be read" in refused(folder)


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(pickle.FRAME + (1 << 62).to_bytes(8, "little"), id="frame"),
        pytest.param(pickle.BINBYTES8 + (1 << 62).to_bytes(8, "little"), id="bytes"),
        # The unpickler would make room for four thousand million objects: 34 GB of zeros.
        pytest.param(pickle.NONE + pickle.LONG_BINPUT + b"\xff" * 4, id="remembered"),
        pytest.param(pickle.NONE + pickle.PUT + b"4000000000\n", id="remembered as text"),
    ],
)
def test_metadata_that_claims_to_be_huge_takes_no_memory(claim, tmp_path):
    folder = halves(tmp_path / "x")
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(whole[:2] + claim + whole[2:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB"


def _gap(metadata):
    metadata.state_dict_metadata["a"].chunks.pop()


def _overlap(metadata):
    chunk = metadata.state_dict_metadata["a"].chunks[1]
    index = next(i for i in metadata.storage_data if i.fqn == "a" and i.offset[0] == 3)
    chunk.offsets = torch.Size((2, 0))
    metadata.storage_data[MetadataIndex("a", chunk.offsets)] = metadata.storage_data.pop(index)


def _huge(metadata):
    size = torch.Size((1 << 40, 4))
    metadata.state_dict_metadata["a"] = TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.float32),
        size=size,
        chunks=[ChunkStorageMetadata(offsets=torch.Size((0, 0)), sizes=size)],
    )


def _outside(metadata):
    metadata.state_dict_metadata["a"].chunks[1].sizes = torch.Size((9, 4))


def _info(metadata, **changes):
    for index, info in metadata.storage_data.items():
        if index.fqn == "a":
            for name, value in changes.items():
                setattr(info, name, value)


EDITS = {
    "gap": (_gap, "do not fill it (12 of 24 numbers)"),
    "overlap": (_overlap, "do not fill it"),
    "outside": (_outside, "do not fill it"),
    "huge": (_huge, "claims more numbers than the files hold"),
    "traversal": (lambda m: _info(m, relative_path="../../etc/passwd"), "is missing"),
    "absolute": (lambda m: _info(m, relative_path="/etc/passwd"), "is missing"),
    "short": (lambda m: _info(m, length=1 << 40), "is too short for a"),
    "negative": (lambda m: _info(m, offset=-5), "is too short for a"),
    "shape": (lambda m: _swap(m), "where its metadata says"),
    "no-place": (lambda m: m.storage_data.clear(), "cannot be read"),
    "nonsense": (lambda m: setattr(m, "state_dict_metadata", 3), "cannot be read"),
}


def _swap(metadata):
    """Point a part of one tensor at a part of another, with another shape."""
    stack = next(info for i, info in metadata.storage_data.items() if i.fqn == "b")
    for index in list(metadata.storage_data):
        if index.fqn == "a":
            metadata.storage_data[index] = stack


@pytest.mark.parametrize("case", EDITS)
def test_metadata_that_lies_is_refused_in_little_memory(case, tmp_path):
    edit, why = EDITS[case]
    assert why in refused(change(halves(tmp_path / "x"), edit))


def test_too_many_parts_are_refused(tmp_path):
    def edit(metadata):
        entry = metadata.state_dict_metadata["a"]
        entry.chunks = entry.chunks * 1000

    assert "is in 2000 parts, more than 1024" in refused(change(halves(tmp_path / "x"), edit))


def test_objects_and_other_types_are_told_apart(tmp_path):
    tmp_path.joinpath("x").mkdir()
    chunk = Chunk(name="n", size=(2,), offsets=(0,), sizes=(2,), dtype=torch.int64)
    write_dist_tensors(tmp_path / "x", [chunk], lambda _: torch.ones(2, dtype=torch.int64), {})
    tensors = open_dist_tensors(tmp_path / "x")
    assert tensors.facts == {"n": None}
    assert isinstance(pickle.loads((tmp_path / "x" / ".metadata").read_bytes()), Metadata)
