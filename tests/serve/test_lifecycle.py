"""How a server ends: after a drain, with a rank, with its API server. Nothing is left behind."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import signal

import httpx2 as httpx
import psutil
import pytest

from bdlora_megatron.cli.main import main
from bdlora_megatron.serve.engine.rank import ORPHANED
from bdlora_megatron.serve.ranks import enter_rank
from bdlora_megatron.serve.settings import ServeSettings
from tests.serve import models
from tests.serve.conftest import SIZES
from tests.serve.servers import RunningServer
from tests.serve.soak import ask, load, text, unload

pytestmark = pytest.mark.engine

LONG = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def start(folder, log, *more, tp="2", **options):
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    return RunningServer(
        folder, log, "--tp", tp, "--adapters", *names, "--set", *SIZES, *more, **options
    )


def stream(server, model):
    """Everything a stream says, until it ends or is cut off."""
    with (
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST", f"{server.url}/v1/completions", json={**LONG, "model": model, "stream": True}
        ) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        yield next(lines)
        yield from (line for line in lines if line)


def test_sigterm_lets_requests_finish_and_takes_no_new_ones(folder, tmp_path):
    with start(folder, tmp_path / "log") as server:
        lines = stream(server, "blocks")
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(100):
            if server.get("/ready")[1] == b"draining":
                break
        else:
            raise AssertionError("the server did not say that it drains")
        refused = httpx.post(f"{server.url}/v1/completions", json={**LONG, "model": "model"})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        *chunks, last = lines
        assert last == "data: [DONE]"
        assert json.loads(chunks[-1][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0
        assert server.wait_gone(5) == []
        log = server.log.read_text()
        assert "hello" not in log, "prompts are not logged unless that is asked for"
        records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        done = [r for r in records if r["message"] == "request"]
        assert [(r["model"], r["status"]) for r in done] == [("blocks", "ok")]
        assert done[0]["generated_tokens"] == 200


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_dies_takes_the_server_down_within_seconds(folder, tmp_path, which):
    """A stream and a request that waits for its whole answer are both told; nothing hangs."""
    with start(folder, tmp_path / "log") as server:
        ranks = server.ranks()
        assert len(ranks) == 2, [p.cmdline() for p in ranks]
        _kill_while_it_answers(server, ranks[which], wait_s=20)
        assert server.wait_gone(5) == []


def test_ranks_start_again_if_that_is_asked_for_and_none_survives_its_front(folder, tmp_path):
    with start(folder, tmp_path / "log", "restarts=1", tp="1") as server:
        body = {"model": "blocks", "prompt": "hello", "max_tokens": 5, "temperature": 0}
        before = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        (rank,) = server.ranks()
        rank.kill()
        rank.wait(10)
        for _ in range(600):
            if not server.is_ready():
                break
        server.wait_ready(60)
        after = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert after.json()["choices"] == before.json()["choices"]
        assert server.ranks()
        server.process.kill()
        server.process.wait()
        assert server.wait_gone(10) == []


def test_two_ranks_start_again_as_they_were_until_restarts_are_spent(folder, tmp_path):
    """Each time a rank is killed while it answers; its generation leaves no process behind."""
    allowed = f"adapter_dirs=[{folder / 'adapters'}]"
    with start(folder, tmp_path / "log", "restarts=1", allowed) as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            load(http, "late", folder / "adapters" / "blocks").raise_for_status()
            assert unload(http, "attention").status_code == 200
            names = ("model", "vanilla", "blocks", "late")
            before = {name: text(ask(http, name)) for name in names}
            assert len(set(before.values())) == 3
            for which, spent in ((1, False), (0, True)):
                ranks = server.ranks()
                assert len(ranks) == 2
                _kill_while_it_answers(server, ranks[which], wait_s=20 if spent else 0)
                gone, left = psutil.wait_procs(ranks, timeout=20)
                assert left == []
                assert {rank.pid for rank in gone} == {rank.pid for rank in ranks}
                if not spent:
                    server.wait_ready(120)
                    assert {name: text(ask(http, name)) for name in names} == before
                    assert ask(http, "attention").status_code == 404
                    assert server.metric("bdlora_running") == server.metric("bdlora_queued") == 0
        assert server.process.wait(20) == 1
        assert server.wait_gone(10) == []


def _kill_while_it_answers(server, rank, *, wait_s):
    """A stream and a request for a whole answer are both told."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lines = stream(server, "blocks")
        next(lines)
        body = {**LONG, "model": "vanilla"}
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        while server.metric("bdlora_running") < 2:
            pass
        rank.kill()
        rest = pool.submit(list, lines).result(20)
        assert '"error"' in rest[-1]
        assert whole.result(20).status_code == 503
        assert "engine has ended" in whole.result().json()["error"]["message"]
        if wait_s:
            assert server.process.wait(wait_s) == 1


def test_a_rank_whose_front_is_killed_while_it_starts_waits_for_no_other(folder, tmp_path):
    """The second rank never comes: its API server died before it was started."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    settings = ServeSettings(
        model=str(folder / "model"), tensor_parallel_size=2, cpu=True, rank_timeout_s=60
    )
    store = tmp_path / "meeting" / "store"
    store.parent.mkdir()
    rank = context.Process(target=enter_rank, args=(0, settings, str(store), theirs))
    rank.start()
    theirs.close()
    try:
        rank.join(3)
        assert rank.is_alive()
        ours.close()
        rank.join(20)
        assert rank.exitcode == ORPHANED
        assert not store.parent.exists(), "nobody else is there to remove it"
    finally:
        rank.kill()
        rank.join()


def test_torchrun_starts_the_ranks_too(folder, tmp_path, server):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    body = {"model": "blocks", "prompt": "hello", "max_tokens": 9, "temperature": 0}
    expected = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    with start(folder, tmp_path / "log", tp="1", launcher=launcher) as other:
        answer = httpx.post(f"{other.url}/v1/completions", json=body, timeout=60).json()
        assert answer["choices"] == expected["choices"]
        other.process.send_signal(signal.SIGTERM)
        other.process.wait(60)
        assert other.wait_gone(10) == []
        assert '"message": "ended", "status": 0' in other.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "max_lora=3"], "did you mean max_loras"),
        (["--set", "tensor_parallel_size=0"], "tensor_parallel_size is 0; wanted at least 1"),
        (["--adapters", "here=/nowhere"], "/nowhere"),
        (["--model", "/nowhere"], "config.json"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_told_before_anything_starts(folder, arguments, says, capsys):
    before = psutil.Process().children(recursive=True)
    assert main(["serve", "--model", str(folder / "model"), *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert psutil.Process().children(recursive=True) == before
