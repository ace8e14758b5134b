"""What the one module on Megatron-Core's releases tells the rest of the package."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.versions import layers as versions
from bdlora_megatron.runtime.versions.known import require_engine
from bdlora_megatron.serve.engine import ServingEngine
from tests.harness import run_ranks
from tests.tp.session import model_parallel


def test_submodules_are_found_in_every_form_of_a_specification():
    inside = MLPSubmodules(linear_fc1=torch.nn.Linear, linear_fc2=torch.nn.Linear)
    assert versions.nested_submodules(ModuleSpec(module=MLP, submodules=inside)) is inside
    assert versions.nested_submodules(partial(MLP, submodules=inside)) is inside
    assert versions.nested_submodules(partial(MLP)) is None
    assert versions.nested_submodules(ModuleSpec(module=MLP)) is None
    assert versions.nested_submodules(MLP) is None
    # And in the form that the installed release really makes.
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    found = versions.nested_submodules(versions.nested_submodules(layer).mlp)
    assert isinstance(found, MLPSubmodules)


def _shards(rank, world_size):
    with model_parallel(world_size):
        weight = torch.full((2, 3), float(rank))
        axis, offsets = {"weight": 0}, ()
        own = torch.distributed.new_group([0, 1])
        try:
            sharded = versions.sharded_for_checkpoint(
                {"weight": weight}, "a.", axis, offsets, tp_group=own, dp_cp_group=None
            )
        except UnsupportedError as error:
            return str(error)
        shard = sharded["a.weight"]
        return shard.key, tuple(shard.global_shape), tuple(shard.global_offset)


def test_a_group_of_its_own_is_used_or_refused():
    """Before 0.16 Megatron-Core takes the global group whatever it is told."""
    found = run_ranks(2, _shards)
    if isinstance(found[0], str):
        assert not versions.shares_kv_heads(), "0.16 and later know groups"
        assert all("0.16 or later" in message for message in found)
    else:
        assert found == [("a.weight", (4, 3), (2 * rank, 0)) for rank in range(2)]


@pytest.mark.parametrize(("size", "rebuilt"), [(1, False), (4, True)])
def test_a_weight_that_other_ranks_hold_parts_of(size, rebuilt):
    layer = torch.nn.Linear(2, 2)
    assert not versions.weight_is_rebuilt(layer)
    layer.gtp_remat_size = size
    assert versions.weight_is_rebuilt(layer) is rebuilt


@pytest.mark.engine
def test_the_engine_of_this_release_is_known():
    require_engine()


def _refusal(call):
    try:
        call()
    except UnsupportedError as error:
        return str(error)
    return None


def test_an_engine_that_is_not_known_is_refused():
    """On a release without one; the other half of the test above."""
    refusal = _refusal(require_engine)
    if refusal is None:
        pytest.skip("this release's engine is known")
    assert _refusal(enable_cpu_inference) == refusal
    assert _refusal(lambda: ServingEngine(torch.nn.Identity())) == refusal


@pytest.mark.parametrize("command", [["serve"], ["generate", "in", "out"]], ids=lambda c: c[0])
@pytest.mark.parametrize("release", ["older", "none"])
def test_the_command_line_refuses_before_it_imports_anything(tmp_path, release, command):
    """A package of Megatron's name, whose import would fail, without the engine's files."""
    if release == "older":
        (tmp_path / "megatron/core").mkdir(parents=True)
        (tmp_path / "megatron/core/__init__.py").write_text("raise AssertionError('imported')")
    else:
        (tmp_path / "megatron").mkdir()
        (tmp_path / "megatron/__init__.py").write_text("")
    told = _refused_command(tmp_path, [*command, "--model", "m"])
    assert "bdlora: error: the inference engine of the installed release is not known" in told
    assert "pip install 'megatron-core" in told


@pytest.mark.parametrize("command", [["serve"], ["generate", "in", "out"]], ids=lambda c: c[0])
def test_a_prefix_cache_is_refused_where_there_is_none(tmp_path, command):
    """A release as old as 0.16, by its files; without the setting it would do."""
    (tmp_path / "megatron/core/inference/contexts").mkdir(parents=True)
    (tmp_path / "megatron/core/__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "megatron/core/inference/batch_dimensions_utils.py").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    told = _refused_command(
        tmp_path,
        [*command, "--model", str(tmp_path / "model"), "--set", "enable_prefix_caching=true"],
    )
    assert "enable_prefix_caching=true wants megatron-core 0.17 or later: found" in told
    assert "pip install 'megatron-core>=0.17', or leave enable_prefix_caching out" in told


def _refused_command(before, arguments):
    """What a command says that ends with status 2 and without importing Megatron-Core.

    Args:
        before: A folder of packages to find first.
        arguments: Of the command.
    """
    code = (
        "import sys\n"
        "from bdlora_megatron.cli.main import main\n"
        f"status = main({arguments!r})\n"
        "assert 'megatron.core' not in sys.modules\n"
        "sys.exit(status)"
    )
    path = os.pathsep.join(filter(None, [str(before), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr
