"""The status page in headless Chromium, by keyboard alone. Its picture: ``tests.serve.picture``."""

from __future__ import annotations

import json
import re
import shutil

import httpx2 as httpx
import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(_CHROMIUM is None, reason="no chromium on the PATH"),
]
#: Of a chart that has a value.
_LINE = re.compile(r"[ML][\d. ]+")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(server.url)
    yield page
    page.close()
    # The console also tells of every answer that is no 200, which tests ask for.
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
    assert order == ["key", "SUMMARY", "filter", "model", "prompt", "most", "BUTTON"]
    playwright.expect(page.locator("#answer")).not_to_be_empty()
    playwright.expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    assert "Error" not in page.text_content("#answer")
    after = base(server)
    assert after["requests"] == before["requests"] + 1
    assert 1 <= after["tokens"] - before["tokens"] <= 20
    # A piece of the charts is five seconds.
    playwright.expect(page.locator("#tokens_s .value")).to_have_attribute("d", _LINE, timeout=9000)


def test_a_page_that_is_opened_later_has_the_last_minutes(page, server):
    """Charts with units and a time axis, which a screen reader is told in words."""
    body = {"model": "blocks", "prompt": "hello", "max_tokens": 30, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    for name, unit in (("Tokens per second", "/s"), ("Mean time to first token", " s")):
        told_of = re.compile(
            rf"^{name}, last 10 minutes: last .*, most \d.*{unit}".replace("/", r"\/") + "$"
        )
        chart = page.get_by_role("img", name=told_of)
        chart.wait_for(timeout=9000)
        told = chart.locator("text").all_text_contents()
        assert told[0] == f"0{unit}"
        assert told[-3:] == ["-10 min", "-5 min", "now"]
    told = page.get_by_role("img", name=re.compile("^Prompt tokens")).locator("text")
    assert told.all_text_contents()[:3] == ["0 %", "50 %", "100 %"]


def test_models_are_filtered_and_keep_their_rows(page):
    rows = page.locator("#models tr")
    playwright.expect(rows).to_have_count(4)
    page.fill("#filter", "BLOCKS")
    playwright.expect(rows).to_have_count(1)
    assert rows.first.locator("td").first.text_content() == "blocks"
    rows.first.evaluate("row => row.mark = 1")
    page.fill("#filter", "")
    playwright.expect(rows).to_have_count(4)
    with page.expect_response("**/status.json"):
        pass
    marks = page.get_by_role("table", name="Models").evaluate(
        "table => [...table.tBodies[0].rows].map(row => row.mark ?? 0)"
    )
    assert sum(marks) == 1, "a row that stays is not made anew"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page, scheme):
    """By the contrast that WCAG 2 asks of text, 4.5."""
    page.emulate_media(color_scheme=scheme)
    playwright.expect(page.locator("#models tr")).to_have_count(4)
    colors = page.evaluate(
        """() => ["body", "figcaption", "#now dt", "svg text"].map(place => {
             const style = getComputedStyle(document.querySelector(place));
             return place === "svg text" ? style.fill : style.color;
           }).concat(getComputedStyle(document.body).backgroundColor)"""
    )
    *texts, paper = [_luminance(color) for color in colors]
    assert (paper > 0.5) == (scheme == "light")
    for text in texts:
        low, high = sorted((text, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, colors


def _luminance(color):
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_errors_are_shown(page):
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.fill("#most", "9999")
    page.click("#try button")
    playwright.expect(page.locator("#answer")).to_contain_text("256")
    first = page.locator("#errors tr").first
    playwright.expect(first).to_contain_text("in max_tokens")
    assert "Once upon" not in page.locator("#errors").text_content()


def test_what_clients_send_is_shown_as_text(page, server):
    name = "<img src=x onerror=document.title='taken'>"
    body = {"model": name, "prompt": "hello"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 404
    playwright.expect(page.locator("#errors tr").first).to_contain_text(name)
    assert page.locator("img").count() == 0
    assert page.title() == "bdlora"


def test_a_page_whose_server_has_gone_says_so(page):
    playwright.expect(page.locator("#models tr")).to_have_count(4)
    page.route("**/status.json", lambda route: route.abort())
    playwright.expect(page.locator("body.stale")).to_have_count(1, timeout=9000)
    page.unroute("**/status.json")
    playwright.expect(page.locator("body.stale")).to_have_count(0, timeout=9000)
    assert page.text_content("#state") == "ready"
