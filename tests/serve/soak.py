"""Requests while adapters are overwritten, loaded and unloaded: no answer may be another's."""

from __future__ import annotations

import concurrent.futures
import shutil
import threading
from pathlib import Path
from typing import Any

from tests.serve import models

#: What the name ``swap`` stands for, in turn.
SOURCES = ("vanilla", "attention")
#: Every model is asked the same; they begin alike, over more than one block of the cache.
PROMPTS = tuple(f"Here is one fox, and there are more. {said}" for said in ("Why?", "Where to go?"))


def load(http: Any, name: str, path: Path, **more: Any) -> Any:
    """Give a folder's adapter a name."""
    body = {"lora_name": name, "lora_path": str(path), **more}
    return http.post("/v1/load_lora_adapter", json=body)


def unload(http: Any, name: str) -> Any:
    """Take an adapter away."""
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def ask(http: Any, model: str, prompt: str = "hello", **more: Any) -> Any:
    """One completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
    return http.post("/v1/completions", json=body)


def text(answer: Any) -> str:
    """What it says."""
    said: str = answer.raise_for_status().json()["choices"][0]["text"]
    return said


def soak(http: Any, folder: Path, count: int) -> dict[str, int]:
    """Names are loaded with other weights and unloaded under load; every answer is one of its own.

    The weights of ``swap`` alternate between two adapters, so that a request that began before a
    change and one that began after may answer differently, but never as a third. All prompts begin
    alike, so that whatever a cache of prefixes confuses would be told as an answer; the right ones
    are asked for with a salt of their own, which keeps them out of it.

    Args:
        http: A client of the server, whose adapters are ``models.ADAPTERS``.
        folder: Where ``models.make`` put them.
        count: Requests.

    Returns:
        How many were ``right``, ``wrong``, and ``gone``: refused while their adapter was away. And
        how many ``loads`` and ``unloads`` there were meanwhile.
    """
    swap = folder / "adapters" / "swap"
    names = ("model", *models.ADAPTERS)
    expected = {
        (name, prompt): text(ask(http, name, prompt, cache_salt=f"{name} {prompt}"))
        for name in names
        for prompt in PROMPTS
    }
    assert len(set(expected.values())) == len(expected)
    stop = threading.Event()
    counts = {"right": 0, "wrong": 0, "gone": 0, "loads": 0, "unloads": 0}

    def change() -> None:
        while not stop.is_set():
            shutil.rmtree(swap, ignore_errors=True)
            shutil.copytree(folder / "adapters" / SOURCES[counts["loads"] % 2], swap)
            load(http, "swap", swap, load_inplace=True).raise_for_status()
            counts["loads"] += 1
            if counts["loads"] % 3 == 0:
                assert unload(http, "swap").status_code == 200
                counts["unloads"] += 1

    def request(i: int) -> str:
        name, prompt = ("swap", *names)[i % 5], PROMPTS[i // 5 % len(PROMPTS)]
        answer = ask(http, name, prompt)
        if answer.status_code == 200:
            wanted = SOURCES if name == "swap" else (name,)
            return "right" if text(answer) in {expected[w, prompt] for w in wanted} else "wrong"
        # Unloaded meanwhile, or its files are being replaced at this moment.
        assert name == "swap"
        assert answer.status_code in {404, 500}
        return "gone"

    try:
        with concurrent.futures.ThreadPoolExecutor(17) as pool:
            changing = pool.submit(change)
            try:
                for outcome in pool.map(request, range(count)):
                    counts[outcome] += 1
            finally:
                stop.set()
            changing.result(60)
    finally:
        shutil.rmtree(swap, ignore_errors=True)
        unload(http, "swap")
    return counts
