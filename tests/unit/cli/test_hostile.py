"""Files made to break a reader: an error in bounded memory and time, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch

from tests.unit.cli.adapters import make_adapters, visible
from tests.unit.convert.peft_files import vanilla_tensors, write

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body, *, size=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def edit(change):
    """A good adapter whose header and body are changed."""

    def make(folder):
        path = write(folder, vanilla_tensors(layers=1)) / "adapter_model.safetensors"
        header, body = header_of(path.read_bytes())
        path.write_bytes(change(header, body))

    return make


def renamed(old, new):
    return edit(lambda header, body: with_header({new(n, old): e for n, e in header.items()}, body))


def shape(value, *, offsets=None):
    def change(header, body):
        header[f"{Q}A.weight"]["shape"] = value
        if offsets:
            header[f"{Q}A.weight"]["data_offsets"] = offsets
        return with_header(header, body)

    return edit(change)


def sparse(rank, width):
    """A file as large as its header says, which takes no space on disk."""

    def make(folder):
        entries, end = {}, 0
        for factor, size in (("A", [rank, width]), ("B", [80, rank])):
            begin, end = end, end + 2 * size[0] * size[1]
            entries[f"{Q}{factor}.weight"] = {
                "dtype": "BF16",
                "shape": size,
                "data_offsets": [begin, end],
            }
        write(folder, {}, r=rank)
        data = with_header(entries, b"")
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(data)
            file.truncate(len(data) + end)

    return make


def config(**changes):
    return lambda folder: write(folder, vanilla_tensors(layers=1), **changes)


def config_text(text):
    def make(folder):
        (write(folder) / "adapter_config.json").write_text(text)

    return make


def large_config(folder):
    with (write(folder) / "adapter_config.json").open("wb") as file:
        file.write(b"{")
        file.truncate(8 << 30)


def numbers(value):
    def make(folder):
        tensors = vanilla_tensors(layers=1)
        tensors[f"{Q}B.weight"][3, 1] = value
        write(folder, tensors)

    return make


def no_rank(folder):
    tensors = {
        name: tensor[:0] if "lora_A" in name else tensor[:, :0]
        for name, tensor in vanilla_tensors(layers=1).items()
    }
    write(folder, tensors, r=0)


def no_rank_of_eight(folder):
    no_rank(folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "r": 8}))


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {Bomb.mark}",)


def bomb(folder):
    Bomb.mark = folder.parent / "exploded"
    (write(folder) / "adapter_model.safetensors").unlink()
    with (folder / "adapter_model.bin").open("wb") as file:
        pickle.dump({"weights": Bomb()}, file)


def zipped_bomb(folder):
    Bomb.mark = folder.parent / "exploded"
    (write(folder) / "adapter_model.safetensors").unlink()
    torch.save({"weights": Bomb()}, folder / "adapter_model.bin")


def pipe(folder):
    (write(folder) / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


CASES = {
    "empty_file": (edit(lambda h, b: b""), "cannot be read"),
    "cut_in_the_length": (edit(lambda h, b: with_header(h, b)[:5]), "cannot be read"),
    "cut_in_the_header": (edit(lambda h, b: with_header(h, b)[:200]), "cannot be read"),
    "cut_in_the_numbers": (edit(lambda h, b: with_header(h, b[:-1])), "cannot be read"),
    "longer_than_it_says": (edit(lambda h, b: with_header(h, b + b"x")), "cannot be read"),
    "header_of_exabytes": (edit(lambda h, b: with_header(h, b, size=2**63)), "header"),
    "header_of_a_gigabyte": (edit(lambda h, b: with_header(h, b, size=2**30)), "header"),
    "no_json": (edit(lambda h, b: struct.pack("<Q", 8) + b"{{{{{{{{" + b), "cannot be read"),
    "deep_json": (
        edit(lambda h, b: struct.pack("<Q", 200_000) + b"[" * 200_000 + b),
        "cannot be read",
    ),
    "gigantic_shape": (shape([2**40, 2**40]), "cannot be read"),
    "shape_that_overflows": (shape([2**33, 2**33, 4]), "cannot be read"),
    "negative_shape": (shape([-8, -48]), "cannot be read"),
    "offsets_beyond": (shape([8, 48], offsets=[2**50, 2**50 + 1536]), "cannot be read"),
    "offsets_that_overlap": (shape([8, 48], offsets=[0, 1536]), "cannot be read"),
    "offsets_backwards": (shape([8, 48], offsets=[1536, 0]), "cannot be read"),
    "numbers_beyond_memory": (sparse(8, 2**32), "memory"),
    "rank_beyond_memory": (sparse(2**24, 4096), "memory"),
    "path_in_a_name": (renamed("model.layers", lambda n, o: n.replace(o, "../../layers")), ""),
    "absolute_path_in_a_name": (renamed("q_proj", lambda n, o: n.replace(o, "/etc/passwd")), ""),
    "control_in_a_name": (renamed("q_proj", lambda n, o: n.replace(o, "\x1b[2Jq_proj")), ""),
    "long_name": (renamed("q_proj", lambda n, o: n.replace(o, "q" * 100_000)), ""),
    "not_a_number": (numbers(float("nan")), "NaN or infinity"),
    "infinite": (numbers(float("-inf")), "NaN or infinity"),
    "no_rank": (no_rank, "r is 0, wanted a positive integer"),
    "no_rank_of_eight": (no_rank_of_eight, "lora_A has shape"),
    "config_no_json": (config_text('{"r": 8'), "is no JSON"),
    "config_list": (config_text("[]"), "wanted an object"),
    "config_deep": (config_text("[" * 100_000), "is no JSON"),
    "config_large": (large_config, ""),
    "config_huge_number": (config_text('{"r": 1' + "0" * 5000 + "}"), ""),
    "rank_infinite": (config(r=float("inf")), "wanted a positive integer"),
    "alpha_infinite": (config(lora_alpha=float("nan")), "wanted a finite number"),
    "regex_for_years": (config(rank_pattern={r"(\w|.|\.|[a-z])+\d\d\d": 4}), "takes too long"),
    "blocks_beyond": (config(use_bdlora={"nblocks": 2**60, "target_modules_bd_b": ["q"]}), ""),
    "pickle": (bomb, "a pickle can run code"),
    "zipped_pickle": (zipped_bomb, "a pickle can run code"),
    "pipe": (pipe, ""),
}
ALLOWED = {"pickle": "cannot be read as tensors alone", "zipped_pickle": "tensors alone"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Every case, inspected and converted in one process with little memory."""
    root = tmp_path_factory.mktemp("hostile")
    commands = {}
    for name, (make, _) in CASES.items():
        make(root / name)
        out = ["--to", "peft", "--workers", "1", "--out", str(root / "out")]
        more = ["--structure", "exact", "--tp", "2"]
        commands["inspect", name] = ["inspect", str(root / name)]
        commands["convert", name] = ["convert", str(root / name), *out, *more]
    for name in ALLOWED:
        commands["allow", name] = [*commands["convert", name], "--allow-pickle"]
    make_adapters(root / "in", 1)
    commands["good", "good"] = ["convert", str(root / "in"), *out, *more]
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.cli.hostile_run"],
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root, dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_bounded_memory_and_time(case, command, told):
    result = told[1][command, case]
    assert result["status"] == 1, result
    assert CASES[case][1] in result["printed"]
    assert "internal error" not in result["printed"]
    assert "Traceback" not in result["printed"]
    assert "\x1b" not in result["printed"]
    assert len(result["printed"]) < 4000
    assert result["more_bytes"] < 300 << 20
    assert result["seconds"] < 60


@pytest.mark.parametrize("case", ALLOWED)
def test_a_pickle_runs_no_code_even_if_it_may_be_read(case, told):
    root, results = told
    assert results["allow", case]["status"] == 1
    assert ALLOWED[case] in results["allow", case]["printed"]
    assert not (root / "exploded").exists()


def test_nothing_was_written_but_the_good_one(told):
    root, results = told
    assert results["good", "good"]["status"] == 0, results["good", "good"]
    assert visible(root / "out") == ["a00"]
    assert {path.name for path in root.iterdir()} == {*CASES, "in", "out"}
    hidden = {path.name for path in (root / "out").iterdir()} - {"a00"}
    assert hidden == {".bdlora"}
    assert {path.name for path in (root / "out/.bdlora").iterdir()} == {"lock", "a00.json"}
