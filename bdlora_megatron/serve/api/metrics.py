"""What Prometheus is told: this server's own metrics, and vLLM's names for what routers read.

The Gateway API inference extension's model server protocol asks for the latter, and dashboards made
for vLLM show them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bdlora_megatron.serve.api.client import EngineClient
from bdlora_megatron.serve.api.history import Faults
from bdlora_megatron.serve.messages import Snapshot
from bdlora_megatron.serve.settings import ServeSettings

__all__ = ["Metrics"]

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_GAUGES = {
    "running": "Requests that run",
    "queued": "Requests that wait for a slot or for room",
    "used_blocks": "Blocks of the key-value cache in use",
    "cached_blocks": "Blocks of prompts that no request uses, kept until others need the room",
    "num_blocks": "Blocks of the key-value cache",
    "slots_in_use": "Adapter slots that requests use",
    "num_slots": "Adapter slots",
    "host_bytes": "Bytes of adapters in one rank's host memory, loads under way included",
}
_COUNTERS = {
    "steps": "Steps of the engine",
    "preemptions": "Requests that gave their cache to others and began again",
    "prefix_cache_queries": "Tokens of prompts that were looked up in the prefix cache",
    "prefix_cache_hits": "Tokens of prompts that were found in the prefix cache",
    "slot_hits": "Requests whose adapter was in a slot already",
    "slot_loads": "Adapters copied into a slot",
    "slot_evictions": "Adapters that left a slot for another",
    "host_loads": "Adapters read from disk",
    "host_evictions": "Adapters that left host memory for another",
    "load_failures": "Loads that failed",
}


class Metrics:
    """Counts and times of requests, by adapter, beside the engine's own numbers."""

    def __init__(
        self, client: EngineClient, base: str, settings: ServeSettings, faults: Faults
    ) -> None:
        """Make empty metrics."""
        self._base, self._settings, self._faults = base, settings, faults
        self.registry = CollectorRegistry()
        self._client = client
        self.registry.register(self)
        labels, registry = ("model",), self.registry
        self.requests = Counter(
            "bdlora_requests", "Requests that have ended", ("model", "status"), registry=registry
        )
        self.prompt_tokens = Counter(
            "bdlora_prompt_tokens", "Tokens of prompts", labels, registry=registry
        )
        self.generated_tokens = Counter(
            "bdlora_generated_tokens", "Tokens of answers", labels, registry=registry
        )
        self.rejected = Counter(
            "bdlora_rejected_requests",
            "Requests refused for lack of room",
            labels,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "bdlora_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            labels,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.per_token_s = Histogram(
            "bdlora_time_per_token_seconds",
            "Between two tokens of an answer, on its average",
            labels,
            buckets=_PER_TOKEN_S,
            registry=registry,
        )

        named, registry = ("model_name",), self.registry
        self.vllm_first_token_s = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request's arrival to its first token",
            named,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        ).labels(base)
        self.vllm_between_tokens_s = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of an answer",
            named,
            buckets=_PER_TOKEN_S,
            registry=registry,
        ).labels(base)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, as they are when Prometheus asks."""
        snapshot = self._client.snapshot
        yield from self._vllm(snapshot)
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(f"bdlora_{name}", help_text, getattr(snapshot, name))
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(f"bdlora_{name}", help_text, getattr(snapshot, name))
        waiting = GaugeMetricFamily(
            "bdlora_outstanding_requests",
            "Requests that wait or run, of each adapter that has any",
            labels=["model"],
        )
        for adapter, count in self._client.outstanding.items():
            waiting.add_metric([adapter or self._base], count)
        yield waiting
        for state, counts in self.requests_by_model().items():
            gauge = GaugeMetricFamily(
                f"bdlora_{state}_requests", f"Requests, {state}, of each model", labels=["model"]
            )
            for model, count in counts.items():
                gauge.add_metric([model], count)
            yield gauge
        places = GaugeMetricFamily(
            "bdlora_adapters",
            "Adapters in slots, those in host memory alone, and those that are being read",
            labels=["place"],
        )
        for place, names in asdict(self._client.places).items():
            places.add_metric([place], len(names))
        yield places
        errors = CounterMetricFamily(
            "bdlora_errors",
            "Answers with a status of 400 or more, or an error in a stream",
            labels=["status"],
        )
        for status, count in self._faults.total.items():
            errors.add_metric([str(status)], count)
        yield errors

    def requests_by_model(self) -> dict[str, dict[str, int]]:
        """Requests that run, and those that wait, of each model that has any."""
        found, snapshot = {}, self._client.snapshot
        for state, total, adapters in (
            ("running", snapshot.running, snapshot.running_adapters),
            ("waiting", snapshot.queued, snapshot.waiting_adapters),
        ):
            rest = total - sum(adapters.values())
            found[state] = {**({self._base: rest} if rest > 0 else {}), **adapters}
        return found

    def _vllm(self, snapshot: Snapshot) -> Iterator[Metric]:
        used = snapshot.used_blocks / snapshot.num_blocks if snapshot.num_blocks else 0.0
        for name, help_text, value in (
            ("num_requests_running", _GAUGES["running"], snapshot.running),
            ("num_requests_waiting", _GAUGES["queued"], snapshot.queued),
            ("kv_cache_usage_perc", "Share of the key-value cache in use, from 0 to 1", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._base], value)
            yield gauge
        for name in ("prefix_cache_queries", "prefix_cache_hits"):
            counter = CounterMetricFamily(f"vllm:{name}", _COUNTERS[name], labels=["model_name"])
            counter.add_metric([self._base], getattr(snapshot, name))
            yield counter
        adapters = {
            "max_lora": str(self._settings.max_loras),
            "running_lora_adapters": ",".join(snapshot.running_adapters),
            "waiting_lora_adapters": ",".join(snapshot.waiting_adapters),
        }
        about = "Adapters of requests; the value is the time of the answer"
        info = GaugeMetricFamily("vllm:lora_requests_info", about, labels=list(adapters))
        info.add_metric(list(adapters.values()), time.time())
        yield info
        cache = {
            "block_size": str(self._settings.block_size),
            "num_gpu_blocks": str(snapshot.num_blocks),
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes", labels=list(cache))
        info.add_metric(list(cache.values()), 1.0)
        yield info

    def text(self) -> bytes:
        """All metrics in Prometheus's text form."""
        return generate_latest(self.registry)

    def forget(self, model: str) -> None:
        """Drop an adapter that was unloaded, so that names do not gather for ever."""
        for metric in (
            self.prompt_tokens,
            self.generated_tokens,
            self.rejected,
            self.first_token_s,
            self.per_token_s,
        ):
            metric.remove_by_labels({"model": model})
        self.requests.remove_by_labels({"model": model})
