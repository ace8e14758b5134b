"""Readers of every format, fed files with random damage: an adapter or a refusal, nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdlora_megatron.blocks import all_finite
from bdlora_megatron.convert import ModuleKey, WriteOptions, write_adapter
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES
from bdlora_megatron.convert.registry import FORMATS, read_adapter
from bdlora_megatron.errors import BDLoRAError
from tests.unit.convert.random_adapters import adapter, factors

fuzz = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
#: Values that are wrong nearly everywhere in a config, or right in a strange way.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf"), 0.5]),
    st.sampled_from(["", "a", "../../etc/passwd", "\x00", "\ud800", "q_proj", "lora_A", "(" * 30]),
    st.lists(st.integers(-1, 3), max_size=2),
    st.dictionaries(st.sampled_from(["q_proj", "nblocks", "a"]), st.integers(-1, 3), max_size=2),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small adapter in every format."""
    root = tmp_path_factory.mktemp("good")
    made = {}
    for name in FORMATS:
        # S-LoRA adapts attention, all of it and nothing else.
        wanted = MODULE_NAMES[:4] if name == "slora" else MODULE_NAMES
        modules = {ModuleKey(layer=0, name=n): factors(n, rank=4, kv_heads=8) for n in wanted}
        source = adapter(modules, kv_heads=8, layers=1)
        made[name] = write_adapter(source, root / name, name, options=WriteOptions(tp=2))
    return made


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def read_damaged(good, damage):
    """Read a damaged copy; what is read must be sound, and a refusal must be ours."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        shutil.copytree(good, folder)
        damage(folder)
        for allow_pickle in (False, True):
            got, refusal = None, None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    got = read_adapter(folder, allow_pickle=allow_pickle)
            except BDLoRAError as error:
                refusal = str(error)
            if got is None:
                assert 0 < len(refusal) < 10_000
            else:
                assert all(all_finite(f.A, f.B) for f in got.modules.values())


@pytest.mark.parametrize("name", FORMATS)
@fuzz
@given(st.data())
def test_bytes_are_changed_cut_or_put_in(name, folders, data):
    good = folders[name]
    path = data.draw(st.sampled_from(files_of(good)))
    content = (good / path).read_bytes()
    # Heads of files hold structure, the rest mostly numbers.
    places = st.one_of(st.integers(0, min(len(content), 400)), st.integers(0, len(content)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(places)
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "remove"]))
        new = data.draw(st.binary(min_size=1, max_size=9))
        if kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + new + content[place:]
        elif kind == "remove":
            content = content[:place] + content[place + len(new) :]
        else:
            content = content[:place] + new + content[place + len(new) :]
    read_damaged(good, lambda folder: (folder / path).write_bytes(content))


@pytest.mark.parametrize("name", FORMATS)
@fuzz
@given(st.data())
def test_values_of_json_are_replaced(name, folders, data):
    good = folders[name]
    texts = [path for path in files_of(good) if path.suffix == ".json"]
    if not texts:
        return
    path = data.draw(st.sampled_from(texts))
    raw = json.loads((good / path).read_text())
    parent, key = data.draw(st.sampled_from(list(_places(raw)) or [({}, "a")]))
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent[data.draw(st.text(max_size=5))] = data.draw(ODD)
    else:
        parent[key] = data.draw(ODD)
    text = json.dumps(raw)
    read_damaged(good, lambda folder: (folder / path).write_text(text))


def _places(value):
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


@pytest.mark.parametrize("name", FORMATS)
def test_any_file_may_be_missing_empty_or_a_folder(name, folders):
    for path in files_of(folders[name]):
        for damage in (
            lambda folder, path=path: (folder / path).unlink(),
            lambda folder, path=path: (folder / path).write_bytes(b""),
            lambda folder, path=path: ((folder / path).unlink(), (folder / path).mkdir()),
        ):
            read_damaged(folders[name], damage)
