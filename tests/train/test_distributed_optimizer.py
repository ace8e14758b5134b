"""Megatron-Core's distributed optimizer: the plain one's steps, of which each rank keeps a part."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from safetensors.torch import load_file

from bdlora_megatron.convert import read_adapter
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.export import main_weights
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.train.checkpoint import checkpoints, load_checkpoint
from bdlora_megatron.train.loop import ADAPTER
from bdlora_megatron.train.metrics import read_metrics
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.step import Stepper
from tests.harness import run_ranks
from tests.tp.session import model_parallel
from tests.train.runs import (
    first_batches,
    make_files,
    settings,
    train_rank,
)
from tests.unit.convert.random_adapters import assert_same

TP, DP, STEPS, HALF = 2, 2, 6, 3
PRECISIONS = ("fp32", "bf16")


def _config(root, save, precision, split=True, tp=TP):
    """Weight decay and a limit that is met, so that both are among what is compared.

    Layers that differ, or each rank would hold whole layers and no factor would be split.
    """
    blocks = {"num_blocks": 6, "rank": 12, "exclude_modules": ["*.layers.1.mlp.linear_fc2"]}
    return settings(
        root,
        save,
        model={"hf_path": str(root / "base"), "seq_length": 48, "tensor_model_parallel_size": tp},
        train={
            "train_iters": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "precision": precision,
        },
        peft={"bdlora": blocks},
        optimizer={
            "lr": 0.02,
            "weight_decay": 0.1,
            "clip_grad": 0.5,
            "use_distributed_optimizer": split,
        },
        scheduler={"lr_warmup_iters": 1, "lr_decay_iters": 8},
        checkpoint={"save": str(save), "save_interval": HALF},
    )


def _losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def _factors(folder):
    return load_file(folder / ADAPTER / "adapter_model.safetensors")


def _train_all(rank, world_size, configs):
    for config in configs:
        train_rank(rank, world_size, config)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs at TP=2 x DP=2: with each optimizer, and one that goes on from halfway."""
    root = make_files(tmp_path_factory.mktemp("split"))
    configs = []
    for precision in PRECISIONS:
        configs += [
            _config(root, root / f"plain-{precision}", precision, split=False),
            _config(root, root / f"split-{precision}", precision),
            _config(root, _from_halfway(root, root / f"parts-{precision}", precision), precision),
        ]
    run_ranks(TP * DP, _train_all, configs)
    return root


def _from_halfway(root, folder, precision):
    """A run's folder that holds another one's checkpoint, once that is written."""
    folder.mkdir()
    name = f"step_{HALF:08d}"
    (folder / name).symlink_to(root / f"split-{precision}" / name, target_is_directory=True)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_steps_as_the_plain_optimizer_does(root, precision):
    """Two ranks sum two numbers in either order alike, and Adam's step knows no neighbours."""
    plain, split = root / f"plain-{precision}", root / f"split-{precision}"
    assert len(_losses(split)) == STEPS
    assert _losses(split)[-1] < _losses(split)[0] - 0.1
    torch.testing.assert_close(_losses(split), _losses(plain), rtol=1e-5, atol=0.0)
    wanted = _factors(plain)
    for name, factor in _factors(split).items():
        # The norm is summed in another order, and scales every gradient.
        torch.testing.assert_close(factor, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_at_the_same_size_every_bit_is_resumed(root, precision):
    parts, whole = root / f"parts-{precision}", root / f"split-{precision}"
    assert _losses(parts) == _losses(whole)[HALF:]
    wanted = _factors(whole)
    for name, factor in _factors(parts).items():
        assert torch.equal(factor, wanted[name]), name


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_at_another_size_it_goes_on_as_well(root, tmp_path, tp, dp):
    folders = {p: _from_halfway(root, tmp_path / p, p) for p in PRECISIONS}
    configs = [_config(root, folder, p, tp=tp) for p, folder in folders.items()]
    run_ranks(tp * dp, _train_all, configs)
    for precision, folder in folders.items():
        wanted = _losses(root / f"split-{precision}")[HALF:]
        tolerance = 2e-4 if precision == "fp32" else 2e-2
        assert _losses(folder) == pytest.approx(wanted, abs=tolerance)


def _stage_refused(rank, world_size, config):
    with pytest.raises(ConfigError, match="a pipeline stage has no adapter"):
        train_rank(rank, world_size, config)


def test_a_stage_without_an_adapter_is_refused(root, tmp_path):
    model = {"hf_path": str(root / "base"), "seq_length": 48, "pipeline_model_parallel_size": 2}
    peft = {"bdlora": {"num_blocks": 6, "rank": 12, "target_modules": ["*.layers.1.*"]}}
    config = settings(root, tmp_path, model=model, peft=peft)
    split = replace(config.optimizer, use_distributed_optimizer=True)
    run_ranks(2, _stage_refused, replace(config, optimizer=split))
    assert checkpoints(tmp_path) == []


def _copies(rank, world_size, config):
    """Of the last checkpoint: what each rank keeps of every factor, the factors, their copies."""
    with model_parallel(TP):
        model, _ = build_model(config)
        stepper = Stepper(model, config)
        load_checkpoint(checkpoints(config.checkpoint.save)[-1][1], stepper)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        kept = [0 if w.main_param is None else w.main_param.numel() for w in weights]
        own = [weight.data.clone() for weight in weights]
        with main_weights(model):
            main = [weight.data.clone() for weight in weights]
        assert all(torch.equal(w.data, before) for w, before in zip(weights, own, strict=True))
        return kept, own, main


def test_exports_and_checkpoints_hold_the_float32_copies_whole(root):
    folder = root / "split-bf16"
    ranks = run_ranks(TP * DP, _copies, _config(root, folder, "bf16"))
    for kept, own, main in ranks:
        assert any(0 < part < weight.numel() for part, weight in zip(kept, own, strict=True))
        for weight, copy in zip(own, main, strict=True):
            assert (weight.dtype, copy.dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(weight, copy.bfloat16())
            assert (copy != weight.float()).any(), "nothing was kept that bfloat16 would lose"
    # Ranks 0 and 1 are one copy of the model; the two copies keep each number once.
    assert sum(sum(kept) for kept, _, _ in ranks) == sum(
        w.numel() for r in (0, 1) for w in ranks[r][1]
    )
    exported = torch.cat([factor.flatten() for factor in _factors(folder).values()])
    copies = torch.cat([copy.flatten() for rank in (0, 1) for copy in ranks[rank][2]])
    assert exported.dtype is torch.float32
    assert set(copies.tolist()) == set(exported.tolist())
    stored = load_tensors_metadata(str(checkpoints(folder)[-1][1]))
    state = {key: entry.dtype for key, entry in stored.items() if key.startswith("optimizer.state")}
    assert set(state.values()) == {torch.float32}
    assert len(state) == 3 * 2 * 13, "three numbers of two factors, for each projection"


def test_a_checkpoint_and_its_export_are_one_adapter_and_both_can_be_started_from(root, tmp_path):
    folder, configs = root / "split-bf16", []
    exported = read_adapter(folder / ADAPTER)
    assert_same(read_adapter(checkpoints(folder)[-1][1]), exported, scale=True)
    for name, source in (("run", checkpoints(folder)[-1][1]), ("peft", folder / ADAPTER)):
        config = _config(root, tmp_path / name, "bf16", tp=1)
        still = replace(config.optimizer, lr=0.0)
        peft = replace(config.peft, init_from=str(source))
        configs.append(replace(config, peft=peft, optimizer=still))
    run_ranks(2, _train_all, configs)
    for name in ("run", "peft"):
        assert_same(read_adapter(tmp_path / name / ADAPTER), exported, scale=True)


def _refused(rank, world_size, configs):
    for config in configs:
        with pytest.raises(ConfigError, match=r"use_distributed_optimizer was (True|False) and is"):
            train_rank(rank, world_size, config)


def test_the_other_optimizers_state_is_not_loaded(root):
    pairs = [("split-fp32", False), ("plain-fp32", True)]
    run_ranks(2, _refused, [_config(root, root / name, "fp32", split) for name, split in pairs])


def _step_calls(rank, world_size, configs):
    """What a whole step sends over data-parallel ranks, by the optimizer."""
    counts = []
    for config in configs:
        with model_parallel(1):
            model, _ = build_model(config)
            stepper = Stepper(model, config)
            batches = first_batches(config, micro_batch_size=1)
            with record_collectives() as log:
                stepper.train_step(0, batches)
            factors = sum(p.numel() for p in model.parameters() if p.requires_grad)
            sent = defaultdict(list)
            for call in log.calls:
                if call.wire_bytes and call.payload_bytes > 16:
                    sent[call.kind].append(call.payload_bytes)
            counts.append((factors, dict(sent)))
    return counts


def test_a_reduce_scatter_and_an_all_gather_stand_in_the_place_of_the_all_reduce(root):
    configs = [
        _config(root, root / "unused", precision, split, tp=1)
        for precision in PRECISIONS
        for split in (False, True)
    ]
    for plain, split, plain_half, split_half in run_ranks(2, _step_calls, configs):
        for kinds, factors, width in ((split, plain[0], 4), (split_half, plain_half[0], 2)):
            assert kinds[1].keys() == {"reduce_scatter", "all_gather"}
            # Gradients are summed in float32, and factors gathered in their own type. Megatron-Core
            # starts each of 28 parameters at a multiple of 64.
            for kind, size in (("reduce_scatter", 4), ("all_gather", width)):
                ((found, count),) = Counter(kinds[1][kind]).items()
                assert count == 1
                assert size * factors <= found <= size * (factors + 64 * 28 + 256)
        for factors, kinds in (plain, plain_half):
            assert kinds == {"all_reduce": [4 * factors]}
