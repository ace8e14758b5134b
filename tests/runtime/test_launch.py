"""Ranks are spawned where CUDA is present, and forked from a server that never asked for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

import psutil
import pytest
import torch

from bdlora_megatron.bench.plan import BenchPlan
from bdlora_megatron.bench.run import measure
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime import launch
from bdlora_megatron.serve.ranks import Ranks
from bdlora_megatron.serve.settings import ServeSettings
from bdlora_megatron.train.launch import launch as launch_training
from tests.harness import run_ranks
from tests.train.runs import make_files, settings

ROOT = Path(__file__).parents[2]
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
PRELOADS = (
    "bdlora_megatron.serve.preload",
    "bdlora_megatron.train.preload",
    "bdlora_megatron.cli.jobs",
    "tests.preload",
)
#: What may start CUDA's driver, after which a fork can use no GPU.
QUESTIONS = (
    "is_available", "device_count", "get_device_capability", "get_device_name",
    "get_device_properties", "current_device", "init", "_lazy_init",
)  # fmt: skip
_WATCH = """
import importlib, os, sys, torch, warnings
warnings.simplefilter("ignore")
asked = []
def watch(name):
    answer = getattr(torch.cuda, name)
    def ask(*args, **kwargs):
        asked.append(name)
        return answer(*args, **kwargs)
    setattr(torch.cuda, name, ask)
for name in sys.argv[2].split(","):
    watch(name)
importlib.import_module(sys.argv[1])
print("asked", *asked, flush=True)
# A preload may have an exit handler of its own.
os._exit(0)
"""


def _asked_by(module):
    done = subprocess.run(
        [sys.executable, "-c", _WATCH, module, ",".join(QUESTIONS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()[1:]


@pytest.mark.parametrize("module", PRELOADS)
def test_what_a_fork_server_imports_asks_cuda_nothing(module):
    assert _asked_by(module) == []


def test_the_watch_sees_a_question(tmp_path, monkeypatch):
    """As Megatron-Core's checkpoint strategies ask on import, which bars later forks from GPUs."""
    (tmp_path / "asking.py").write_text("import torch\ntorch.cuda.is_available()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert _asked_by("asking") == ["is_available"]


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that torch sees here and nowhere else: a rank of its own is on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_context_follows_cuda(monkeypatch):
    started = []
    monkeypatch.setattr(forkserver, "ensure_running", lambda: started.append("server"))
    assert launch.start_method() == "forkserver"
    assert isinstance(launch.rank_context(), ForkServerContext)
    launch.prepare_ranks(PRELOADS[:1])
    assert started == ["server"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.start_method() == "spawn"
    assert isinstance(launch.rank_context(PRELOADS[:1]), SpawnContext)
    launch.prepare_ranks(PRELOADS[:1])
    assert started == ["server"]


def test_cuda_is_looked_for_without_torch():
    code = (
        "import sys; from bdlora_megatron.runtime import launch; print(launch.cuda_is_present(), "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(torch.cuda.is_available()), "False"], done.stderr


def _began_by(run):
    """How the child processes began that were there while ``run`` ran."""
    ways, over = set(), threading.Event()
    known = {process.pid for process in psutil.Process().children()}

    def look():
        while not over.is_set():
            for child in psutil.Process().children():
                if child.pid not in known:
                    try:
                        line = " ".join(child.cmdline())
                    except psutil.Error:
                        continue
                    ways.update(way for way in ("spawn_main", "forkserver") if way in line)
            time.sleep(0.02)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        run()
    finally:
        over.set()
        looking.join()
    return ways


def _enter(rank, settings, store, link):
    link.send((rank, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available()))
    link.recv()


def test_a_servers_ranks_are_spawned(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    heard = []

    def run():
        ranks = Ranks(ServeSettings(model="m", cpu=True), enter=_enter)
        heard.append(ranks.link.recv())
        assert ranks.stop(timeout_s=20)

    assert _began_by(run) == {"spawn_main"}
    # On a CPU by request: the GPUs are hidden from it, and from nobody else.
    assert heard == [(0, "", False)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_training_ranks_are_spawned(gpus, tmp_path):
    config = settings(make_files(tmp_path), tmp_path / "run", train__train_iters=1)
    steps = []
    assert _began_by(lambda: steps.append(launch_training(config, ranks=1).steps)) == {"spawn_main"}
    assert steps == [1]


def test_a_benchmarks_ranks_are_spawned(gpus):
    plan = BenchPlan(
        layers=1, ranks=(2,), decode=((1, 4),), mixed=(), prefill=(), train=(), latencies_s=(0.0,),
        repeats=1, warmup=0,
    )  # fmt: skip
    cells = []
    assert _began_by(lambda: cells.extend(measure(plan))) == {"spawn_main"}
    assert len(cells) == len(plan.variants())


def _sum(rank, world_size):
    total = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(total)
    return float(total), torch.cuda.is_available(), os.getppid()


def test_the_tests_ranks_are_spawned(gpus):
    assert run_ranks(2, _sum) == [(3.0, False, os.getpid())] * 2


def _listening(rank, world_size, interface):
    if interface is not None:
        launch.bind_gloo(interface)
    torch.distributed.new_group([0, 1], backend="gloo")
    sockets = psutil.Process().net_connections(kind="inet")
    return os.environ["GLOO_SOCKET_IFNAME"], {
        end.ip for socket in sockets for end in (socket.laddr, socket.raddr) if end
    }


@pytest.mark.parametrize("interface", [None, LOOPBACK])
def test_ranks_of_one_machine_talk_over_loopback(interface):
    for named, addresses in run_ranks(2, _listening, interface):
        assert named == LOOPBACK
        assert addresses
        assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_interface_is_the_users(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launch.bind_gloo(None)
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "several machines: gloo's own choice"
    # What a launcher's environment says, such as a cluster's, is checked too.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{LOOPBACK},eth7")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME: network interface 'eth7' is not on"):
        launch.bind_gloo(None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{LOOPBACK},{LOOPBACK}")
    launch.bind_gloo(None, one_machine=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == f"{LOOPBACK},{LOOPBACK}"
    launch.bind_gloo(LOOPBACK, one_machine=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == LOOPBACK
    with pytest.raises(ConfigError, match=rf"'eth99' is not on this machine; it has .*{LOOPBACK}"):
        launch.bind_gloo("eth99")
    with pytest.raises(ConfigError, match="'eth99'"):
        Ranks(ServeSettings(model="m", cpu=True, interface="eth99"))
    with pytest.raises(ConfigError, match="'eth99'"):
        measure(BenchPlan(), interface="eth99")


def test_more_ranks_than_gpus_are_refused(monkeypatch, tmp_path):
    """As where CUDA_VISIBLE_DEVICES names fewer than the machine has."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks on 1 GPUs"):
        launch.join_ranks(0, 2, str(tmp_path / "store"))
