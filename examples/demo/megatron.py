"""The Megatron side: the same base and adapters on three tensor-parallel ranks of this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout
from bdlora_megatron.convert import HFConfig, load_hf_model, read_hf_config, read_peft
from bdlora_megatron.layers import LoadOptions, adapters_disabled, load_adapter
from bdlora_megatron.layers.anatomy import num_decoder_layers
from bdlora_megatron.models import without_padding
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.launch import (
    hidden_gpus,
    join_ranks,
    prepare_ranks,
    start_method,
)
from bdlora_megatron.serve import AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.engine import EngineOptions, ServingEngine
from bdlora_megatron.serve.messages import Failed, Sampling, Submit
from examples.demo.reference import BASE, Answer, Speed

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
    speed: Speed
    costs: list[LayoutCost]


def run_megatron(
    base_dir: Path,
    adapters: Mapping[str, Path],
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 40,
) -> MegatronResult:
    """Load base and adapters on `TP` ranks, answer all in one batch, and count collectives.

    Args:
        base_dir: A Hugging Face model directory.
        adapters: PEFT adapter directories by name.
        prompt_ids: The prompts as tokens.
        max_new_tokens: Greedy answers stop here at the latest.

    Returns:
        The answers of the base model and of every adapter, how fast they came, and the cost of
        every layout.
    """
    job = _Job(
        base_dir=base_dir,
        adapters=dict(adapters),
        prompt_ids=[list(ids) for ids in prompt_ids],
        max_new_tokens=max_new_tokens,
        hf=read_hf_config(base_dir),
        max_rank=max(
            factors.rank
            for path in adapters.values()
            for factors in read_peft(path).modules.values()
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        with hidden_gpus():
            # Megatron-Core is imported once, where ranks are forked, and not by each of them.
            prepare_ranks(("bdlora_megatron.train.preload",))
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
    max_rank: int

    def submits(self) -> list[Submit]:
        """Every prompt for the base model and for each adapter."""
        sampling = Sampling(
            temperature=0.0,
            max_tokens=self.max_new_tokens,
            stop_ids=frozenset(self.hf.eos_token_ids),
        )
        questions = [(name, ids) for name in (None, *self.adapters) for ids in self.prompt_ids]
        return [
            Submit(request_id=number, prompt=tuple(ids), sampling=sampling, adapter=name)
            for number, (name, ids) in enumerate(questions)
        ]


def _rank_main(rank: int, folder: Path, job: _Job) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, TP, f"{folder}/store", cpu=True)
    enable_cpu_inference()
    with runtime.model_parallel(TP):
        model = load_hf_model(job.base_dir, dtype=torch.float32).eval()
        answers, speed = _serve(model, job, show=rank == 0)
        costs = _count_all(model, job)
        if rank == 0:
            result = MegatronResult(answers=answers, speed=speed, costs=costs)
            torch.save(result, folder / "result")
    torch.distributed.destroy_process_group()


@torch.inference_mode()
def _serve(model: Any, job: _Job, *, show: bool) -> tuple[dict[str, list[Answer]], Speed]:
    """Answer every question in one batch; the slots are out of the model again afterwards."""
    slots, store = _load_slots(model, job)
    submits = job.submits()
    options = EngineOptions(
        max_num_seqs=len(submits),
        max_num_batched_tokens=sum(len(submit.prompt) for submit in submits),
        max_model_len=max(map(len, job.prompt_ids)) + job.max_new_tokens,
        block_size=16,
        kv_cache_memory_bytes=2**28,
    )
    engine = ServingEngine(model, store, options)
    started = time.perf_counter()
    token_ids = _generate(engine, submits, show=show)
    seconds = time.perf_counter() - started
    logits = _prompt_logits(model, store, submits, job.hf)
    store.close()
    slots.detach()
    answers: dict[str, list[Answer]] = {}
    for submit, rows, ids in zip(submits, logits, token_ids, strict=True):
        answers.setdefault(submit.adapter or BASE, []).append(Answer(logits=rows, token_ids=ids))
    speed = Speed(
        name=f"Megatron at TP={TP}, one mixed batch",
        tokens=sum(map(len, token_ids)),
        passes=engine.snapshot().steps,
        seconds=seconds,
    )
    return answers, speed


def _load_slots(model: Any, job: _Job) -> tuple[ModelSlots, AdapterStore]:
    """Slots with every adapter on its way into them: PEFT's are loaded before its clock starts."""
    number = len(job.adapters)
    slots = ModelSlots(model, SlotCapacity(max_loras=number, max_lora_rank=job.max_rank))
    store = AdapterStore(slots, StoreOptions(host_cache_bytes=number * slots.largest_bytes))
    keys = [store.register(name, partial(read_peft, path)) for name, path in job.adapters.items()]
    for key in keys:
        store.prefetch(key)
    while any(map(store.is_loading, keys)):
        store.advance(wait_s=1.0)
    return slots, store


def _generate(engine: ServingEngine, submits: Sequence[Submit], *, show: bool) -> list[list[int]]:
    """The tokens of each answer, in the order of the questions."""
    answers: list[list[int]] = [[] for _ in submits]
    for submit in submits:
        engine.submit(submit)
    title = f"Megatron TP={TP}"
    with tqdm(total=len(submits), desc=title, unit="answer", disable=not show) as bar:
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(f"{submits[event.request_id].adapter}: {event.reason}")
                answers[event.request_id].append(event.choice.token)
                bar.update(event.finish is not None)
    return answers


def _prompt_logits(
    model: Any, store: AdapterStore, submits: Sequence[Submit], hf: HFConfig
) -> list[Tensor]:
    """Logits of all prompts from the slots that answered them: one forward pass of the batch."""
    longest = max(len(submit.prompt) for submit in submits)
    # Nothing attends to what comes later, so padding behind a prompt changes none of its logits.
    padded = [[*submit.prompt, *[0] * (longest - len(submit.prompt))] for submit in submits]
    slots = store.slots
    per_row = [
        -1 if submit.adapter is None else slots.allocator.slot(store.key(submit.adapter))
        for submit in submits
    ]
    # Tokens lie position by position, all rows of one position together.
    with slots.serving(slots.batch(torch.tensor(per_row * longest))):
        logits = without_padding(_forward(model, padded), hf)
    return [row[: len(submit.prompt)] for row, submit in zip(logits, submits, strict=True)]


def _forward(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``[rows, tokens, vocabulary]``; of the vocabulary's padding -inf."""
    length = len(rows[0])
    logits: Tensor = model(
        torch.tensor(rows),
        torch.arange(length).expand(len(rows), -1),
        torch.ones(1, 1, length, length).triu(1).bool(),
        runtime_gather_output=True,
    )
    return logits


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
        loss = _forward(model, [ids]).sum()
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
