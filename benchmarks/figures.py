"""Where the figures in README.md and the documentation come from.

Each `Statement` is a piece of a page with places for numbers, and a function that takes them from a
report in benchmarks/results. A test holds the pages to the reports. After new measurements,
`python -m benchmarks.figures` writes the new numbers into the pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from string import Formatter
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: A number as a page has it; signs are ASCII, so that a search finds them.
NUMBER = r"[-+]?\d(?:[\d.,]*\d)?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A piece of a page and the report that vouches for its numbers.

    Attributes:
        page: The page, from the repository's root.
        text: The piece, with a place such as ``{median:.2f}`` for every number that was measured;
            white space of any kind and length may stand for a space.
        report: The report's name in benchmarks/results.
        values: The numbers by the names of their places, from the report's content.
    """

    page: str
    text: str
    report: str
    values: Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number on a page beside the one that its report has.

    Attributes:
        name: Its place in the statement.
        start: Where it begins in the page's text.
        end: Where it ends.
        said: What the page says.
        wanted: What the report says.
    """

    name: str
    start: int
    end: int
    said: str
    wanted: str


class MissingStatementError(LookupError):
    """A page does not have a statement, or has it more than once."""


def find(statement: Statement, text: str) -> tuple[tuple[int, int], list[Figure]]:
    """Look for a statement on its page, whatever numbers stand there.

    Args:
        statement: What to look for.
        text: The page's text.

    Returns:
        Where the piece begins and ends, and its numbers.

    Raises:
        MissingStatementError: It is not there once; the message says how it should read.
    """
    wanted = _wanted(statement)
    found = list(re.finditer(_pattern(statement.text), text))
    if len(found) != 1:
        raise MissingStatementError(
            f"{statement.page} has {len(found)} times, wanted once (take the statement out of "
            f"benchmarks/figures.py if it is no longer made):\n{statement.text.format(**wanted)}"
        )
    match = found[0]
    figures = [
        Figure(
            name=name,
            start=match.start(name),
            end=match.end(name),
            said=match[name],
            wanted=shown,
        )
        for name, shown in _shown(statement.text, wanted)
    ]
    return match.span(), figures


def correct(page: str) -> list[str]:
    """Write the reports' numbers into a page.

    Args:
        page: The page, from the repository's root.

    Returns:
        What was changed.
    """
    path = ROOT / page
    text = path.read_text("utf-8")
    wrong = [
        figure
        for statement in STATEMENTS
        if statement.page == page
        for figure in find(statement, text)[1]
        if figure.said != figure.wanted
    ]
    for figure in sorted(wrong, key=lambda figure: figure.start, reverse=True):
        text = text[: figure.start] + figure.wanted + text[figure.end :]
    path.write_text(text, "utf-8")
    return [f"{page}: {figure.said} is now {figure.wanted} ({figure.name})" for figure in wrong]


def _pattern(text: str) -> str:
    parts = []
    for literal, name, _, _ in Formatter().parse(text):
        parts.append(r"\s+".join(re.escape(word) for word in re.split(r"\s+", literal)))
        if name is not None:
            parts.append(f"(?P<{name}>{NUMBER})")
    return "".join(parts)


def _shown(text: str, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for _, name, spec, _ in Formatter().parse(text):
        if name is not None:
            yield name, format(values[name], spec or "")


def _wanted(statement: Statement) -> Mapping[str, float]:
    return statement.values(load(statement.report))


@cache
def load(report: str) -> Any:
    """A report's content: what its JSON holds, or its text where it has none."""
    text = (RESULTS / report).read_text("utf-8")
    return json.loads(text) if report.endswith(".json") else text


# Megatron-Bridge's LoRA: what a training step sends.


def _bridge(kind: str) -> Callable[[Any], Mapping[str, float]]:
    def values(report: Any) -> Mapping[str, float]:
        rows = report["steps"][kind]
        return {
            f"{name}_{what}": value
            for name, row in rows.items()
            for what, value in (("calls", row["total_calls"]), ("mb", row["wire_bytes"] / 1e6))
        }

    return values


# The layouts' times.


def _on_link(cell: Any, link_ms: float) -> bool:
    return abs(1e3 * cell["latency_s"] - link_ms) < 1e-9


_Step = tuple[str, int, int, int | None]
_STEP = ("phase", "batch", "length", "adapters")


def _cells(report: Any, step: _Step, link_ms: float) -> dict[str, Any]:
    found = {
        cell["arm"]: cell
        for cell in report["cells"]
        if tuple(cell[key] for key in _STEP) == step and _on_link(cell, link_ms)
    }
    if missing := {"slora 16", *_ARMS.values()} - set(found):
        raise MissingStatementError(
            f"layouts.json has no cells of {step} at {link_ms} ms for {missing}"
        )
    return found


def _speed(step: _Step, link_ms: float) -> Callable[[Any], Mapping[str, float]]:
    """How many times as fast as S-LoRA, round by round: the median and the quartiles."""

    def values(report: Any) -> Mapping[str, float]:
        cells = _cells(report, step, link_ms)
        made: dict[str, float] = {}
        for name, arm in _ARMS.items():
            rounds = zip(cells["slora 16"]["seconds"], cells[arm]["seconds"], strict=True)
            low, middle, high = quantiles([a / b for a, b in rounds], n=4, method="inclusive")
            made |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        return made

    return values


def _errors(cells: str) -> Callable[[Any], Mapping[str, float]]:
    """How far the cost model was from some of the cells; all but their number in per cent."""

    def values(report: Any) -> Mapping[str, float]:
        found = report["calibration"]["errors"][cells]
        return {name: value * (1 if name == "number" else 100) for name, value in found.items()}

    return values


_ARMS = {
    "base": "base",
    "bdlora": "bdlora 32",
    "half": "half_sharded 16",
}

# The server's throughput.


def _throughput(link_ms: float) -> Callable[[Any], Mapping[str, float]]:
    """Tokens a second at the highest rate, over those of the S-LoRA layout."""

    def values(report: Any) -> Mapping[str, float]:
        busiest = max(cell["rate"] for cell in report["cells"])
        made = {
            cell["kind"]: cell["tokens_per_s"]
            for cell in report["cells"]
            if cell["rate"] == busiest and _on_link(cell, link_ms)
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


# Quality.


def _quality(num_blocks: int) -> Callable[[Any], Mapping[str, float]]:
    def values(report: Any) -> Mapping[str, float]:
        made = {}
        for row in report["table"]:
            if row["num_blocks"] == num_blocks:
                made[f"r{row['lora_rank']}"] = row["loss_over_lora"]
                made[f"r{row['lora_rank']}_spread"] = row["loss_over_lora_spread"]
        return made

    return values


# Predictions; their report has no JSON.


def _predicted(model: str) -> Callable[[Any], Mapping[str, float]]:
    def values(report: Any) -> Mapping[str, float]:
        made = {}
        for tp in (2, 4, 8):
            start = f"| {model} | a100-nvlink | {tp} | "
            (line,) = (line for line in report.splitlines() if line.startswith(start))
            for batch, cell in zip((1, 8, 32, 64), line[len(start) : -2].split(" | "), strict=True):
                made[f"tp{tp}_batch{batch}"] = float(cell)
        return made

    return values


_BRIDGE_ROW = (
    "| {base_calls} ({base_mb:.2f}) | {bdlora_calls} ({bdlora_mb:.2f}) | | | "
    "{bridge_lora_calls} ({bridge_lora_mb:.2f}) |"
)
_SPEED_ROW = (
    "| {base:.2f} | {bdlora:.2f} ({bdlora_low:.2f} to {bdlora_high:.2f}) | "
    "{half:.2f} ({half_low:.2f} to {half_high:.2f}) | 1 | |"
)
_THROUGHPUT_ROW = "| {base:.2f} | {bdlora:.2f} | {half_sharded:.2f} | 1 | |"
_ONE, _MANY = ("decode", 1, 128, None), ("mixed", 32, 128, 32)
_PEER_ADAPTERS = 8
_QUALITY_ROW = " | ".join(f"{{r{rank}:+.4f}} ± {{r{rank}_spread:.4f}}" for rank in (8, 16, 32, 64))


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
            text=f"{start} {_BRIDGE_ROW}",
            report="bridge.json",
            values=_bridge(kind),
        )
    for start, step, link_ms in (
        (
            "| [decoding](benchmarks/results/layouts.md) 1 request, times as fast as S-LoRA",
            _ONE,
            0,
        ),
        ("| the same, 1 ms added to each collective", _ONE, 1),
        ("| decoding 32 requests, each with an adapter of its own", _MANY, 0),
    ):
        yield Statement(
            page="README.md",
            text=f"{start} {_SPEED_ROW}",
            report="layouts.json",
            values=_speed(step, link_ms),
        )
    for start, link_ms in (
        ("| [the server](benchmarks/results/serving.md) under load, tokens/s over S-LoRA's", 0),
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
    yield Statement(
        page="README.md",
        text="BD-LoRA of twice the rank decodes one request {tp8_batch1:.2f} times as fast as "
        "S-LoRA on 8 ranks and {tp2_batch1:.2f} times on 2 for Llama-3.1-8B,",
        report="cost_model.md",
        values=_predicted("llama-3.1-8b"),
    )
    yield Statement(
        page="README.md",
        text="for Llama-3.1-8B, {tp8_batch1:.2f} and {tp2_batch1:.2f} for 70B",
        report="cost_model.md",
        values=_predicted("llama-3.1-70b"),
    )


def _quality_statements() -> Iterator[Statement]:
    for page in ("README.md", "docs/tutorials/rank.md"):
        for blocks in (3, 8):
            yield Statement(
                page=page,
                text=f"| BD-LoRA, N={blocks} | {_QUALITY_ROW} |",
                report="quality.json",
                values=_quality(blocks),
            )


def _cost_model() -> Iterator[Statement]:
    for start, cells in (
        ("| fifth run, nothing changed but its seven numbers", "held out"),
        ("| of the fifth, decoding", "of it, decode"),
        ("| mixed steps", "of it, mixed"),
        ("| prefill", "of it, prefill"),
        ("| training", "of it, train"),
    ):
        yield Statement(
            page="docs/cost-model.md",
            text=f"{start} | {{number:.0f}} | {{median:.1f}} % | {{high:.1f}} % "
            "| {largest:.1f} % | {within:.0f} % |",
            report="layouts.json",
            values=_errors(cells),
        )


def _bridge_tutorial() -> Statement:
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


def _bridge_pages() -> Iterator[Statement]:
    def values(report: Any) -> Mapping[str, float]:
        made: dict[str, float] = {}
        for place, kind in (("tp", "tensor parallel"), ("sp", "sequence parallel")):
            made |= {f"{place}_{name}": value for name, value in _bridge(kind)(report).items()}
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


def _converting() -> Iterator[Statement]:
    def speeds(report: Any) -> Mapping[str, float]:
        ways = {row["way"]: row for row in report["throughput"]}
        plain = ways["plain safetensors load and save"]
        bare, kept = ways["PEFT to PEFT"], ways["PEFT to PEFT, hashed and recorded"]
        return {
            "size": report["bytes"] / 1e6,
            "plain": plain["gb_per_s"],
            "bare": bare["gb_per_s"],
            "share": bare["of_plain"],
            "kept": kept["gb_per_s"],
            "peak": kept["peak_bytes"] / 1e6,
        }

    yield Statement(
        page="docs/convert.md",
        text="an 8B-shaped adapter of {size:.0f} MB went from PEFT to PEFT at {bare:.2f} GB/s, "
        "{share:.2f} of the plain copy's {plain:.2f}, and at {kept:.2f} GB/s with the hashes and "
        "records that the command keeps, in {peak:.0f} MB of memory",
        report="conversion.json",
        values=speeds,
    )
    for way, unit, digits in (
        ("exact", "GB", 2),
        ("truncate to rank 64", "MB", 0),
        ("truncate to equal parameters", "GB", 2),
    ):
        yield Statement(
            page="docs/convert.md",
            text=f"| {way} | {{rank}} | {{{unit}:.{digits}f}} {unit} | {{seconds:.0f}} s "
            "| {peak:.0f} MB |",
            report="conversion.json",
            values=_large(way),
        )


def _large(way: str) -> Callable[[Any], Mapping[str, float]]:
    """What became of the 70B-shaped adapter."""

    def values(report: Any) -> Mapping[str, float]:
        (run,) = (run for run in report["large"]["runs"] if run["way"] == way)
        return {
            "rank": run["rank"],
            "GB": run["bytes"] / 1e9,
            "MB": run["bytes"] / 1e6,
            "seconds": run["seconds"],
            "peak": run["peak_bytes"] / 1e6,
        }

    return values


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


#: Everything that is held to a report.
STATEMENTS: Sequence[Statement] = (
    *_readme(),
    *_quality_statements(),
    *_cost_model(),
    _bridge_tutorial(),
    *_bridge_pages(),
    *_converting(),
    _soak(),
)


def main() -> None:
    """Correct every page and say what was changed."""
    changed = [line for page in sorted({s.page for s in STATEMENTS}) for line in correct(page)]
    print("\n".join(changed) or "all figures are those of the reports")


if __name__ == "__main__":
    main()
