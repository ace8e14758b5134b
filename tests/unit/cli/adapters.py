"""Small adapters in folders, for the command line."""

from __future__ import annotations

import json

import torch

from bdlora_megatron.cli.main import main
from bdlora_megatron.convert import read_adapter
from tests.unit.convert.peft_files import vanilla_tensors, write


def make_adapters(folder, count, *, rank=4, layers=1):
    """`count` vanilla adapters of different numbers, named a00, a01 and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        tensors = {
            name: tensor * (1 + number / 8)
            for name, tensor in vanilla_tensors(rank=rank, layers=layers).items()
        }
        made.append(write(folder / f"a{number:02}", tensors, r=rank))
    return made


def run(capsys, *arguments):
    """Run the command in this process: exit status, stdout, stderr."""
    status = main([*map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


def visible(folder):
    """What a user sees in a folder of results."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def assert_same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def factors_of(folder):
    return {
        str(key): torch.cat([f.A.flatten(), f.B.flatten()])
        for key, f in read_adapter(folder).modules.items()
    }
