"""Training in Megatron-Core's mixed precision: sixteen-bit factors, float32 copies of them."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from safetensors.torch import load_file

from bdlora_megatron.convert import read_adapter
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.export import main_weights
from bdlora_megatron.train.checkpoint import checkpoints, load_checkpoint
from bdlora_megatron.train.loop import ADAPTER
from bdlora_megatron.train.metrics import read_metrics
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.resume import check_resumable
from bdlora_megatron.train.step import Stepper
from tests.harness import run_ranks
from tests.tp.session import model_parallel
from tests.train.runs import make_files, settings, train_rank
from tests.unit.convert.random_adapters import assert_same

STEPS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("precision"))


def _config(root, save, **changes):
    changes = {"train__precision": "bf16", "train__train_iters": STEPS, **changes}
    return settings(root, save, scheduler={"lr_decay_iters": 2 * STEPS}, **changes)


def _losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run that was not interrupted, and the same one in float32."""
    folders = {}
    for precision in ("bf16", "fp32"):
        folders[precision] = tmp_path_factory.mktemp(precision)
        config = _config(root, folders[precision], train__precision=precision)
        run_ranks(1, train_rank, config)
    return folders


def _factors(folder):
    return load_file(folder / ADAPTER / "adapter_model.safetensors")


def test_the_loss_falls_as_in_float32(trained):
    half, full = _losses(trained["bf16"]), _losses(trained["fp32"])
    assert len(half) == len(full) == STEPS
    assert half[-1] < 0.75 * half[0]
    for step, (found, wanted) in enumerate(zip(half, full, strict=True)):
        assert found == pytest.approx(wanted, rel=0.02), f"step {step + 1}"
    assert half != full


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}),
        (2, {"model__pipeline_model_parallel_size": 2}),
        (2, {"train__micro_batch_size": 1}),
    ],
    ids=["tp2-sequence", "pp2", "dp2"],
)
def test_the_loss_falls_the_same_way_on_several_ranks(root, trained, tmp_path, ranks, changes):
    run_ranks(ranks, train_rank, _config(root, tmp_path, **changes))
    for found, wanted in zip(_losses(tmp_path), _losses(trained["bf16"]), strict=True):
        assert found == pytest.approx(wanted, rel=0.02)


def _main_weights(rank, world_size, config):
    """The optimizer's copies and the factors of the last checkpoint, by order."""
    with model_parallel(1):
        model, _ = build_model(config)
        stepper = Stepper(model, config)
        load_checkpoint(checkpoints(config.checkpoint.save)[-1][1], stepper)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        own = [weight.data.clone() for weight in weights]
        with main_weights(model):
            main = [weight.data.clone() for weight in weights]
        assert all(torch.equal(w.data, before) for w, before in zip(weights, own, strict=True))
        return own, main


def test_checkpoint_and_export_hold_the_float32_copies(root, trained):
    folder = trained["bf16"]
    stored = load_tensors_metadata(str(checkpoints(folder)[-1][1]))
    copies = {key: t.dtype for key, t in stored.items() if ".fp32_param." in key}
    # As many as there are pairs: seven projections, two factors.
    assert copies
    assert set(copies.values()) == {torch.float32}
    ((own, main),) = run_ranks(1, _main_weights, _config(root, folder))
    exported = _factors(folder)
    assert len(own) == len(main) == len(exported)
    for weight, copy in zip(own, main, strict=True):
        assert (weight.dtype, copy.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(weight, copy.bfloat16(), rtol=0.0, atol=0.0)
        assert (copy != weight.float()).any(), "nothing was kept that bfloat16 would lose"
    assert_same(
        read_adapter(checkpoints(folder)[-1][1]), read_adapter(folder / ADAPTER), scale=True
    )
    # In whatever order: every exported factor is one of the copies, bit for bit.
    bits = sorted(copy.sort().values.tolist() for copy in (c.flatten() for c in main))
    assert bits == sorted(t.flatten().sort().values.tolist() for t in exported.values())


def test_an_interrupted_run_goes_on_bit_for_bit(root, trained, tmp_path):
    run_ranks(1, train_rank, _config(root, tmp_path, train__train_iters=STEPS // 2))
    run_ranks(1, train_rank, _config(root, tmp_path))
    assert _losses(tmp_path) == _losses(trained["bf16"])
    resumed, whole = _factors(tmp_path), _factors(trained["bf16"])
    assert resumed.keys() == whole.keys()
    for name, factor in whole.items():
        assert torch.equal(resumed[name], factor), name


def test_precision_and_the_bases_type_must_agree(root, tmp_path):
    with pytest.raises(ConfigError, match=r"model.dtype is float32; with train.precision=bf16"):
        _config(root, tmp_path, model__dtype="float32")


def _facts(**sections):
    train = {"train_iters": 1, **sections.pop("train", {})}
    scheduler = {"lr_decay_iters": 4, "lr_decay_style": "cosine"}
    dataset = {"packing": True, **sections.pop("dataset", {})}
    all_settings = {"train": train, "scheduler": scheduler, "dataset": dataset, **sections}
    return {"settings": all_settings, "base": "", "data": ""}


def test_checkpoints_from_before_there_was_a_precision_are_resumed():
    check_resumable(_facts(), _facts(train={"precision": "fp32"}), "a checkpoint")
    with pytest.raises(ConfigError, match=r"train.precision was 'fp32' and is 'bf16'"):
        check_resumable(_facts(), _facts(train={"precision": "bf16"}), "a checkpoint")


def test_packed_rows_go_on_over_as_many_context_parallel_ranks():
    whole, split = ({"context_parallel_size": size} for size in (1, 2))
    check_resumable(_facts(), _facts(model=whole), "from before there was such a setting")
    with pytest.raises(ConfigError, match=r"model.context_parallel_size was 1 and is 2"):
        check_resumable(_facts(model=whole), _facts(model=split), "a checkpoint")
    unpacked = {"packing": False}
    check_resumable(
        _facts(model=whole, dataset=unpacked), _facts(model=split, dataset=unpacked), "a checkpoint"
    )
