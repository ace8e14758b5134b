"""What a training step communicates over tensor-parallel ranks, by scheme, counted call by call.

    torchrun --nproc-per-node 3 -m benchmarks.step_collectives --base .demo/SmolLM2-135M-Instruct

The base model's step is that of the frozen model with a gradient wanted of its decoder's input, as
if something before it were trained; steps with adapters are counted under the same condition.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from bdlora_megatron import runtime
from bdlora_megatron.runtime import record_collectives
from bdlora_megatron.train.config import from_mapping
from bdlora_megatron.train.data import Batch
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.schema import TrainConfig
from bdlora_megatron.train.step import Stepper, forward_backward

#: Calls by kind and payload in bytes.
Calls = Mapping[tuple[str, int], int]

RANK, SEQUENCE = 15, 96
SCHEMES = {
    "base": {"scheme": "none"},
    "BD-LoRA": {"scheme": "bdlora", "bdlora": {"rank": RANK, "num_blocks": 3}},
    "half-sharded LoRA": {"scheme": "lora", "lora": {"rank": RANK}},
    "S-LoRA layout": {"scheme": "slora", "lora": {"rank": RANK}},
}


def measure_step(config: TrainConfig, batches: Sequence[Batch]) -> Calls:
    """Count one forward and backward pass of all micro-batches, on this rank.

    Args:
        config: The settings, for the parallel sizes now in force.
        batches: The micro-batches.

    Returns:
        Calls that send more than 16 bytes to another rank; the few numbers of a step's record
        (loss, tokens, gradient norm) are left out.
    """
    model, _ = build_model(config)
    model.decoder.register_forward_pre_hook(_require_gradient, with_kwargs=True)
    trained: Any = model
    if config.peft.scheme != "none":
        trained = Stepper(model, config).model
    with record_collectives() as log:
        forward_backward(trained, batches, config)
    sent = [call for call in log.calls if call.wire_bytes and call.payload_bytes > 16]
    return dict(Counter((call.kind, call.payload_bytes) for call in sent))


def _require_gradient(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    del module
    kwargs["hidden_states"] = kwargs["hidden_states"].detach().requires_grad_(True)
    return args, kwargs


def main() -> None:
    """Count every scheme, with and without sequence parallelism, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_collectives")
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        runtime.enable_cpu()
    ranks = int(os.environ["WORLD_SIZE"])
    with runtime.model_parallel(ranks):
        rows = [
            _row(args.base, name, ranks, sequence_parallel=sequence_parallel)
            for sequence_parallel in (False, True)
            for name in SCHEMES
        ]
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            print("| sequence parallel | scheme | collectives | MB | by kind |")
            print("|---|---|---|---|---|", *rows, sep="\n")


def _row(base: Path, name: str, ranks: int, *, sequence_parallel: bool) -> str:
    config = from_mapping(
        {
            "model": {
                "hf_path": str(base),
                "seq_length": SEQUENCE,
                "tensor_model_parallel_size": ranks,
                "sequence_parallel": sequence_parallel,
            },
            "peft": SCHEMES[name],
            "dataset": {"train": "random", "validation": "random"},
            "train": {"train_iters": 1, "global_batch_size": 1},
            "checkpoint": {"save": "unused"},
        }
    )
    calls = measure_step(config, [_random_batch()])
    kinds: Counter[str] = Counter()
    for (kind, _), count in calls.items():
        kinds[kind] += count
    payload = sum(size * count for (_, size), count in calls.items())
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    switch = "on" if sequence_parallel else "off"
    return f"| {switch} | {name} | {sum(kinds.values())} | {payload / 1e6:.2f} | {listed} |"


def _random_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40_000, (1, SEQUENCE), generator=generator)
    return Batch(
        tokens=tokens,
        labels=tokens[0].roll(-1),
        learnt=torch.arange(SEQUENCE),
        starts=torch.tensor([0, SEQUENCE], dtype=torch.int32),
        longest=SEQUENCE,
    )


if __name__ == "__main__":
    main()
