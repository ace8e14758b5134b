"""What one training step communicates: base, BD-LoRA and Megatron-Bridge's own LoRA.

    make bench-bridge

Two ranks, one model, one batch; every method is applied by Bridge's own PEFT call. Calls and bytes
are exact; times are of a CPU with gloo and stand here only as ratios within one run.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TP, RANK = 2, 16
SEQUENCE, BATCH, VOCABULARY = 256, 4, 512
ROUNDS, STEPS = 5, 4
METHODS = ("base", "bdlora", "bridge_lora")
MODEL = {
    "num_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 1408,
}


def main() -> None:
    """Measure on two ranks and write ``results/bridge.json`` and ``results/bridge.md``."""
    from tests.harness import run_ranks

    rows = {}
    for sequence_parallel in (False, True):
        name = "sequence parallel" if sequence_parallel else "tensor parallel"
        rows[name] = run_ranks(TP, measure, sequence_parallel, timeout_s=900)[0]
    result = {
        "model": {**MODEL, "sequence": SEQUENCE, "batch": BATCH, "dtype": "float32"},
        "rank": RANK,
        "tp": TP,
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads a rank, gloo",
        "steps": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bridge.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (RESULTS / "bridge.md").write_text(text)
    print(text)


def versions() -> dict[str, str]:
    """Of what was compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("megatron-bridge", "megatron-core", "torch")}


def measure(rank: int, world_size: int, sequence_parallel: bool) -> dict[str, Any]:
    """Counts and times of every method, in turns, so that a slow moment of the machine hits all."""
    from tests.fakes.transformer_engine import forget_megatron

    forget_megatron()
    from tests.fakes.bridge_on_cpu import prepare

    prepare()
    from bdlora_megatron import runtime

    with runtime.model_parallel(world_size):
        models = {name: build(name, sequence_parallel) for name in METHODS}
        found = {name: count(model) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(ROUNDS):
            for name, model in models.items():
                times[name].append(timed(model))
        ratios = {
            name: [own / base for own, base in zip(times[name], times["base"], strict=True)]
            for name in METHODS
        }
    for name, entry in found.items():
        entry["step_ms_median"] = 1000 * statistics.median(times[name])
        entry["time_over_base"] = {
            "median": statistics.median(ratios[name]),
            "lowest": min(ratios[name]),
            "highest": max(ratios[name]),
        }
    return found


def build(method: str, sequence_parallel: bool) -> torch.nn.Module:
    """A model with Megatron-Core's own layers; every method starts from the same one."""
    from megatron.bridge.peft.lora import LoRA
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **MODEL,
        tensor_model_parallel_size=TP,
        sequence_parallel=sequence_parallel,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
    )
    torch.manual_seed(1)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    # Without a trainable layer a base model would have no backward at all: its embedding trains,
    # under every method, so that gradients go all the way down.
    if method == "base":
        model.requires_grad_(False)
    elif method == "bdlora":
        model = block_diagonal()(model)
    else:
        model = LoRA(dim=RANK, alpha=32)(model)
    model.embedding.requires_grad_(True)
    return model


def block_diagonal() -> Any:
    """BD-LoRA with one A for a fused layer, as Bridge's ``LoRA`` has."""
    from bdlora_megatron.bridge import BDLoRA

    return BDLoRA(dim=RANK, alpha=32, num_blocks=TP, fused=True)


def batch() -> dict[str, torch.Tensor]:
    """The arguments of the one forward call that all methods make."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1),
        "attention_mask": torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().expand(BATCH, 1, -1, -1),
        "labels": ids.roll(-1, 1),
    }


def step(model: torch.nn.Module) -> None:
    """One forward and backward."""
    model.zero_grad(set_to_none=True)
    model(**batch()).mean().backward()


def count(model: torch.nn.Module) -> dict[str, Any]:
    """Calls and bytes of a step on this rank."""
    from bdlora_megatron.runtime import record_collectives

    step(model)
    with record_collectives() as log:
        step(model)
    adapters = [p for n, p in model.named_parameters() if ".adapter." in n]
    return {
        "calls": log.counts(),
        "total_calls": len(log.calls),
        "wire_bytes": log.wire_bytes,
        "adapter_parameters_per_rank": sum(p.numel() for p in adapters),
    }


def timed(model: torch.nn.Module) -> float:
    """Seconds a step, over a few, from a common start."""
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        step(model)
    torch.distributed.barrier()
    return (time.perf_counter() - start) / STEPS


def report(result: dict[str, Any]) -> str:
    """The table for the documents."""
    model, made = result["model"], result["versions"]
    lines = [
        "# A training step beside Megatron-Bridge",
        "",
        f"{model['num_layers']} layers, hidden size {model['hidden_size']}, {model['batch']} rows "
        f"of {model['sequence']} tokens, {model['dtype']}, rank {result['rank']}, "
        f"{result['tp']} tensor-parallel ranks; Megatron-Bridge {made['megatron-bridge']}, "
        f"Megatron-Core {made['megatron-core']}, torch {made['torch']}; "
        f"{result['machine']}. Made by `make bench-bridge`.",
    ]
    titles = {"base": "base", "bdlora": "BD-LoRA", "bridge_lora": "Bridge's `LoRA`"}
    for name, rows in result["steps"].items():
        lines += [
            "",
            f"One training step, {name}:",
            "",
            "| | all-reduce | all-gather | reduce-scatter | calls | MB sent by a rank | "
            "step time over base |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, row in rows.items():
            kinds = [row["calls"].get(k, 0) for k in ("all_reduce", "all_gather", "reduce_scatter")]
            ratio = row["time_over_base"]
            spread = f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
            cells = [*kinds, row["total_calls"], f"{row['wire_bytes'] / 1e6:.2f}", spread]
            lines.append(f"| {titles[method]} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
