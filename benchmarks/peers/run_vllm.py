"""vLLM's offline engine: `python -m benchmarks.peers.run_vllm JOB OUTCOME`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.peers.job import Job, Load, Outcome, Request, timed

_CACHE_GIB = "1"


def main() -> None:
    """Run a job."""
    job = Job.read(sys.argv[1])
    started = time.perf_counter()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = _CACHE_GIB
    # Its own choice leaves cores unused.
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank :: job.tp] for rank in range(job.tp)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, s)) for s in shares)
    engine = _engine(job)
    packages = ("vllm-cpu", "torch", "transformers")
    outcome = Outcome(
        versions={name: version(name) for name in packages},
        start_s=time.perf_counter() - started,
    )
    timed(job, outcome, lambda load, requests: _answer(engine, load, requests), time.perf_counter)
    outcome.write(sys.argv[2])


def _engine(job: Job) -> Any:
    from vllm import LLM

    longest = 512
    lora: dict[str, Any] = {}
    if job.slots:
        lora = {
            "enable_lora": True,
            "max_loras": job.slots,
            "max_cpu_loras": job.slots,
            "max_lora_rank": job.max_rank,
            "fully_sharded_loras": job.layout == "fully_sharded",
        }
    return LLM(
        model=job.base,
        dtype=job.dtype,
        tensor_parallel_size=job.tp,
        max_model_len=longest,
        max_num_seqs=64,
        # The repeats' prompts are the same ones.
        enable_prefix_caching=False,
        seed=0,
        **lora,
    )


def _answer(engine: Any, load: Load, requests: Sequence[Request]) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    # The number is what vLLM keeps an adapter by, so it counts over all loads.
    loras = [
        None
        if request.adapter < 0
        else LoRARequest(
            load.adapters[request.adapter],
            1 + request.adapter,
            load.adapters[request.adapter],
        )
        for request in requests
    ]
    outputs = engine.generate(
        [{"prompt_token_ids": request.prompt} for request in requests],
        [
            SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
            for request in requests
        ],
        lora_request=loras if load.adapters else None,
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
