"""The Megatron side: the same base and adapters on three tensor-parallel ranks of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout
from bdlora_megatron.convert import HFConfig, load_hf_model, read_hf_config, read_peft
from bdlora_megatron.layers import LoadOptions, adapters_disabled, load_adapter
from bdlora_megatron.layers.anatomy import num_decoder_layers
from bdlora_megatron.models import without_padding
from bdlora_megatron.runtime.launch import hidden_gpus, join_ranks, start_method
from examples.demo.reference import BASE, Answer

#: SmolLM2-135M has 9 heads and 3 key-value heads, so three ranks share them evenly.
TP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCost:
    """What one adapter in one layout communicates beyond the base model, per decoder layer.

    `forward` and `backward` count collectives by kind; bytes are payloads, in fp32, for `tokens`
    tokens.
    """

    adapter: str
    layout: Layout
    tokens: int
    forward: dict[str, float]
    forward_bytes: float
    backward: dict[str, float]
    backward_bytes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronResult:
    """What Megatron answered, in the order of the reference's prompts, and what layouts cost."""

    answers: dict[str, list[Answer]]
    costs: list[LayoutCost]


def run_megatron(
    base_dir: Path,
    adapters: Mapping[str, Path],
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
) -> MegatronResult:
    """Load base and adapters on `TP` ranks, answer the prompts, and count collectives.

    Args:
        base_dir: A Hugging Face model directory.
        adapters: PEFT adapter directories by name.
        prompt_ids: The prompts as tokens.
        max_new_tokens: Greedy answers stop here at the latest.

    Returns:
        The answers of the base model and of every adapter, and the cost of every layout.
    """
    job = _Job(
        base_dir=base_dir,
        adapters=dict(adapters),
        prompt_ids=[list(ids) for ids in prompt_ids],
        max_new_tokens=max_new_tokens,
        hf=read_hf_config(base_dir),
    )
    with tempfile.TemporaryDirectory() as folder:
        with hidden_gpus():
            start_processes(
                _rank_main, args=(Path(folder), job), nprocs=TP, start_method=start_method()
            )
        # Written by our own rank a moment ago.
        result: MegatronResult = torch.load(Path(folder, "result"), weights_only=False)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What every rank is told."""

    base_dir: Path
    adapters: dict[str, Path]
    prompt_ids: list[list[int]]
    max_new_tokens: int
    hf: HFConfig


def _rank_main(rank: int, folder: Path, job: _Job) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, TP, f"{folder}/store", cpu=True)
    runtime.enable_cpu()
    with runtime.model_parallel(TP):
        model = load_hf_model(job.base_dir, dtype=torch.float32).eval()
        answers = _answer_all(model, job, show=rank == 0)
        costs = _count_all(model, job)
        if rank == 0:
            torch.save(MegatronResult(answers=answers, costs=costs), folder / "result")
    torch.distributed.destroy_process_group()


def _answer_all(model: Any, job: _Job, *, show: bool) -> dict[str, list[Answer]]:
    answers: dict[str, list[Answer]] = {}
    total = (1 + len(job.adapters)) * len(job.prompt_ids)
    with tqdm(total=total, desc=f"Megatron TP={TP}", unit="answer", disable=not show) as bar:
        for name in [BASE, *job.adapters]:
            if name != BASE:
                load_adapter(model, read_peft(job.adapters[name]))
            answers[name] = []
            for ids in job.prompt_ids:
                answers[name].append(_answer(model, ids, job))
                bar.update()
    return answers


@torch.inference_mode()
def _answer(model: Any, prompt_ids: list[int], job: _Job) -> Answer:
    return Answer(
        logits=without_padding(_forward(model, prompt_ids)[0], job.hf),
        token_ids=_greedy(model, prompt_ids, job),
    )


def _forward(model: Any, ids: list[int], start: int = 0, context: Any = None) -> Tensor:
    """Logits of `ids[start:]`; of the last alone where a cache takes the rest. Padding is -inf."""
    stop = len(ids)
    hidden = torch.ones(1, 1, stop - start, stop).triu(start + 1).bool()
    logits: Tensor = model(
        torch.tensor([ids[start:]]),
        torch.arange(start, stop)[None],
        hidden,
        inference_context=context,
        runtime_gather_output=True,
    )
    return logits


def _greedy(model: Any, prompt_ids: list[int], job: _Job) -> list[int]:
    ids = list(prompt_ids)
    cache = StaticInferenceContext(1, len(ids) + job.max_new_tokens)
    start = 0
    for _ in range(job.max_new_tokens):
        logits = _forward(model, ids, start, cache)
        cache.increment_sequence_len_offset(len(ids) - start)
        start = len(ids)
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in job.hf.eos_token_ids:
            break
    return ids[len(prompt_ids) :]


def _count_all(model: Any, job: _Job) -> list[LayoutCost]:
    ids = job.prompt_ids[0]
    costs = []
    for name, path in job.adapters.items():
        adapter = read_peft(path)
        blocked = any(factors.num_blocks > 1 for factors in adapter.modules.values())
        for layout in [Layout.BDLORA] if blocked else [Layout.HALF_SHARDED, Layout.SLORA]:
            load_adapter(model, adapter, LoadOptions(layout=layout, trainable=True))
            with adapters_disabled(model):
                base = _count(model, ids)
            costs.append(_cost(name, layout, len(ids), model, base, _count(model, ids)))
    return costs


def _count(model: Any, ids: list[int]) -> tuple[Any, Any]:
    """The collectives of one forward and of one backward."""
    # As in any layer but the first of a fine-tuned model, the input wants a gradient.
    model.embedding.requires_grad_(True)
    with runtime.record_collectives() as forward:
        loss = _forward(model, ids).sum()
    with runtime.record_collectives() as backward:
        loss.backward()
    model.zero_grad(set_to_none=True)
    return forward, backward


def _cost(
    name: str,
    layout: Layout,
    tokens: int,
    model: Any,
    base: tuple[Any, Any],
    adapted: tuple[Any, Any],
) -> LayoutCost:
    layers = num_decoder_layers(model)
    counts, sizes = [], []
    for before, after in zip(base, adapted, strict=True):
        kinds = after.counts()
        extra = {kind: (n - before.counts().get(kind, 0)) / layers for kind, n in kinds.items()}
        counts.append({kind: n for kind, n in extra.items() if n})
        sizes.append((after.payload_bytes - before.payload_bytes) / layers)
    return LayoutCost(
        adapter=name,
        layout=layout,
        tokens=tokens,
        forward=counts[0],
        forward_bytes=sizes[0],
        backward=counts[1],
        backward_bytes=sizes[1],
    )
