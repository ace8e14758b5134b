"""Megatron's answers beside PEFT's, and what each layout sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.demo.megatron import LayoutCost
from examples.demo.reference import Answer, Speed


def agreement_rows(
    reference: Mapping[str, Sequence[Answer]], ours: Mapping[str, Sequence[Answer]]
) -> list[tuple[str, str, str, str]]:
    """Compare two sets of answers to the same prompts.

    Args:
        reference: Answers by name, one for each prompt.
        ours: The same names and prompts.

    Returns:
        For each name: the largest difference of any logit of any prompt token, the size of the
        largest logit, and how many of the generated answers are the same token for token.
    """
    rows = []
    for name, wanted in reference.items():
        pairs = list(zip(wanted, ours[name], strict=True))
        difference = max(float((a.logits - b.logits).abs().max()) for a, b in pairs)
        size = max(float(a.logits.abs().max()) for a, _ in pairs)
        same = sum(a.token_ids == b.token_ids for a, b in pairs)
        rows.append((name, f"{difference:.1e}", f"{size:.0f}", f"{same} of {len(pairs)}"))
    return rows


def speed_rows(speeds: Sequence[Speed]) -> list[tuple[str, int, int, str, str]]:
    """One row for each way to generate the answers, with its tokens per second."""
    return [
        (
            speed.name,
            speed.tokens,
            speed.passes,
            f"{speed.seconds:.1f}",
            f"{speed.tokens / speed.seconds:.1f}",
        )
        for speed in speeds
    ]


def cost_rows(costs: Sequence[LayoutCost]) -> list[tuple[str, str, str, str, str, str]]:
    """One row for each layout: what it sends per decoder layer beyond the base model."""
    return [
        (
            cost.layout.value,
            cost.adapter,
            _listed(cost.forward),
            f"{cost.forward_bytes:,.0f}",
            _listed(cost.backward),
            f"{cost.backward_bytes:,.0f}",
        )
        for cost in costs
    ]


def _listed(counts: Mapping[str, float]) -> str:
    named = (f"{count:g} {kind.replace('_', '-')}" for kind, count in sorted(counts.items()))
    return ", ".join(named) or "none"
