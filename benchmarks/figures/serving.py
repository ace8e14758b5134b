"""The server under load, beside its peers, and in a long run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.figures.statements import Statement, on_link

__all__ = ["STATEMENTS"]

_THROUGHPUT_ROW = "| {base:.2f} | {bdlora:.2f} | {half_sharded:.2f} | 1 | |"
_SAME_MEMORY = (
    "{bdlora_resident} adapters fit as BD-LoRA, {half_sharded_resident} half-sharded and "
    "{slora_resident} in S-LoRA's layout; {bdlora_hits:.0f}, {half_sharded_hits:.0f} and "
    "{slora_hits:.0f} % of the requests found theirs in a slot; the server makes "
    "{bdlora_tokens:.0f}, {half_sharded_tokens:.0f} and {slora_tokens:.0f} tokens/s, with a "
    "median time to first token of {bdlora_first:.2f}, {half_sharded_first:.2f} and "
    "{slora_first:.2f} s"
)
_PEER_ADAPTERS = 8


def _throughput(link_ms: float) -> Callable[[Any], Mapping[str, float]]:
    """Tokens a second at the highest rate, over those of the S-LoRA layout."""

    def values(report: Any) -> Mapping[str, float]:
        busiest = max(cell["rate"] for cell in report["cells"])
        made = {
            cell["kind"]: cell["tokens_per_s"]
            for cell in report["cells"]
            if cell["rate"] == busiest and on_link(cell, link_ms)
        }
        return {kind: value / made["slora"] for kind, value in made.items()}

    return values


def _beside_vllm(report: Any) -> Mapping[str, float]:
    """Tokens a second on two ranks; the medians."""
    lora, blocks = (f"{kind}, {_PEER_ADAPTERS} adapters" for kind in ("LoRA", "BD-LoRA"))
    ours, vllm = "bdlora-megatron, TP=2", "vLLM, TP=2"
    places = {
        "base": ("base", ours),
        "vllm_base": ("base", vllm),
        "bdlora": (blocks, ours),
        "half": (lora, ours),
        "slora": (lora, f"{ours}, S-LoRA layout"),
        "vllm_half": (lora, vllm),
        "vllm_sharded": (lora, f"{vllm}, fully sharded"),
    }
    made = {(row["load"], row["contender"]): median(row["tokens_per_s"]) for row in report["rows"]}
    return {name: made[place] for name, place in places.items()}


def _readme() -> Iterator[Statement]:
    for start, link_ms in (
        (
            "| [the server](benchmarks/results/serving.md) under load, tokens/s relative to S-LoRA",
            0,
        ),
        ("| the server under load, 1 ms added", 1),
    ):
        yield Statement(
            page="README.md",
            text=f"{start} {_THROUGHPUT_ROW}",
            report="serving.json",
            values=_throughput(link_ms),
        )
    yield Statement(
        page="README.md",
        text="the base model makes {base:.0f} tokens/s (vLLM {vllm_base:.0f}), eight adapters as "
        "BD-LoRA {bdlora:.0f}, as LoRA {half:.0f} half-sharded, {slora:.0f} in S-LoRA's layout "
        "(vLLM {vllm_half:.0f} and {vllm_sharded:.0f}).",
        report="peers.json",
        values=_beside_vllm,
    )


def _same_memory(report: Any) -> Mapping[str, float]:
    """Each layout's adapters on the device, hits, tokens a second and time to first token."""
    values: dict[str, float] = {}
    for cell in report["cells"]:
        kind = cell["kind"]
        values |= {
            f"{kind}_resident": cell["resident"],
            f"{kind}_hits": 100 * cell["slot_hits"],
            f"{kind}_tokens": cell["tokens_per_s"],
            f"{kind}_first": cell["first_token_p50_s"],
        }
    return values


def _memory() -> Iterator[Statement]:
    yield Statement(
        page="README.md",
        text=f"| the server, [same memory](benchmarks/results/serving-bytes.md) for adapters of as "
        f"many parameters {_THROUGHPUT_ROW}",
        report="serving-bytes.json",
        values=_throughput(0),
    )
    for start, report in (
        ("On two ranks with 8 MB for them on each,", "serving-bytes.json"),
        ("On four ranks with 4 MB,", "serving-bytes-tp4.json"),
    ):
        yield Statement(
            page="docs/many-adapters.md",
            text=f"{start} {_SAME_MEMORY}",
            report=report,
            values=_same_memory,
        )


def _soak() -> Statement:
    return Statement(
        page="docs/serving.md",
        text="In a run of {requests:,} requests at TP={tp} over base, vanilla, block-diagonal and "
        "attention-only adapters with two slots, a fifth adapter was overwritten and loaded again "
        "{loads} times and unloaded {unloads} times: {right:,} got the right answer, {gone:,} for "
        "the fifth were refused while it was gone",
        report="soak.json",
        values=lambda report: report,
    )


def _schemas() -> Statement:
    return Statement(
        page="docs/serving.md",
        text="Of {schemas} random schemas, nested and with references, asked of a random base "
        "model and its adapters in mixed batches at TP={tp}, {valid} answers were valid",
        report="schemas.json",
        values=lambda report: report,
    )


def _prefix() -> Iterator[Statement]:
    yield Statement(
        page="docs/serving.md",
        text="All prompts begin alike, and {rate:.0f}% of their tokens came from the prefix cache.",
        report="soak.json",
        values=lambda report: {"rate": 100 * report["prefix_cache_hit_rate"]},
    )
    yield Statement(
        page="docs/serving.md",
        text="{hits:.0f}% of the prompts' tokens were found in the cache. The medians over the "
        "rounds, with the cache relative to without it: tokens/s {tokens_per_s:.2f}, time to first "
        "token {first_token_p50_s:.2f}, whole answer {whole_answer_p50_s:.2f}.",
        report="prefix.json",
        values=lambda report: {"hits": 100 * report["hit_rate"], **report["on_over_off"]},
    )


#: What pages say of it.
STATEMENTS: Sequence[Statement] = (*_readme(), *_memory(), _soak(), _schemas(), *_prefix())
