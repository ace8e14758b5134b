"""Which attention a server runs on a GPU: chosen or refused at the start, with what to do."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdlora_megatron.cli.main import main
from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.runtime.attention import (
    Attention,
    FlashAttention,
    choose_attention,
    use_attention,
)

ROOT = Path(__file__).parents[2]
A100, H100 = (8, 0), (9, 0)
TWO = FlashAttention(two="2.8.3")
CURE = r"pip install 'flash-attn>=2\.7\.3,<3' --no-build-isolation"
_CORE = tuple(map(int, importlib.metadata.version("megatron-core").split(".")[:2]))


@pytest.mark.parametrize(
    ("found", "capability", "kernels", "settings"),
    [
        pytest.param(TWO, A100, "flash-attn 2", {}, id="A100, two"),
        pytest.param(
            FlashAttention(two="2.7.4.post1"), H100, "flash-attn 2", {}, id="H100, two, a post"
        ),
        pytest.param(FlashAttention(three=True), H100, "flash-attn 3", {}, id="H100, three"),
        pytest.param(
            FlashAttention(four=True, two="2.8.3"), H100, "flash-attn 4", {}, id="H100, four"
        ),
        pytest.param(
            FlashAttention(four=True, two="2.8.3", can_pin=True),
            A100,
            "flash-attn 2",
            {"flash_attention_version": 2},
            id="A100, four and two, pinned",
        ),
        pytest.param(FlashAttention(), A100, "triton", {}, id="none"),
        pytest.param(FlashAttention(two="2.7.2"), A100, "triton", {}, id="two, too old"),
        pytest.param(
            FlashAttention(four=True, can_pin=True), A100, "triton", {}, id="A100, four alone"
        ),
    ],
)
def test_the_choice(found, capability, kernels, settings):
    choice = choose_attention(found, capability=capability, block_size=256)
    assert (choice.kernels, dict(choice.settings)) == (kernels, settings)
    assert (choice.note is not None) == (kernels == "triton")


def test_what_is_missing_comes_with_its_cure():
    for found, said in (
        (FlashAttention(), "not installed"),
        (FlashAttention(two="2.6.3"), r"2\.6\.3, older than 2\.7\.3"),
        (FlashAttention(broken="2.8.3 is installed and cannot be imported (x)"), r"2\.8\.3 is"),
        (FlashAttention(four=True, can_pin=True), "flash-attn-4 .* and flash-attn 2 is not"),
    ):
        choice = choose_attention(found, capability=A100, block_size=16)
        assert re.search(f"{said}.*{CURE}", choice.note), choice.note


def test_what_cannot_work_is_refused():
    four = FlashAttention(four=True, two="2.8.3")
    with pytest.raises(UnsupportedError, match=r"pip uninstall flash-attn-4.*megatron-core 0\.19"):
        choose_attention(four, capability=A100, block_size=256)
    with pytest.raises(UnsupportedError, match=r"capability 7\.5; serving needs 8\.0"):
        choose_attention(TWO, capability=(7, 5), block_size=256)
    with pytest.raises(ConfigError, match=r"block_size=64; .*set block_size=256"):
        choose_attention(TWO, capability=A100, block_size=64)
    with pytest.raises(ConfigError, match="dtype=float64 on a GPU"):
        use_attention(Attention(kernels="flash-attn 2"), torch.float64)


def _package(folder, *, two=None, four=None, broken=None):
    """What pip leaves of flash-attn and flash-attn-4, as far as Megatron-Core looks."""
    package = folder / "flash_attn"
    package.mkdir()
    if two is not None:
        functions = "flash_attn_varlen_func = flash_attn_with_kvcache = print\n"
        if broken is not None:
            functions = f"raise ImportError({broken!r})\n"
        (package / "__init__.py").write_text(f"__version__ = {two!r}\n{functions}")
        _metadata(folder, "flash_attn", "flash-attn", two)
    if four is not None:
        (package / "cute").mkdir()
        (package / "cute" / "__init__.py").write_text("flash_attn_varlen_func = print\n")
        _metadata(folder, "flash_attn_4", "flash-attn-4", four)


def _metadata(folder, stem, name, version):
    info = folder / f"{stem}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


_FOUND = """
import warnings
warnings.simplefilter("ignore")
from bdlora_megatron.runtime.attention import FlashAttention
print(FlashAttention.installed())
"""


@pytest.mark.parametrize(
    ("packages", "two", "four"),
    [
        pytest.param({}, None, False, id="none"),
        pytest.param({"two": "2.8.3"}, "2.8.3", False, id="two"),
        # Built for another torch: the commonest trouble that people report.
        pytest.param(
            {"two": "2.8.3", "broken": "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda"},
            None,
            False,
            id="two, broken",
        ),
        # Its folder has no __init__.py of its own: flash_attn can be imported, and holds nothing.
        pytest.param({"four": "4.0.0b23"}, None, _CORE >= (0, 18), id="four alone"),
        pytest.param({"two": "2.8.3", "four": "4.0.0b23"}, "2.8.3", _CORE >= (0, 18), id="both"),
    ],
)
def test_what_the_installed_megatron_finds(tmp_path, packages, two, four):
    if packages:
        _package(tmp_path, **packages)
    done = subprocess.run(
        [sys.executable, "-c", _FOUND],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    why = packages.get("broken")
    wanted = FlashAttention(
        two=two,
        broken=why and f"2.8.3 is installed and cannot be imported ({why})",
        four=four,
        can_pin=_CORE >= (0, 19),
    )
    assert done.stdout.strip() == str(wanted), done.stderr


_START = """
import sys
from bdlora_megatron.serve.ranks import Ranks
from bdlora_megatron.serve.settings import ServeSettings
if __name__ == "__main__":
    ranks = Ranks(ServeSettings(model="m", cpu=True))
    ranks.processes[0].join(100)
    sys.exit(ranks.processes[0].exitcode)
"""


@pytest.mark.skipif(_CORE < (0, 18), reason="this Megatron-Core does not look for flash-attn-4")
def test_a_broken_flash_attn_4_is_named(tmp_path):
    """Importing it fails otherwise than Megatron-Core expects, and takes Megatron-Core along."""
    _package(tmp_path, four="4.0.0b23")
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("raise AttributeError('dsl')\n")
    (tmp_path / "start.py").write_text(_START)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "start.py")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot import what it serves with; flash-attn-4 is broken here" in done.stderr
    assert "AttributeError: dsl" in done.stderr


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to serve from")
@pytest.mark.parametrize("command", ["serve", "generate"])
def test_a_server_without_gpu_or_cpu_says_so(tmp_path, capsys, command):
    (tmp_path / "config.json").write_text("{}")
    files = [str(tmp_path / "in"), str(tmp_path / "out")] if command == "generate" else []
    assert main([command, *files, "--model", str(tmp_path)]) == 2
    assert "no CUDA device is present; add --cpu" in capsys.readouterr().err
