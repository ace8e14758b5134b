"""Train on three ranks, resume on one, export, and let PEFT say what it computes."""

from __future__ import annotations

import json

import pytest
import torch

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import load_hf_model, open_adapter, read_adapter, write_adapter
from bdlora_megatron.layers import LoadOptions, load_adapter
from bdlora_megatron.train.checkpoint import checkpoints
from bdlora_megatron.train.loop import ADAPTER, DENSE_ADAPTER
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.session import model_parallel
from tests.train.logits import checkpoint_logits, megatron_logits, peft_logits
from tests.train.runs import make_base, make_files, settings, train_rank
from tests.unit.convert.random_adapters import assert_same

SCHEMES = {
    "bdlora": {"scheme": "bdlora", "bdlora": {"num_blocks": 6, "rank": 12, "use_rslora": True}},
    "some": {
        "scheme": "bdlora",
        "bdlora": {
            "num_blocks": 3,
            "match_params_of_lora_rank": 6,
            "target_modules": ["linear_qkv", "*.layers.1.*.linear_fc2"],
        },
    },
    "slora": {"scheme": "slora", "lora": {"rank": 6, "alpha": 3}},
    "lora": {"scheme": "lora", "lora": {"rank": 5}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("export"))


def _loaded_logits(rank, world_size, base, adapter):
    with model_parallel(world_size):
        model = load_hf_model(base, dtype=torch.float32)
        load_adapter(model, read_adapter(adapter), LoadOptions(layout=Layout.BDLORA))
        return megatron_logits(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trained_at_three_ranks_resumed_at_one_peft_computes_the_same(root, tmp_path, scheme):
    common = {"peft": SCHEMES[scheme], "scheduler": {"lr_decay_iters": 8}}
    export = {"export": {"peft": True, "dense": True}, "optimizer": {"lr": 0.05}}
    model = {"hf_path": str(root / "base"), "seq_length": 48, "tensor_model_parallel_size": 3}
    first = settings(root, tmp_path, model=model, train__train_iters=3, **common, **export)
    run_ranks(3, train_rank, first)
    second = settings(root, tmp_path, train__train_iters=5, **common, **export)
    run_ranks(1, train_rank, second)
    (trained,) = run_ranks(1, checkpoint_logits, second)
    base = peft_logits(root / "base")
    assert (trained - base).abs().max() > 0.05 * base.abs().max(), (
        "the adapter does next to nothing"
    )
    for name in (ADAPTER, DENSE_ADAPTER):
        found = peft_logits(root / "base", tmp_path / name)
        assert_close(found, trained, f"PEFT's logits of {name}", (1e-5, 1e-4))
    exported = read_adapter(tmp_path / ADAPTER)
    assert_same(read_adapter(checkpoints(tmp_path)[-1][1]), exported)
    settings_of = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text("utf-8"))
    assert bool(settings_of.get("use_bdlora")) is (first.peft.scheme == "bdlora")
    dense = json.loads((tmp_path / DENSE_ADAPTER / "adapter_config.json").read_text("utf-8"))
    assert not dense.get("use_bdlora")
    if scheme == "bdlora":
        for logits in run_ranks(3, _loaded_logits, root / "base", tmp_path / ADAPTER):
            assert_close(logits, trained, "Megatron's logits at TP=3", (1e-5, 1e-4))


def test_begun_on_one_rank_and_ended_on_four_peft_computes_the_same(root, tmp_path):
    """Two tensor-parallel ranks times two pipeline stages, of which each exports its layer."""
    common = {"peft": SCHEMES["bdlora"], "scheduler": {"lr_decay_iters": 8}}
    common |= {"optimizer": {"lr": 0.05}}
    run_ranks(1, train_rank, settings(root, tmp_path, train__train_iters=2, **common))
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    model = {"hf_path": str(root / "base"), "seq_length": 48, "sequence_parallel": True, **sizes}
    run_ranks(4, train_rank, settings(root, tmp_path, train__train_iters=4, model=model, **common))
    last = settings(root, tmp_path, train__train_iters=4, **common)
    (trained,) = run_ranks(1, checkpoint_logits, last)
    base = peft_logits(root / "base")
    assert (trained - base).abs().max() > 0.05 * base.abs().max()
    found = peft_logits(root / "base", tmp_path / ADAPTER)
    assert_close(found, trained, "PEFT's logits", (1e-5, 1e-4))


def test_scheme_none_evaluates_the_base_model_and_writes_no_adapter(root, tmp_path):
    config = settings(root, tmp_path, peft={"scheme": "none"})
    (result,) = run_ranks(1, train_rank, config)
    assert result.exported == ()
    assert result.steps == 0
    (again,) = run_ranks(1, train_rank, settings(root, tmp_path / "trained", optimizer={"lr": 0.0}))
    assert again.validation_loss == pytest.approx(result.validation_loss, rel=1e-6)
    assert not list(tmp_path.glob("step_*"))


def test_a_checkpoint_on_fused_projections_is_written_under_their_names(root, tmp_path):
    fused = {"hidden_size": 48, "eos_token_id": 0, "pad_token_id": 0}
    base = make_base(tmp_path / "phi", family="Phi3", **fused)
    model = {"hf_path": str(base), "seq_length": 48, "tensor_model_parallel_size": 2}
    peft = {"scheme": "bdlora", "bdlora": {"num_blocks": 2, "rank": 4}}
    config = settings(
        root, tmp_path / "run", model=model, peft=peft, train__train_iters=2, optimizer__lr=0.05
    )
    run_ranks(2, train_rank, config)
    with open_adapter(checkpoints(tmp_path / "run")[-1][1]) as adapter:
        write_adapter(adapter, tmp_path / "again", "peft")
    found = [
        peft_logits(base, folder) for folder in (tmp_path / "run" / ADAPTER, tmp_path / "again")
    ]
    assert (found[0] - peft_logits(base)).abs().max() > 0.01
    assert_close(found[1], found[0], "the checkpoint", (1e-5, 1e-4))
    (trained,) = run_ranks(1, checkpoint_logits, settings(
        root, tmp_path / "run", model={**model, "tensor_model_parallel_size": 1}, peft=peft,
        train__train_iters=2, optimizer__lr=0.05,
    ))  # fmt: skip
    assert_close(found[0], trained, "PEFT's logits", (1e-5, 1e-4))
