"""The table of releases counts what pytest reports, and says why something fails."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

from tests.compat.__main__ import _report, main
from tests.compat.environment import Result, _count, _interpreter, load_results
from tests.compat.releases import RELEASES

REPORT = """
<testsuites><testsuite>
  <testcase classname="tests.a" name="test_fine"/>
  <testcase classname="tests.a" name="test_other"><skipped message="no"/></testcase>
  <testcase classname="tests.a" name="test_bad[1]"><failure message="short">
E   tests.harness.RankError: rank 1 raised:
E   TypeError: got an unexpected keyword argument 'tp_group'
  </failure></testcase>
  <testcase classname="tests.a" name="test_bad[2]"><error message="boom"/></testcase>
</testsuite></testsuites>
"""


def _result():
    result = Result(version="0.19.2", date="2026-01-01", commit="abc")
    for case in ElementTree.fromstring(REPORT).iter("testcase"):
        _count(case, result)
    return result


def test_counts_and_reasons():
    result = _result()
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failures == {
        "tests.a::test_bad[1]": "TypeError: got an unexpected keyword argument 'tp_group'",
        "tests.a::test_bad[2]": "boom",
    }


def test_an_older_python_is_named():
    (release,) = [r for r in RELEASES if r.version == "0.19.2"]
    for python, named in (("3.11.7", True), ("3.12.1", False)):
        result = _result()
        result.versions = {"python": python}
        page = "\n".join(_report([(release, result)]))
        assert ("installed with --ignore-requires-python" in page) is named


def test_an_interpreter_that_does_not_start_is_passed_over(tmp_path, monkeypatch):
    major, minor = sys.version_info[:2]
    shim = tmp_path / f"python{major}.{minor + 1}"
    monkeypatch.setenv("PATH", str(tmp_path))
    for status, found in ((127, None), (0, str(shim))):
        shim.write_text(f"#!/bin/sh\nexit {status}\n", "utf-8")
        shim.chmod(0o755)
        assert _interpreter((major, minor + 1)) == found
    assert _interpreter((major, minor)) == sys.executable


def test_one_row_is_brought_up_to_date_and_the_others_stay(tmp_path, monkeypatch):
    old, new = RELEASES[0].version, RELEASES[1].version
    out = tmp_path / "table"
    for version, passed in ((old, 3), (new, 4), (old, 5)):
        result = Result(version=version, date="", commit="", passed=passed)
        monkeypatch.setattr("tests.compat.__main__.try_release", lambda *_, r=result: r)
        monkeypatch.setattr("sys.argv", ["", "--only", version, "--out", str(out)])
        assert main() == 0
    kept = load_results(out.with_suffix(".json"))
    assert {version: result.passed for version, result in kept.items()} == {old: 5, new: 4}
    page = out.with_suffix(".md").read_text("utf-8")
    assert [f"| {version} |" in page for version in (old, new)] == [True, True]


def test_the_table_says_what_fails():
    (release,) = [r for r in RELEASES if r.version == "0.19.2"]
    page = "\n".join(_report([(release, _result())]))
    assert "| 0.19.2 |  |  |  | 1 | 2 | 1 | abc, 2026-01-01 |" in page
    assert "- 1 x `boom`, such as `tests.a::test_bad[2]`" in page
    broken = Result(version="0.19.2", date="", commit="", problem="not installed: no wheel")
    assert "not installed: no wheel" in "\n".join(_report([(release, broken)]))
