"""Load on a server with many adapters: base only, BD-LoRA, half-sharded, and the S-LoRA layout.

Arrivals and popularity are those of S-LoRA's benchmark (arXiv 2311.03285, section 7.1): intervals
between requests follow a Gamma distribution of rate R and coefficient of variation cv, adapter i is
asked for with probability proportional to i ** -alpha, and lengths are uniform. Satisfaction is the
share of requests whose first token comes within a limit: six seconds there, and one beside it here,
because these runs last seconds.

A layout's servers run at the same time, idle but for the one that is under load, so that each load
visits all of them in turn before the next one, in `--rounds` rounds under other arrivals. As in the
paper, BD-LoRA has twice the rank of the layouts it is compared with.

With `--bytes`, each layout has the same device memory for adapters instead of as many slots, and
BD-LoRA has the rank with as many parameters.

    python -m benchmarks.serving
    python -m benchmarks.serving --bytes 4e6 --latencies 0 --out benchmarks/results/serving-bytes

Writes benchmarks/results/serving.{md,json,png}, or what `--out` names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.files import bd_rank
from benchmarks.serving_report import KINDS, write_report

_LISTENING = re.compile(rb"listening on (http://\S+)")
OUT = Path(__file__).parent / "results" / "serving"


@dataclass(frozen=True)
class Arrival:
    """A request of the load."""

    at_s: float
    adapter: int
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Result:
    """What one request met; times in seconds."""

    first_s: float
    total_s: float
    tokens: int


def load(args: argparse.Namespace, rate: float, seed: int) -> list[Arrival]:
    """The same requests for every server."""
    rng = random.Random(seed)
    weights = [(i + 1) ** -args.alpha for i in range(args.adapters)]
    arrivals, now_s = [], 0.0
    shape, scale = 1 / args.cv**2, args.cv**2 / rate
    while True:
        now_s += rng.gammavariate(shape, scale)
        if now_s > args.seconds:
            return arrivals
        adapter = rng.choices(range(args.adapters), weights)[0]
        prompt = [rng.randrange(2, args.vocab) for _ in range(rng.randint(*args.prompt))]
        arrivals.append(Arrival(now_s, adapter, prompt, rng.randint(*args.answer)))


def make_files(args: argparse.Namespace, folder: Path) -> None:
    """A random Llama, vanilla adapters, and as many BD-LoRA adapters of twice the rank."""
    import peft
    import torch
    import transformers

    from examples.demo.train import block_diagonal
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
    args.bdlora_rank = 2 * args.rank
    if args.bytes is not None:
        args.bdlora_rank = bd_rank(folder / "model", args.rank, args.tp)
    more = {
        "vanilla": {"r": args.rank},
        "blocks": {"r": args.bdlora_rank, "use_bdlora": block_diagonal(args.tp)},
    }
    for kind, settings in more.items():
        lora = peft.LoraConfig(
            target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **settings
        )
        tuned = peft.get_peft_model(base, lora)
        for i in range(args.adapters):
            tuned.save_pretrained(folder / kind / f"a{i}")
        tuned.unload()


class Server:
    """A server for the length of a ``with`` block."""

    def __init__(
        self, args: argparse.Namespace, folder: Path, kind: str, latency_s: float, *more: str
    ) -> None:
        self._log = folder / f"{'-'.join((kind, str(latency_s), *more))}.log"
        self.url = ""
        layout = "bdlora" if kind == "base" else kind
        adapters = folder / ("blocks" if kind == "bdlora" else "vanilla")
        command = [sys.executable, "-m", "benchmarks.slow_server", str(latency_s)]
        command += ["--model", str(folder / "model"), "--tp", str(args.tp), "--port", "0"]
        command += [] if kind == "base" else ["--adapters", str(adapters)]
        command += ["--cpu"] if args.cpu else []
        command += ["--set", f"layout={layout}", "max_model_len=1024", "max_queue=100000"]
        command += ["block_size=16" if args.cpu else "block_size=256"]
        # Rows that each rank holds of an adapter.
        rows = args.bdlora_rank // args.tp if layout == "bdlora" else args.rank
        command += [f"max_lora_rank={rows}", f"max_loras={args.slots}"]
        command += [] if args.bytes is None else [f"lora_memory_bytes={args.bytes:.0f}"]
        command += [*args.more, *more]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stderr=log, start_new_session=True)

    async def wait_ready(self) -> None:
        """Wait until it answers."""
        import httpx2 as httpx

        async with httpx.AsyncClient() as client:
            for _ in range(3000):
                found = _LISTENING.search(self._log.read_bytes())
                if self._process.poll() is not None:
                    break
                if found:
                    self.url = found[1].decode()
                    if (await client.get(f"{self.url}/ready")).status_code == 200:
                        return
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


async def measure(server: Server, kind: str, arrivals: list[Arrival]) -> dict[str, Any]:
    """Run a load on one server."""
    import httpx2 as httpx

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        before = await counters(client)
        begun_s = time.monotonic()

        async def later(arrival: Arrival) -> Result:
            await asyncio.sleep(max(begun_s + arrival.at_s - time.monotonic(), 0))
            return await one(client, kind, arrival)

        results = await asyncio.gather(*map(later, arrivals))
        took_s = time.monotonic() - begun_s
        after = await counters(client)
    return {
        "took_s": took_s,
        "resident": after.pop("resident"),
        **{name: after[name] - before[name] for name in after},
        "requests": [asdict(result) for result in results],
    }


async def counters(client: Any) -> dict[str, int]:
    """Adapters that were copied into slots and are there, and tokens looked up and found."""
    metrics = (await client.get("/metrics")).text
    found = re.findall(r"^bdlora_(slot_loads|prefix_cache_\w+)_total (\S+)", metrics, re.M)
    resident = re.findall(r'^bdlora_adapters\{place="slot"\} (\S+)', metrics, re.M)
    found += [("resident", value) for value in resident]
    return {name: int(float(value)) for name, value in found}


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
    if tokens != arrival.max_tokens:
        raise RuntimeError(f"{tokens} tokens came of {arrival.max_tokens}")
    return Result(first_s, time.monotonic() - begun_s, tokens)


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All loads on all servers, in turn."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        make_files(args, Path(name))
        for latency_s in args.latencies:
            with ExitStack() as stack:
                servers = {}
                for kind in KINDS:
                    server = stack.enter_context(Server(args, Path(name), kind, latency_s))
                    await server.wait_ready()
                    await measure(server, kind, load(args, max(args.rates), -1)[:8])
                    servers[kind] = server
                for round_ in range(args.rounds):
                    for rate in args.rates:
                        arrivals = load(args, rate, round_)
                        order = random.Random(f"{round_} {rate}").sample(KINDS, len(KINDS))
                        for kind in order:
                            result = await measure(servers[kind], kind, arrivals)
                            found.append(
                                {"kind": kind, "rate": rate, "latency_s": latency_s, **result}
                            )
                            print(
                                kind, rate, latency_s, round_, f"{result['took_s']:.1f} s",
                                file=sys.stderr, flush=True,
                            )  # fmt: skip
    return found


def load_parser(description: str) -> argparse.ArgumentParser:
    """What a load is made of, for the command lines of all benchmarks that run one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cuda", action="store_false", dest="cpu", help="on GPUs, with NCCL")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=258)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--bytes", type=float, help="for adapters, on each rank, instead of slots")
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="of arrivals in one load")
    parser.add_argument("--prompt", type=int, nargs=2, default=[8, 64])
    parser.add_argument("--answer", type=int, nargs=2, default=[8, 32])
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    return parser


def main() -> None:
    """Measure and write the report."""
    assert __doc__ is not None
    parser = load_parser(__doc__.partition("\n")[0])
    parser.add_argument("--rates", type=float, nargs="*", default=[8.0, 24.0, 48.0])
    parser.add_argument("--latencies", type=float, nargs="*", default=[0.0, 1e-3], metavar="S")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT, metavar="STEM", help="of the report")
    args = parser.parse_args()
    if args.bytes is not None:
        args.slots = args.adapters
    begun_s = time.monotonic()
    found = asyncio.run(run(args))
    write_report(args.out, args, found, time.monotonic() - begun_s)


if __name__ == "__main__":
    main()
