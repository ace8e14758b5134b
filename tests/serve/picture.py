"""A picture of a running server's status page, under some load.

``python -m tests.serve.picture http://127.0.0.1:8000 docs/status.png`` asks every model in turn,
from several clients, for four minutes.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import shutil
import sys
import time

import httpx2 as httpx
from playwright.sync_api import sync_playwright

_LOAD_S = 240.0
_SYSTEM = (
    "You are a careful clerk who answers in the words of an old play, briefly and to the point. "
)


def main(url: str, target: str) -> None:
    names = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
    until_s = time.monotonic() + _LOAD_S
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(_ask, url, names, until_s, number) for number in range(4)]
        body = {"model": "a-model-that-is-not-there", "prompt": "Good morrow"}
        httpx.post(f"{url}/v1/completions", json=body)
        time.sleep(_LOAD_S - 10)
        _picture(url, target)
        for client in clients:
            client.result()


def _ask(url: str, names: list[str], until_s: float, number: int) -> None:
    """Ask one model after another, in waves."""
    with httpx.Client(base_url=url, timeout=120) as http:
        for turn in itertools.count(number):
            if time.monotonic() > until_s:
                return
            body = {
                "model": names[turn % len(names)],
                "prompt": _SYSTEM * 8 + f"Question {turn}: what is love?",
                "max_tokens": 24 + 8 * (turn % 5),
            }
            http.post("/v1/completions", json=body).raise_for_status()
            time.sleep(2 * (turn % 3))


def _picture(url: str, target: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.goto(url)
        page.fill("#prompt", "What is love?")
        page.locator("#prompt").blur()
        page.wait_for_timeout(4000)
        page.screenshot(path=target, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
