"""Clients that are too slow, and disks that are full: the rest is served as before."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import psutil
import pytest

from tests.harness import free_port
from tests.serve import models
from tests.serve.conftest import SIZES
from tests.serve.servers import RunningServer

LIMIT_S = 2.0
SHORT = {"model": "blocks", "prompt": "hello", "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def patient(folder, tmp_path_factory):
    """A server whose patience with clients is short."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    with RunningServer(
        folder, log, "--tp", "1", "--adapters", *names, "--set", *SIZES,
        f"client_timeout_s={LIMIT_S}", f"adapter_dirs=[{folder / 'adapters'}]",
    ) as running:  # fmt: skip
        yield running


def ask(server, **more):
    return httpx.post(f"{server.url}/v1/completions", json={**SHORT, **more}, timeout=60)


def connect(server):
    plug = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plug


def trickle(plug, data):
    """Send byte by byte until the server has had enough; everything that it answered."""
    plug.settimeout(0.05)
    heard = b""
    for i in range(600):
        try:
            with contextlib.suppress(TimeoutError):
                piece = plug.recv(4096)
                heard += piece
                if not piece:
                    break
            plug.send(data[i % len(data) :][:1])
        except (BrokenPipeError, ConnectionResetError):
            break
    else:
        raise AssertionError("the server took what trickled in for half a minute")
    return heard


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("begin", "then"),
    [(b"", b"GET /v1/models HTTP/1.1\r\nx: " + b"y" * 999), (HEAD, b"x-more: 1\r\n"),
     (HEAD + b"content-length: 100000\r\n\r\n", b" "),
     (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 999)],
    ids=["first line", "headers", "body", "second request"],
)  # fmt: skip
def test_a_request_that_trickles_in_is_ended_and_others_are_answered_meanwhile(
    patient, begin, then
):
    with connect(patient) as plug:
        plug.sendall(begin)
        heard = []
        trickling = threading.Thread(target=lambda: heard.append(trickle(plug, then)))
        trickling.start()
        assert ask(patient).status_code == 200
        trickling.join(60)
    (answer,) = heard
    if begin.startswith(b"GET"):
        # An answered request is behind: the connection is closed as an idle one is.
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"ok")
    else:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "not whole" in json.loads(body)["error"]["message"]


def test_connections_without_a_request_are_closed_and_hold_nobody_up(patient):
    plugs = [connect(patient) for _ in range(300)]
    try:
        for plug in plugs[::2]:
            plug.sendall(b"POST /v1/comp")
        assert ask(patient).status_code == 200
        for plug in plugs:
            while plug.recv(4096):
                pass
        api = psutil.Process(patient.process.pid)
        assert api.num_fds() < 100
    finally:
        for plug in plugs:
            plug.close()


def test_a_client_that_does_not_read_is_cut_off_and_frees_what_it_held(patient):
    """Its answers are bounded by the limits of requests while it stalls, and gone afterwards."""
    body = {"model": "model", "prompt": "hello", "n": 40, "max_tokens": 200, "ignore_eos": True}
    body |= {"stream": True, "logprobs": 5}
    text = json.dumps(body).encode()
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plug.connect(("127.0.0.1", patient.port))
    with plug:
        plug.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(text) + text)
        assert plug.recv(12) == b"HTTP/1.1 200"
        # What it has not read counts as waiting, also when the engine is done with it: forty of
        # the forty-eight that there may be.
        assert ask(patient, n=9).status_code == 429
        assert ask(patient).status_code == 200
        until(lambda: ask(patient, n=40).status_code == 200)
        plug.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while plug.recv(65536):
                pass
    assert "does not read" in patient.log.read_text()
    until(lambda: patient.metric("bdlora_used_blocks") == 0)
    # Cut off by the client's own doing: no error of ours.
    assert "unforeseen" not in patient.log.read_text()


def test_a_client_that_reads_slowly_gets_all_of_its_answer(patient):
    """As long as it goes on reading; others run at their own speed beside it."""
    body = {**SHORT, "n": 8, "max_tokens": 150, "ignore_eos": True, "logprobs": 5, "stream": True}
    text = json.dumps(body).encode()
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plug.connect(("127.0.0.1", patient.port))
    heard = bytearray()
    with plug:
        plug.settimeout(30)
        plug.sendall(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        begun_s = time.monotonic()
        while piece := plug.recv(16384):
            heard += piece
            # Longer in all than a client may stall, and never as long at once.
            if time.monotonic() - begun_s < 2 * LIMIT_S:
                time.sleep(0.02)
                if len(heard) % 7 == 0:
                    assert ask(patient).status_code == 200
    assert heard.count(b'"finish_reason":"length"') == 8
    assert b"data: [DONE]" in heard


def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_error(patient):
    before = patient.log.read_text()
    with connect(patient) as plug:
        plug.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
    assert ask(patient).status_code == 200
    said = patient.log.read_text()[len(before) :]
    assert "unforeseen" not in said
    assert "Traceback" not in said


def test_a_full_disk_changes_nothing(patient, folder):
    """Registering, loading and serving write nothing but the log, and the log may be lost."""
    limits = {process: process.rlimit(psutil.RLIMIT_FSIZE) for process in patient.family()}
    size = patient.log.stat().st_size
    try:
        for process in limits:
            process.rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        body = {"lora_name": "late", "lora_path": str(folder / "adapters" / "vanilla")}
        with httpx.Client(base_url=patient.url, timeout=60) as http:
            http.post("/v1/load_lora_adapter", json=body).raise_for_status()
            for name in ("model", *models.ADAPTERS, "late"):
                assert ask(patient, model=name).status_code == 200
            gone = {"lora_name": "late"}
            http.post("/v1/unload_lora_adapter", json=gone).raise_for_status()
        assert patient.log.stat().st_size == size, "the limit does not hold; this shows nothing"
    finally:
        for process, limit in limits.items():
            process.rlimit(psutil.RLIMIT_FSIZE, limit)
    assert ask(patient).status_code == 200
    assert patient.log.stat().st_size > size


def test_a_log_that_cannot_be_written_stops_nothing(folder):
    command = [sys.executable, "-m", "bdlora_megatron", "serve", "--model", str(folder / "model")]
    port = free_port()
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [*command, "--cpu", "--port", str(port), "--set", *SIZES],
            stderr=full,
            stdout=full,
            start_new_session=True,
            # With it nothing is held back that a later flush could fail on.
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def answers():
            assert process.poll() is None, process.returncode
            with contextlib.suppress(httpx.TransportError):
                body = {**SHORT, "model": "model"}
                return httpx.post(f"{url}/v1/completions", json=body).status_code == 200
            return False

        until(answers)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_answers_that_cannot_be_written_are_told_and_never_half_there(folder, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = json.dumps({"prompt": "hello", "max_tokens": 50, "ignore_eos": True, "logprobs": 5})
    source.write_text(f"{line}\n" * 30)
    command = [sys.executable, "-m", "bdlora_megatron", "generate", str(source), str(target)]

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*command, "--model", str(folder / "model"), "--cpu", "--set", *SIZES],
        preexec_fn=small_disk,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out.jsonl.partial" in done.stderr
    assert not target.exists()


def until(holds):
    for _ in range(200):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it did not become true in 20 s")
