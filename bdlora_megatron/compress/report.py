"""What a compression lost and won, as JSON, as Markdown and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.plot import plot_errors
from bdlora_megatron.convert.adapter.tables import format_bytes
from bdlora_megatron.errors import MissingDependencyError

__all__ = ["AdapterResult", "ClusterResult", "CompressReport", "Reason", "write_report"]

#: Why an adapter is kept whole: it would lose too much, or its cluster would save no room.
Reason: TypeAlias = Literal["error", "room"]
REPORT_JSON, REPORT_MD, REPORT_PNG = "report.json", "report.md", "errors.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterResult:
    """What became of one adapter. Errors are Frobenius norms of what is lost over the update's.

    Attributes:
        name: Its name.
        cluster: Its cluster; None if it is kept whole.
        error: What it loses, or would lose, all modules together; None where nothing was fitted.
        bytes_before: Of its factors.
        bytes_after: Of its cores, or of its factors if it is kept whole.
        modules: The error of each module.
        reason: Why it is kept whole, if it is: it would lose too much (`error`), or its cluster
            would save no room (`room`).
    """

    name: str
    cluster: int | None
    error: float | None
    bytes_before: int
    bytes_after: int
    modules: Mapping[str, float]
    reason: Reason | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterResult:
    """What became of one cluster.

    Attributes:
        bytes: Of its basis.
        adapters: Compressed adapters.
    """

    bytes: int
    adapters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressReport:
    """What a compression lost and won.

    Attributes:
        options: What was asked for.
        clusters: By number.
        adapters: By name.
        seconds: Time taken, without what an earlier, interrupted run took.
        peak_bytes: The most resident memory of one process, Python and torch included.
    """

    options: CompressOptions
    clusters: Sequence[ClusterResult]
    adapters: Sequence[AdapterResult]
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def whole(self) -> list[AdapterResult]:
        """The adapters that are kept whole."""
        return [adapter for adapter in self.adapters if adapter.cluster is None]

    @property
    def bytes_before(self) -> int:
        """Of all factors."""
        return sum(adapter.bytes_before for adapter in self.adapters)

    @property
    def bytes_after(self) -> int:
        """Of all bases, cores and whole adapters."""
        own = sum(adapter.bytes_after for adapter in self.adapters)
        return own + sum(cluster.bytes for cluster in self.clusters)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        raw = asdict(self)
        raw["options"]["dtype"] = str(self.options.dtype).removeprefix("torch.")
        return {**raw, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def summary(self) -> str:
        """The outcome in a few sentences."""
        compressed = [adapter for adapter in self.adapters if adapter.cluster is not None]
        share = self.bytes_after / self.bytes_before
        lines = [
            f"{len(compressed)} of {len(self.adapters)} adapters compressed in "
            f"{len(self.clusters)} cluster(s): {format_bytes(self.bytes_before)} before, "
            f"{format_bytes(self.bytes_after)} after ({share:.3g} of it)"
        ]
        if compressed:
            lines.append(f"relative error: {spread([a.error or 0.0 for a in compressed])}")
        for reason, why in (
            ("error", f"would lose more than {self.options.max_error} of their norm"),
            ("room", "are in clusters that would save no room"),
        ):
            if own := [adapter for adapter in self.whole if adapter.reason == reason]:
                lines.append(f"{len(own)} kept whole, which {why}: {_named(own)}")
        lines += [
            f"cluster {number}: its basis ({format_bytes(cluster.bytes)}) and cores take more room "
            "than its adapters did; fewer clusters or a smaller rank would win more"
            for number, cluster in enumerate(self.clusters)
            if self._is_no_gain(number, cluster)
        ]
        return "\n".join(lines)

    def _is_no_gain(self, number: int, cluster: ClusterResult) -> bool:
        own = [adapter for adapter in self.adapters if adapter.cluster == number]
        return cluster.bytes + sum(a.bytes_after for a in own) >= sum(a.bytes_before for a in own)

    def markdown(self) -> str:
        """The report as a page."""
        options = self.options
        head = [
            "# Compressed adapters",
            "",
            self.summary().replace("\n", "\n\n"),
            "",
            f"Form {options.form}, {options.num_blocks} block(s), rank {options.rank}, "
            f"{options.core} cores, {str(options.dtype).removeprefix('torch.')}. "
            f"{self.seconds:.1f} s; the largest process had {format_bytes(self.peak_bytes)} of "
            "memory. An error is the Frobenius norm of what is lost over that of the update; it "
            "describes weights, not answers. report.json has every module.",
            "",
            *_table(
                ("cluster", "adapters", "basis", "relative error"),
                [self._cluster_row(number) for number in range(len(self.clusters))],
            ),
            "",
            *_table(
                ("module", "relative error"),
                [(name, spread(errors)) for name, errors in self.by_projection().items()],
            ),
            "",
            *_table(
                ("adapter", "cluster", "relative error", "worst module", "before", "after"),
                [_adapter_row(adapter) for adapter in self.adapters],
            ),
        ]
        return "\n".join(head) + "\n"

    def by_projection(self) -> dict[str, list[float]]:
        """The errors of compressed adapters' modules, all layers of a projection together."""
        errors: dict[str, list[float]] = {}
        for adapter in self.adapters:
            if adapter.cluster is not None:
                for key, error in adapter.modules.items():
                    errors.setdefault(key.split(".", 2)[2], []).append(error)
        return dict(sorted(errors.items()))

    def _cluster_row(self, number: int) -> tuple[str, ...]:
        cluster = self.clusters[number]
        errors = [a.error or 0.0 for a in self.adapters if a.cluster == number]
        return str(number), str(cluster.adapters), format_bytes(cluster.bytes), spread(errors)


def spread(errors: Sequence[float]) -> str:
    """Median and range."""
    low, middle, high = min(errors), statistics.median(errors), max(errors)
    return f"median {middle:.3g}, from {low:.3g} to {high:.3g}"


def write_report(report: CompressReport, folder: Path) -> None:
    """Write the report into the collection's folder; the picture where matplotlib is there."""
    (folder / REPORT_JSON).write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    text = report.markdown()
    try:
        plot_errors(
            {
                "compressed": [a.error or 0.0 for a in report.adapters if a.cluster is not None],
                "kept whole": [a.error for a in report.whole if a.error is not None],
            },
            report.by_projection(),
            folder / REPORT_PNG,
        )
        text += f"\n![Relative errors by adapter and by projection]({REPORT_PNG})\n"
    except MissingDependencyError as error:
        text += f"\nNo picture: {error}\n"
    (folder / REPORT_MD).write_text(text, "utf-8")


def _adapter_row(adapter: AdapterResult) -> tuple[str, ...]:
    worst = max(adapter.modules, key=lambda key: adapter.modules[key], default=None)
    return (
        adapter.name,
        f"whole ({adapter.reason})" if adapter.cluster is None else str(adapter.cluster),
        "not fitted" if adapter.error is None else f"{adapter.error:.3g}",
        "" if worst is None else f"{worst} ({adapter.modules[worst]:.3g})",
        format_bytes(adapter.bytes_before),
        format_bytes(adapter.bytes_after),
    )


def _named(adapters: Sequence[AdapterResult]) -> str:
    shown = ", ".join(
        adapter.name if adapter.error is None else f"{adapter.name} ({adapter.error:.3g})"
        for adapter in adapters[:4]
    )
    return f"{shown} and {len(adapters) - 4} more" if len(adapters) > 4 else shown


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
