"""The status page in headless Chromium, by keyboard alone.

BDLORA_SCREENSHOT=docs/status.png puts a picture of it there.
"""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the PATH"),
]


@pytest.fixture
def page(server):
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(server.url)
        yield page
        browser.close()
    # The console also tells of every answer that is no 200, the icon's and those a test asks for.
    assert [error for error in errors if "Failed to load resource" not in error] == []


def base(server):
    """The base model's counts."""
    return json.loads(server.get("/status.json")[1])["models"][0]


def test_a_prompt_is_sent_by_keyboard_and_its_answer_streams(page, server):
    playwright.expect(page.locator("#model option")).to_have_count(4)
    assert page.text_content("#state") == "ready"
    before = base(server)
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if order[-1] == "prompt":
            page.keyboard.press("Control+A")
            page.keyboard.type("hello")
        if order[-1] == "most":
            page.keyboard.press("Control+A")
            page.keyboard.type("20")
        if order[-1] == "BUTTON":
            page.keyboard.press("Enter")
            break
    assert order == ["model", "prompt", "most", "key", "BUTTON"]
    playwright.expect(page.locator("#answer")).not_to_be_empty()
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    assert "Error" not in page.text_content("#answer")
    after = base(server)
    assert after["requests"] == before["requests"] + 1
    assert 1 <= after["tokens"] - before["tokens"] <= 20
    # The plots get their second point with the second refresh.
    playwright.expect(page.locator("#rate")).to_have_attribute("points", re.compile(r"\d"))
    target = os.environ.get("BDLORA_SCREENSHOT")
    if target:
        page.wait_for_timeout(6000)
        page.screenshot(path=target, full_page=True)


def test_errors_are_shown(page):
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.fill("#most", "9999")
    page.click("#try button")
    playwright.expect(page.locator("#answer")).to_contain_text("256")
