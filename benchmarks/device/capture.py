"""The grouped product in a CUDA graph: captured once, replayed for batches of other slots.

A replay must give what the same launches give from Python, bit for bit. Without a GPU the stand-in
of the tests records the launches in Triton's interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdlora_megatron.ops import GroupedBatch, SlotFactors, add_grouped
from benchmarks.device.task import Outcome, Task, judged
from tests.fakes import cuda_graphs
from tests.unit.ops.cases import RANKS, make_inputs, make_slots

__all__ = ["run"]

_WALKS = ("token", "segment")
_ON_GPU = (("one", 7), ("qkv", 64), ("gate_up", 200), ("wide", 256))
#: Triton's interpreter steps through every program.
_ON_CPU, _FEW_RANKS = (("one", 4),), (4, 0, 9, 3)
_REFILLS = 5


def run(task: Task) -> Outcome:
    """Capture each walk of each layer, and refill it some times.

    Args:
        task: The part's time box.

    Returns:
        How many replays ran, and those that differed.
    """
    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {"replays": 0, "wrong": [], "skipped": []}
    for layer, tokens in _ON_GPU if gpu else _ON_CPU:
        for by in _WALKS:
            name = f"{layer}, {tokens} tokens, by {by}"
            if task.is_short:
                found["skipped"].append(name)
                continue
            wrong = _check(layer, tokens, by)
            found["replays"] += _REFILLS
            found["wrong"] += [f"{name}: {reason}" for reason in wrong]
            task.keep(_outcome(found, unfinished=True))
    return _outcome(found)


@torch.inference_mode()
def _check(layer: str, tokens: int, by: Any) -> list[str]:
    """What was wrong with the replays of one captured product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = RANKS if device == "cuda" else _FEW_RANKS
    slots = make_slots(layer, ranks=ranks, dtype=torch.bfloat16, device=device)
    base, x = make_inputs(layer, tokens, dtype=torch.bfloat16, device=device)
    rng = random.Random(tokens)
    batch = GroupedBatch(_token_slot(rng, tokens, slots), num_slots=len(ranks), by=by)
    out = base.clone()

    def step() -> None:
        out.copy_(base)
        add_grouped(out, x, slots, batch, implementation="triton")

    replay, wrong = _captured(step), []
    for number in range(_REFILLS):
        token_slot = _token_slot(rng, tokens, slots)
        batch.refill(token_slot)
        # Inputs change too, in place.
        x.copy_(x.flip(0))
        out.fill_(float("nan"))
        replay()
        if not torch.equal(out, _eager(base, x, slots, token_slot, by)):
            wrong.append(f"replay {number + 1} differs from eager launches")
    return wrong


def _token_slot(rng: random.Random, tokens: int, slots: SlotFactors) -> Tensor:
    drawn = [rng.randint(-1, slots.table.num_slots - 1) for _ in range(tokens)]
    return torch.tensor(drawn, device=slots.A.device)


def _eager(base: Tensor, x: Tensor, slots: SlotFactors, token_slot: Tensor, by: Any) -> Tensor:
    batch = GroupedBatch(token_slot, num_slots=slots.table.num_slots, by=by)
    return add_grouped(base.clone(), x, slots, batch, implementation="triton")


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    if not torch.cuda.is_available():
        return cuda_graphs.Recording(step).replay
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def _outcome(found: dict[str, Any], *, unfinished: bool = False) -> Outcome:
    how = "a CUDA graph" if torch.cuda.is_available() else "a stand-in for CUDA graphs, on a CPU"
    line = f"{found['replays']} replays of {how}, {len(found['wrong'])} differ from eager launches"
    if found["skipped"]:
        line += f"; no time for {len(found['skipped'])} more captures"
    wrong = found["wrong"] or not found["replays"]
    state = judged(unfinished=unfinished, wrong=bool(wrong))
    notes = [f"- {reason}" for reason in found["wrong"]]
    return Outcome(state=state, line=line, found={**found, "how": how}, notes=notes)
