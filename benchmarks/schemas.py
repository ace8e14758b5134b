"""Answers to random JSON schemas at TP=2, base and adapters mixed; exits with 1 if one is wrong.

    python -m benchmarks.schemas

Writes benchmarks/results/schemas.json. The suite runs a hundred, on the sampler alone
(tests/unit/serve/test_masks.py).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema_rs
from transformers import AutoTokenizer

from bdlora_megatron.bench.report import machine
from tests.serve import models, servers
from tests.serve.conftest import SIZES
from tests.unit.serve.test_masks import DEFS, make_schema

OUT = Path(__file__).parent / "results" / "schemas.json"
MODELS = ("model", *models.ADAPTERS)
#: Room for an answer; the schemas bound what it can be.
MOST_TOKENS = 900


def main() -> int:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    sizes = [*SIZES, "max_model_len=1024", "kv_cache_memory_bytes=30000000"]
    with tempfile.TemporaryDirectory() as name:
        folder = models.make(Path(name))
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        spaces = {str(tokenizer.encode(text)[0]): -100.0 for text in " \n\r\t"}
        adapters = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
        with servers.RunningServer(
            folder, folder / "server.log", "--tp", str(args.tp), "--adapters", *adapters,
            "--set", *sizes,
        ) as server, httpx.Client(base_url=server.url, timeout=300) as http:  # fmt: skip
            begun_s = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(lambda seed: _ask(http, seed, spaces), range(args.schemas)))
            seconds = time.monotonic() - begun_s
            status = server.stop()
    wrong = [answer for answer in answers if answer["fault"]]
    found = {
        "command": shlex.join(["python", "-m", "benchmarks.schemas", *sys.argv[1:]]),
        "machine": machine(),
        "tp": args.tp,
        "schemas": args.schemas,
        "valid": args.schemas - len(wrong),
        "models": dict(Counter(answer["model"] for answer in answers)),
        "kinds": dict(Counter(kind for answer in answers for kind in answer["kinds"])),
        "tokens": sum(answer["tokens"] for answer in answers),
        "seconds": round(seconds, 1),
        "exit_status": status,
        "wrong": wrong,
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))
    return 1 if wrong or status else 0


def _ask(http: httpx.Client, seed: int, spaces: dict[str, float]) -> dict[str, Any]:
    """One answer, and what is wrong with it.

    A model that knows nothing may write spaces until it is cut, so they are unlikely.
    """
    rng = random.Random(seed)
    # Not one of them trivial.
    properties = {name: make_schema(rng, 4) for name in "abcdef"[: rng.randint(2, 6)]}
    schema = {
        "type": "object",
        "properties": properties,
        "required": sorted(rng.sample(sorted(properties), 2)),
        "additionalProperties": False,
        "$defs": DEFS,
    }
    asked: dict[str, Any] = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
    if seed % 2:
        asked = {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            },
            "logit_bias": spaces,
        }
    model = MODELS[seed // 2 % len(MODELS)]
    body = {"model": model, "prompt": "hello", "seed": seed, "max_tokens": MOST_TOKENS, **asked}
    reply = http.post("/v1/completions", json=body)
    if reply.status_code != 200:
        return {"model": model, "kinds": [], "tokens": 0, "schema": schema, "fault": reply.text}
    answer = reply.json()
    (choice,) = answer["choices"]
    about = {"model": model, "tokens": answer["usage"]["completion_tokens"]}
    try:
        value = json.loads(choice["text"])
    except ValueError as error:
        return {**about, "kinds": [], "schema": schema, "fault": f"{error}: {choice['text']}"}
    valid = jsonschema_rs.validator_for(schema).is_valid(value)
    if valid and choice["finish_reason"] == "stop":
        return {**about, "kinds": list(_kinds(value)), "fault": ""}
    return {**about, "kinds": [], "schema": schema, "fault": json.dumps(choice)}


def _kinds(value: Any) -> Iterator[str]:
    """The types of a value and of all that it holds."""
    yield type(value).__name__
    inside = value.values() if isinstance(value, dict) else value
    for part in inside if isinstance(value, (dict, list)) else ():
        yield from _kinds(part)


if __name__ == "__main__":
    sys.exit(main())
