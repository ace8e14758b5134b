"""This package's engine, without HTTP: `python -m benchmarks.peers.run_ours JOB OUTCOME`.

The ranks are those of `bdlora serve`, and requests reach them through the same pipe.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

from bdlora_megatron.serve.api.client import EngineClient
from bdlora_megatron.serve.messages import Sampling
from bdlora_megatron.serve.ranks import Ranks
from bdlora_megatron.serve.settings import ServeSettings
from benchmarks.peers.job import Job, Load, Outcome, Request, timed


def main() -> None:
    """Run a job."""
    job = Job.read(sys.argv[1])
    started = time.perf_counter()
    folders = dict.fromkeys(folder for load in job.loads for folder in load.adapters)
    names = {folder: f"adapter{number}" for number, folder in enumerate(folders)}
    settings = ServeSettings(
        model=job.base,
        served_model_name="base",
        adapters={name: folder for folder, name in names.items()},
        tensor_parallel_size=job.tp,
        cpu=True,
        dtype=job.dtype,
        layout=job.layout,
        max_loras=max(job.slots, 1),
        max_lora_rank=job.max_rank,
        max_num_seqs=64,
        max_model_len=512,
        block_size=16,
        # Nor has vLLM's; prompts come again in every round.
        enable_prefix_caching=False,
    )
    ranks = Ranks(settings)
    loop = asyncio.new_event_loop()
    client = EngineClient()
    try:
        loop.run_until_complete(_attach(client, ranks))
        packages = ("bdlora-megatron", "megatron-core", "torch")
        outcome = Outcome(
            versions={name: version(name) for name in packages},
            start_s=time.perf_counter() - started,
        )

        def answer(load: Load, requests: Sequence[Request]) -> list[list[int]]:
            return loop.run_until_complete(_answer(client, load, requests, names))

        timed(job, outcome, answer, time.perf_counter)
    finally:
        loop.run_until_complete(_detach(client))
        loop.close()
        ranks.stop(timeout_s=30.0)
    outcome.write(sys.argv[2])


async def _attach(client: EngineClient, ranks: Ranks) -> None:
    client.attach(ranks.link)
    ready = asyncio.create_task(client.ready())
    while not ready.done():
        await asyncio.wait([ready], timeout=0.5)
        if ranks.dead and not ready.done():
            client.detach()
    await ready


async def _detach(client: EngineClient) -> None:
    client.detach()


async def _answer(
    client: EngineClient, load: Load, requests: Sequence[Request], names: dict[str, str]
) -> list[list[int]]:
    async def one(request: Request) -> list[int]:
        adapter = None if request.adapter < 0 else names[load.adapters[request.adapter]]
        sampling = Sampling(temperature=0.0, max_tokens=request.max_tokens)
        stream = client.stream(tuple(request.prompt), sampling, adapter)
        return [token.choice.token async for token in stream]

    return await asyncio.gather(*map(one, requests))


if __name__ == "__main__":
    main()
