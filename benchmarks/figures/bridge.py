"""What a training step sends, beside Megatron-Bridge's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figures.statements import Statement

__all__ = ["STATEMENTS"]

_ROW = (
    "| {base_calls} ({base_mb:.2f}) | {bdlora_calls} ({bdlora_mb:.2f}) | | | "
    "{bridge_lora_calls} ({bridge_lora_mb:.2f}) |"
)


def _sent(kind: str) -> Callable[[Any], Mapping[str, float]]:
    def values(report: Any) -> Mapping[str, float]:
        rows = report["steps"][kind]
        return {
            f"{name}_{what}": value
            for name, row in rows.items()
            for what, value in (("calls", row["total_calls"]), ("mb", row["wire_bytes"] / 1e6))
        }

    return values


def _readme() -> Iterator[Statement]:
    for start, kind in (
        (
            "| [training step](benchmarks/results/bridge.md): collectives (MB a rank sends)",
            "tensor parallel",
        ),
        ("| the same, sequence parallel", "sequence parallel"),
    ):
        yield Statement(
            page="README.md",
            text=f"{start} {_ROW}",
            report="bridge.json",
            values=_sent(kind),
        )


def _tutorial() -> Statement:
    def values(report: Any) -> Mapping[str, float]:
        rows = report["steps"]["tensor parallel"]
        fewer = rows["bridge_lora"]["total_calls"] - rows["bdlora"]["total_calls"]
        return {"fewer": fewer, "layers": report["model"]["num_layers"]}

    return Statement(
        page="docs/tutorials/bridge.md",
        text="{fewer} collectives fewer than Bridge's own LoRA in a model of {layers} layers",
        report="bridge.json",
        values=values,
    )


def _nemo_page() -> Iterator[Statement]:
    def values(report: Any) -> Mapping[str, float]:
        made: dict[str, float] = {}
        for place, kind in (("tp", "tensor parallel"), ("sp", "sequence parallel")):
            made |= {f"{place}_{name}": value for name, value in _sent(kind)(report).items()}
            for name, row in report["steps"][kind].items():
                ratio = row["time_over_base"]
                made |= {f"{place}_{name}_{what}": value for what, value in ratio.items()}
        return made

    for shown, name in (
        ("base", "base"),
        ("BD-LoRA", "bdlora"),
        ("Bridge's `LoRA`", "bridge_lora"),
    ):
        yield Statement(
            page="docs/nemo.md",
            text=f"| {shown} | {{tp_{name}_calls}} | {{tp_{name}_mb:.2f}} | {{sp_{name}_calls}} "
            f"| {{sp_{name}_mb:.2f}} |",
            report="bridge.json",
            values=values,
        )
    yield Statement(
        page="docs/nemo.md",
        text="a step took {tp_bdlora_median:.2f} times the base's with BD-LoRA "
        "({tp_bdlora_lowest:.2f} to {tp_bdlora_highest:.2f} in single rounds) and "
        "{tp_bridge_lora_median:.2f} with Bridge's `LoRA` ({tp_bridge_lora_lowest:.2f} to "
        "{tp_bridge_lora_highest:.2f}); with sequence parallelism {sp_bdlora_median:.2f} "
        "({sp_bdlora_lowest:.2f} to {sp_bdlora_highest:.2f}) and {sp_bridge_lora_median:.2f} "
        "({sp_bridge_lora_lowest:.2f} to {sp_bridge_lora_highest:.2f}).",
        report="bridge.json",
        values=values,
    )


#: What pages say of it.
STATEMENTS: Sequence[Statement] = (*_readme(), _tutorial(), *_nemo_page())
