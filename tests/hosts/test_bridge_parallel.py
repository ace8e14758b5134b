"""Sequence and pipeline parallelism in the real Megatron-Bridge, held to one rank without either.

One rank trains an adapter. Every layout goes on from a checkpoint in the middle of that run, on
four ranks and on the same rows, and what it saves goes on at tensor- and pipeline-parallel size 1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bdlora_megatron.convert import read_adapter
from tests.harness import run_ranks
from tests.hosts.bridge_runs import (
    TOKENS,
    Case,
    has_hybrid_models,
    make_bridge_base,
    make_hf_base,
    on_cpu,
    train,
)
from tests.hosts.logits import TRAINED, assert_same_adapter, peft_logits
from tests.hosts.test_bridge import has_bridge
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(
        not has_bridge(), reason="megatron-bridge is not installed; make test-bridge installs it"
    ),
    pytest.mark.timeout(1800),
]

_ALONE = Case(tensor_parallel=1, layers=4, rows=4, micro_batch=1)
#: On one rank, or on several that each compute their own rows.
ALONE = {
    "gpt": _ALONE,
    "hybrid": replace(_ALONE, hybrid=True),
    "distributed": replace(_ALONE, distributed=True),
    "tied": replace(_ALONE, tied=True),
    # Megatron-Core stacks the layers of a checkpoint, where all have the same adapters.
    "uneven": replace(_ALONE, targets=("*.layers.0.*", "*.layers.3.*.linear_fc1")),
}
LAYOUTS = {
    "tp2-sp": {"sequence_parallel": True},
    "pp2": {"tensor_parallel": 1, "pipeline_parallel": 2},
    "tp2-pp2": {"pipeline_parallel": 2},
    "tp2-pp2-sp": {"pipeline_parallel": 2, "sequence_parallel": True},
    "tp2-pp2-sp-interleaved": {"pipeline_parallel": 2, "sequence_parallel": True, "chunks": 2},
}
TRIED = {
    "gpt": LAYOUTS,
    # Bridge refuses several chunks of a HybridModel.
    "hybrid": ("pp2", "tp2-pp2", "tp2-pp2-sp"),
    # Where two ranks share an optimizer, of one stage or of two.
    "distributed": ("tp2-sp", "pp2"),
    # The embedding stands on both stages.
    "tied": ("tp2-pp2",),
    "uneven": ("tp2-pp2-sp",),
}
RUNS = {
    (kind, name): replace(ALONE[kind], **{"tensor_parallel": 2, **LAYOUTS[name]})
    for kind, names in TRIED.items()
    for name in names
}
RANKS = 4
#: All runs end after the last step, on rows that depend on it. Layouts begin at one rank's
#: checkpoint after the first, and others go on from theirs after the second.
SAVED, LAID_OUT, STEPS = 4, 8, 10


def _kinds():
    return [kind for kind, alone in ALONE.items() if has_hybrid_models() or not alone.hybrid]


def _hf(root, case):
    return Path(root, "hf-tied" if case.tied else "hf")


def _alone(rank, world_size, root):
    on_cpu()
    found = {}
    for kind in _kinds():
        make_bridge_base(_hf(root, ALONE[kind]), Path(root, kind, "base"), ALONE[kind])
        found[kind] = _train(Path(root, kind), "alone", ALONE[kind])
    return found


def _train(folder, name, case, resume=None):
    saves = (
        f"checkpoint.save_interval={SAVED}",
        # Of a distributed optimizer; others always are.
        "checkpoint.dist_ckpt_optim_fully_reshardable=true",
    )
    resume = resume and (folder / resume[0], resume[1])
    kept = LAID_OUT - (resume[1] if resume else 0)
    return train(
        folder / name, folder / "base", case, STEPS, *saves, resume=resume, keep_after=kept
    )


def _laid_out(rank, world_size, root):
    """Every layout, and what goes on from it with each rank by itself."""
    on_cpu()
    found = {}
    for (kind, name), case in RUNS.items():
        if kind in _kinds():
            folder = Path(root, kind)
            own = _train(folder, name, case, ("alone", SAVED))
            back = _train(folder, f"{name}-back", ALONE[kind], (name, LAID_OUT))
            found[kind, name] = own, back
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the runs are, what one rank saw in its run, and what each of four did in theirs."""
    root = tmp_path_factory.mktemp("layouts")
    for case in (ALONE["gpt"], ALONE["tied"]):
        make_hf_base(_hf(root, case), case.layers, case.tied)
    (alone,) = run_ranks(1, _alone, str(root), timeout_s=600)
    return root, alone, run_ranks(RANKS, _laid_out, str(root), timeout_s=1500)


def _assert_went_on(seen, wanted, first):
    """Losses on the last stage and the gradients' norm everywhere are those of one rank."""
    if seen["logits"] is None:
        assert not seen["losses"]
    else:
        assert seen["losses"] == pytest.approx(wanted["losses"][first:], rel=1e-5)
    assert seen["norms"] == pytest.approx(wanted["norms"][first:], rel=1e-4)
    for name, value in seen["start"]["frozen"].items():
        assert torch.equal(value, seen["end"]["frozen"][name]), f"{name} is not frozen"


@pytest.mark.parametrize(("kind", "name"), RUNS, ids=["-".join(run) for run in RUNS])
def test_a_layout_trains_as_one_rank_does_and_goes_on_there(kind, name, runs):
    root, every_alone, ranks = runs
    if kind not in every_alone:
        pytest.skip("this Bridge provides no HybridModel")
    alone, case = every_alone[kind], RUNS[kind, name]
    assert alone["losses"][-1] < alone["losses"][0] - 0.3
    start = read_adapter(root / kind / "alone" / f"iter_{SAVED:07}").modules
    own = read_adapter(root / kind / name / f"iter_{LAID_OUT:07}").modules
    assert len(own) == (7 + 2 if case.targets else 7 * case.layers)
    for here, back in (seen[kind, name] for seen in ranks):
        if not case.targets:
            assert here["start"]["layers"] == 4 * case.layers // case.pipeline_parallel
        assert_same_adapter(here["start"]["adapter"], start)
        _assert_went_on(here, alone, SAVED)
        assert_same_adapter(here["kept"]["adapter"], alone["kept"]["adapter"], TRAINED)
        # The checkpoint, read as an adapter and resumed at other sizes, is what was trained.
        assert_same_adapter(own, here["kept"]["adapter"])
        assert_same_adapter(back["start"]["adapter"], own)
        _assert_went_on(back, alone, LAID_OUT)
        for seen in (here, back):
            assert_same_adapter(seen["end"]["adapter"], alone["end"]["adapter"], TRAINED)


@pytest.mark.parametrize(("kind", "name"), RUNS, ids=["-".join(run) for run in RUNS])
def test_peft_computes_from_a_layouts_export_what_the_layout_does(kind, name, runs):
    root, every_alone, ranks = runs
    if kind not in every_alone:
        pytest.skip("this Bridge provides no HybridModel")
    hf = _hf(root, RUNS[kind, name])
    logits = [seen[kind, name][0]["logits"] for seen in ranks]
    last = [found for found in logits if found is not None]
    assert len(last) == RANKS // RUNS[kind, name].pipeline_parallel
    base = peft_logits(hf, None, TOKENS)
    found = peft_logits(hf, root / kind / name / "hf_adapter", TOKENS)
    for wanted in last:
        assert (wanted - base).abs().max() > 0.1 * base.abs().max()
        assert_close(found, wanted, name, (1e-5, 1e-4))
