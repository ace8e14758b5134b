"""One mixed batch in the serving engine, held to PEFT's own logits on the same device.

Base requests, vanilla LoRAs of different rank and BD-LoRAs decode together, greedily, and are
scored. PEFT then reads the same tokens, request by request. Held to it are the log-probabilities
that the engine gave, and each token's choice: PEFT may find no other token more probable, by more
than rounding.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bdlora_megatron.serve.engine import ServingEngine
from bdlora_megatron.serve.engine.rank import build_engine
from bdlora_megatron.serve.messages import Choice, LoadAdapter, Sampling, Submit, Token
from bdlora_megatron.serve.settings import ServeSettings
from benchmarks.device.models import ADAPTERS, VOCAB, Reference, make_adapter, make_base
from benchmarks.device.session import one_rank
from benchmarks.device.task import Outcome, Task, judged

__all__ = ["Variant", "run"]

#: In float32, of log-probabilities: rounding of two orders of summation, through three layers.
_FLOAT32 = 1e-3
#: In bfloat16, how much further than PEFT's own bfloat16 from PEFT's float32, at most.
_BFLOAT16_FACTOR, _BFLOAT16_MORE = 2.0, 0.02
_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the engine.

    Attributes:
        dtype: ``float32`` or ``bfloat16``.
        cuda_graphs: Whether decoding steps are captured.
        scored: Whether half of the requests have their prompts scored, too.
    """

    dtype: str
    cuda_graphs: bool = False
    scored: bool = True

    @property
    def name(self) -> str:
        """What the report calls it."""
        steps = "captured" if self.cuda_graphs else "eager"
        return f"{self.dtype}, {steps}{', prompts scored' if self.scored else ''}"


_EAGER = (Variant(dtype="float32"), Variant(dtype="bfloat16"))
_CAPTURED = (
    Variant(dtype="float32", cuda_graphs=True, scored=False),
    Variant(dtype="bfloat16", cuda_graphs=True, scored=False),
    Variant(dtype="bfloat16", cuda_graphs=True),
)


def run(task: Task) -> Outcome:
    """Run each variant; one that fails leaves the others their turn.

    Args:
        task: The part's time box.

    Returns:
        Errors and tolerances by variant.
    """
    found: dict[str, Any] = {}
    variants = [*_EAGER, *(_CAPTURED if torch.cuda.is_available() else ())]
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder, "base"))
        adapters = {
            name: make_adapter(base, Path(folder, name), seed=seed, **settings)
            for seed, (name, settings) in enumerate(ADAPTERS.items())
        }
        for variant in variants:
            if task.is_short:
                break
            try:
                check = _check_apart if variant.cuda_graphs else _check
                found[variant.name] = check(variant, base, adapters)
            except Exception:
                traceback.print_exc()
                found[variant.name] = {"wrong": traceback.format_exc()}
            task.keep(_outcome(found, len(variants), unfinished=True))
    return _outcome(found, len(variants))


def _check_apart(variant: Variant, base: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    """In a process of its own: a capture that fails may leave nothing that works."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_check, variant, base, adapters).result()


def _check(variant: Variant, base: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    requests = _requests(variant)
    with one_rank(cuda_graphs=variant.cuda_graphs) as device, torch.inference_mode():
        control = torch.distributed.new_group(backend="gloo")
        engine, manager = build_engine(_settings(variant, base), control)
        for ticket, (name, path) in enumerate(adapters.items()):
            answer = manager.load(LoadAdapter(ticket=ticket, name=name, path=str(path), wait=False))
            if answer is not None and answer.error is not None:
                raise RuntimeError(f"adapter {name}: {answer.error}")
        with _counted_replays() as replays:
            answers, together = _drive(engine, requests)
    compared = _compare(variant, requests, answers, base, adapters, device)
    if variant.cuda_graphs and not replays:
        compared["wrong"] = "no CUDA graph was replayed"
    return {"together": together, "replays": len(replays), **compared}


@contextmanager
def _counted_replays() -> Iterator[list[Any]]:
    """A list that gets an entry for every CUDA graph that is replayed."""
    seen: list[Any] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: Any) -> Any:
        seen.append(None)
        return original(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", replay):
        yield seen


def _settings(variant: Variant, base: Path) -> ServeSettings:
    gpu = torch.cuda.is_available()
    return ServeSettings(
        model=str(base),
        cpu=not gpu,
        dtype=variant.dtype,
        cuda_graphs=variant.cuda_graphs,
        max_loras=len(ADAPTERS),
        max_lora_rank=32,
        max_num_seqs=16,
        # Less than the prompts together: some are read in chunks.
        max_num_batched_tokens=256 if gpu else 64,
        max_model_len=512 if gpu else 128,
        block_size=256 if gpu else 16,
        kv_cache_memory_bytes=2**28 if gpu else 2**25,
    )


def _requests(variant: Variant) -> list[Submit]:
    """Two of each adapter and of the base model; the second may have its prompt scored, too."""
    longest = 300 if torch.cuda.is_available() else 40
    rng = random.Random(5)
    return [
        Submit(
            request_id=number,
            prompt=tuple(rng.randrange(VOCAB) for _ in range(rng.randint(3, longest))),
            sampling=Sampling(
                temperature=0.0,
                max_tokens=rng.randint(6, 24),
                logprobs=0,
                prompt_logprobs=variant.scored and number > len(ADAPTERS),
            ),
            adapter=adapter,
        )
        for number, adapter in enumerate([None, *ADAPTERS, None, *ADAPTERS])
    ]


def _drive(
    engine: ServingEngine, requests: Sequence[Submit]
) -> tuple[dict[int, list[Choice]], int]:
    """Each request's choices, its prompt's first where they are scored; and how many ran at once.

    Raises:
        RuntimeError: A request was refused, or the engine came to no end.
    """
    got: dict[int, list[Choice]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    together = 0
    for _ in range(_STEPS):
        if not engine.has_work:
            return got, together
        for event in engine.step(wait_s=0.05):
            if not isinstance(event, Token):
                raise RuntimeError(f"request {event.request_id}: {event.reason}")
            got[event.request_id] += [*event.prompt, event.choice]
        together = max(together, engine.snapshot().running)
    raise RuntimeError(f"the engine has not ended after {_STEPS} steps")


def _compare(
    variant: Variant,
    requests: Sequence[Submit],
    answers: dict[int, list[Choice]],
    base: Path,
    adapters: dict[str, Path],
    device: str,
) -> dict[str, Any]:
    exact = Reference(base, adapters, torch.float32, device=device)
    half = None
    if variant.dtype == "bfloat16":
        half = Reference(base, adapters, torch.bfloat16, device=device)
    total = _Errors()
    for request in requests:
        total.add(request, answers[request.request_id], exact, half)
    return total.judged()


class _Errors:
    """What was found over all requests, in units of a log-probability."""

    def __init__(self) -> None:
        self._off = self._regret = self._half = 0.0
        self._effect = math.inf
        self._tokens = 0
        self._is_half = False

    def add(
        self,
        request: Submit,
        choices: Sequence[Choice],
        exact: Reference,
        half: Reference | None,
    ) -> None:
        """Read one request's tokens with PEFT.

        Raises:
            RuntimeError: The answer is not as long as was asked for.
        """
        scored = len(request.prompt) - 1 if request.sampling.prompt_logprobs else 0
        if len(choices) != scored + request.sampling.max_tokens:
            raise RuntimeError(f"request {request.request_id} has {len(choices)} choices")
        tokens = [*request.prompt, *(choice.token for choice in choices[scored:])]
        wanted = exact.log_probabilities(tokens, request.adapter)[-len(choices) :]
        picked = torch.tensor([[choice.token] for choice in choices])
        own = wanted.gather(1, picked)[:, 0]
        said = torch.tensor([math.nan if c.logprob is None else c.logprob for c in choices])
        self._off = _most(self._off, (said - own).abs())
        chosen = wanted[scored:]
        self._regret = _most(self._regret, chosen.max(1).values - own[scored:])
        self._tokens += len(choices)
        if request.adapter is not None:
            plain = exact.log_probabilities(tokens, None)[-len(choices) :].gather(1, picked)[:, 0]
            self._effect = min(self._effect, float((plain - own).abs().max()))
        if half is not None:
            self._is_half = True
            rounded = half.log_probabilities(tokens, request.adapter)[-len(choices) :]
            self._half = _most(self._half, (rounded - wanted).abs().gather(1, picked))

    def judged(self) -> dict[str, Any]:
        """All numbers, and what is wrong with them."""
        allowed = _FLOAT32
        if self._is_half:
            allowed = _BFLOAT16_FACTOR * self._half + _BFLOAT16_MORE
        problems = {
            f"log-probabilities are off by {self._off:.1e}, allowed {allowed:.1e}": not (
                self._off <= allowed
            ),
            f"a token is less probable than another by {self._regret:.1e}": not (
                self._regret <= 2 * allowed
            ),
            # An adapter that changed next to nothing would let any mistake pass.
            f"an adapter changes its answers by {self._effect:.1e} only": not (
                self._effect > 3 * allowed
            ),
        }
        return {
            "tokens": self._tokens,
            "log_probabilities_off": self._off,
            "allowed": allowed,
            "less_probable_by": self._regret,
            "least_effect_of_an_adapter": self._effect,
            "pefts_own_bfloat16_off": self._half if self._is_half else None,
            "wrong": "; ".join(problem for problem, here in problems.items() if here) or None,
        }


def _most(before: float, errors: torch.Tensor) -> float:
    """The larger one; NaN stays NaN."""
    largest = float(errors.max())
    return largest if math.isnan(largest) else max(before, largest)


def _outcome(found: dict[str, Any], wanted: int, *, unfinished: bool = False) -> Outcome:
    wrong = {name: result for name, result in found.items() if result["wrong"]}
    device = "GPU" if torch.cuda.is_available() else "CPU"
    line = f"{len(found)} of {wanted} variants ran on the {device}, {len(wrong)} wrong"
    for name, result in found.items():
        if name not in wrong:
            line += f"; {name}: off by {result['log_probabilities_off']:.1e}"
    state = judged(unfinished=unfinished, wrong=bool(wrong) or not found)
    return Outcome(state=state, line=line, found=found, notes=_notes(found))


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    for name, result in found.items():
        if "tokens" in result:
            notes.append(
                f"- {name}: {result['tokens']} tokens, {result['together']} requests at once; "
                f"log-probabilities off by {result['log_probabilities_off']:.1e} at most (allowed "
                f"{result['allowed']:.1e}), adapters change them by "
                f"{result['least_effect_of_an_adapter']:.1e} at least"
            )
        if result["wrong"]:
            last = result["wrong"].strip().splitlines()[-1]
            notes.append(f"- {name} is wrong: {last}")
    return notes
