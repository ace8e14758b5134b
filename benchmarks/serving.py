"""Load on a server with many adapters: BD-LoRA, the S-LoRA layout, and the base model alone.

Arrivals and popularity are those of S-LoRA's benchmark (arXiv 2311.03285, section 7.1): intervals
between requests follow a Gamma distribution of rate R and coefficient of variation cv, adapter i is
asked for with probability proportional to i ** -alpha, and lengths are uniform. A request is
satisfied if its first token comes within six seconds. The servers run one after another on the
same machine under the same requests, `--rounds` times in turn.

    python -m benchmarks.serving --cpu --tp 2 --rate 4 --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SATISFIED_S = 6.0
_LISTENING = re.compile(rb"listening on (http://\S+)")


@dataclass(frozen=True)
class Arrival:
    """A request of the load."""

    at_s: float
    adapter: int
    prompt: list[int]
    max_tokens: int


def load(args: argparse.Namespace) -> list[Arrival]:
    """The same requests for every server."""
    rng = random.Random(args.seed)
    weights = [(i + 1) ** -args.alpha for i in range(args.adapters)]
    arrivals, now_s = [], 0.0
    shape, scale = 1 / args.cv**2, args.cv**2 / args.rate
    while True:
        now_s += rng.gammavariate(shape, scale)
        if now_s > args.seconds:
            return arrivals
        adapter = rng.choices(range(args.adapters), weights)[0]
        prompt = [rng.randrange(2, args.vocab) for _ in range(rng.randint(*args.prompt))]
        arrivals.append(Arrival(now_s, adapter, prompt, rng.randint(*args.answer)))


def make_files(args: argparse.Namespace, folder: Path) -> None:
    """A random Llama, and as many adapters of each kind, with about as many parameters."""
    import peft
    import torch
    import transformers
    from peft.tuners.lora import BdLoraConfig

    from tests.serve.models import make_tokenizer

    make_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(folder / "model")
    blocks = BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"],
        target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        nblocks=args.tp,
        match_strict=True,
    )
    # BD-LoRA of rank r has r (in + out / P) parameters: the rank that gives as many, rounded.
    bd_rank = max(round(args.rank * 2 / (1 + 1 / args.tp) / args.tp), 1) * args.tp
    for kind, more in {
        "slora": {"r": args.rank},
        "bdlora": {"r": bd_rank, "use_bdlora": blocks if args.tp > 1 else None},
    }.items():
        settings = peft.LoraConfig(
            target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **more
        )
        tuned = peft.get_peft_model(base, settings)
        for i in range(args.adapters):
            tuned.save_pretrained(folder / kind / f"a{i}")
        tuned.unload()


class Server:
    """`bdlora serve` for the length of a ``with`` block."""

    def __init__(self, args: argparse.Namespace, folder: Path, kind: str) -> None:
        layout = "slora" if kind == "slora" else "bdlora"
        adapters = [] if kind == "base" else ["--adapters", str(folder / kind)]
        self._log = folder / f"{kind}.log"
        command = [sys.executable, "-m", "bdlora_megatron", "serve"]
        command += [
            "--model",
            str(folder / "model"),
            "--tp",
            str(args.tp),
            "--port",
            "0",
            *adapters,
        ]
        command += ["--cpu"] if args.cpu else []
        command += ["--set", f"layout={layout}", "max_length=1024", "max_queue=100000"]
        command += ["block_tokens=16" if args.cpu else "block_tokens=256"]
        command += [f"num_slots={args.slots}", f"max_rank={2 * args.rank}", *args.more]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stderr=log, start_new_session=True)

    async def url(self) -> str:
        """Its address, once it answers."""
        import httpx2 as httpx

        async with httpx.AsyncClient() as client:
            for _ in range(3000):
                found = _LISTENING.search(self._log.read_bytes())
                if self._process.poll() is not None:
                    break
                if found:
                    answer = await client.get(f"{found[1].decode()}/ready")
                    if answer.status_code == 200:
                        return found[1].decode()
                await asyncio.sleep(0.1)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-2000:]}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Result:
    """What one request met."""

    first_s: float
    total_s: float
    tokens: int


async def measure(args: argparse.Namespace, folder: Path, kind: str) -> dict[str, Any]:
    """Run the load on one server."""
    import httpx2 as httpx

    arrivals = load(args)
    with Server(args, folder, kind) as server:
        url = await server.url()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            for arrival in arrivals[:4]:
                await one(client, kind, arrival)
            start_s = time.monotonic()

            async def later(arrival: Arrival) -> Result:
                await asyncio.sleep(max(start_s + arrival.at_s - time.monotonic(), 0))
                return await one(client, kind, arrival)

            results = await asyncio.gather(*map(later, arrivals))
            took_s = time.monotonic() - start_s
            metrics = (await client.get("/metrics")).text
    firsts = sorted(result.first_s for result in results)
    return {
        "requests": len(results),
        "requests_per_s": len(results) / took_s,
        "tokens_per_s": sum(result.tokens for result in results) / took_s,
        "first_token_p50_s": statistics.median(firsts),
        "first_token_p99_s": firsts[min(int(len(firsts) * 0.99), len(firsts) - 1)],
        "satisfied": sum(first < _SATISFIED_S for first in firsts) / len(firsts),
        "slot_loads": float(re.findall(r"^bdlora_slot_loads_total (\S+)", metrics, re.M)[0]),
    }


async def one(client: Any, kind: str, arrival: Arrival) -> Result:
    """One streamed request."""
    body = {
        "model": "model" if kind == "base" else f"a{arrival.adapter}",
        "prompt": arrival.prompt,
        "max_tokens": arrival.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 0,
    }
    begun_s, first_s, tokens = time.monotonic(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {await answer.aread()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.monotonic() - begun_s
                (choice,) = json.loads(line[6:])["choices"]
                tokens += len(choice["logprobs"]["tokens"])
    assert tokens == arrival.max_tokens
    return Result(first_s, time.monotonic() - begun_s, tokens)


def report(args: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> str:
    """A table: the median of the rounds, and their least and largest."""
    rows = ["| | base only | BD-LoRA | S-LoRA layout |", "|---|---|---|---|"]
    for name in rounds["base"][0]:
        cells = []
        for kind in ("base", "bdlora", "slora"):
            values = [result[name] for result in rounds[kind]]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.3g}{spread}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    facts = {key: value for key, value in vars(args).items() if key not in {"out"}}
    where = "the CPU, gloo" if args.cpu else "CUDA, NCCL"
    return "\n".join([f"{platform.machine()}, {where}; {facts}", "", *rows])


async def run(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All servers, in turn."""
    rounds: dict[str, list[dict[str, Any]]] = {"base": [], "bdlora": [], "slora": []}
    with tempfile.TemporaryDirectory() as name:
        make_files(args, Path(name))
        for _ in range(args.rounds):
            for kind, results in rounds.items():
                results.append(await measure(args, Path(name), kind))
                print(kind, json.dumps(results[-1]), file=sys.stderr, flush=True)
    return rounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=258)
    parser.add_argument("--rank", type=int, default=16, help="of the vanilla adapters")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompt", type=int, nargs=2, default=(8, 64))
    parser.add_argument("--answer", type=int, nargs=2, default=(8, 32))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    print(report(args := parser.parse_args(), asyncio.run(run(args))))


if __name__ == "__main__":
    main()
