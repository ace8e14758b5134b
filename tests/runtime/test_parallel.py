"""Starting and ending process groups."""

from __future__ import annotations

import os

import pytest
import torch
from megatron.core import parallel_state

from bdlora_megatron import runtime
from bdlora_megatron.errors import ConfigError
from tests.harness import free_port, run_ranks


def _sizes(rank, world_size):
    runtime.enable_cpu()
    with runtime.model_parallel(2, pp=2) as where:
        assert where == torch.device("cpu")
        assert parallel_state.get_tensor_model_parallel_world_size() == 2
        assert parallel_state.get_tensor_model_parallel_rank() == rank % 2
        assert parallel_state.get_pipeline_model_parallel_rank() == rank // 2
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.distributed.is_initialized(), "not started here, so not ended here"
    with (
        pytest.raises(ConfigError, match=r"4 ranks cannot be split into .* 3 x .* 1"),
        runtime.model_parallel(3),
    ):
        pass
    # A failure leaves nothing behind that would stop the next try.
    with pytest.raises(RuntimeError, match="inside"), runtime.model_parallel(4):
        raise RuntimeError("inside")
    with runtime.model_parallel(4):
        assert parallel_state.get_tensor_model_parallel_world_size() == 4


def test_groups_live_as_long_as_the_block():
    run_ranks(4, _sizes)


def _no_switch(rank, world_size):
    with pytest.raises(ConfigError, match="no CUDA device is present"), runtime.model_parallel(1):
        pass
    assert not parallel_state.model_parallel_is_initialized()


def test_without_cuda_the_cpu_has_to_be_chosen():
    run_ranks(1, _no_switch)


def _own_group(rank, world_size):
    torch.distributed.destroy_process_group()
    runtime.enable_cpu()
    with (
        pytest.raises(ConfigError, match=r"lacks MASTER_ADDR, MASTER_PORT; start .* torchrun"),
        runtime.model_parallel(1),
    ):
        pass
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with runtime.model_parallel(1):
        assert torch.distributed.get_backend() == "gloo"
    assert not torch.distributed.is_initialized()


def test_the_default_group_is_made_from_torchruns_environment():
    run_ranks(1, _own_group)
