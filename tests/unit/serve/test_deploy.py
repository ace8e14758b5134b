"""What examples/deploy says of a server is true of this one. Nothing is built or deployed."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from dataclasses import replace
from itertools import combinations
from multiprocessing import Pipe
from pathlib import Path

import httpx2 as httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bdlora_megatron.cli.main import _parser
from bdlora_megatron.serve import server as server_module
from bdlora_megatron.serve.api.app import make_app
from bdlora_megatron.serve.api.state import APIServer
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.messages import Places, Ready, Snapshot, StepReport
from bdlora_megatron.serve.settings import ServeSettings
from tests.docs.commands import declared_extras
from tests.serve.models import make_tokenizer

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "examples" / "deploy"
OBJECTS = [
    each
    for name in ("server.yaml", "router.yaml")
    for each in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
]
#: What Prometheus adds to what it reads.
TARGET_LABELS = {"instance", "job"}


def the(kind, name="bdlora"):
    (found,) = (o for o in OBJECTS if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


POD = the("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
(SYNCER,) = POD["initContainers"]
SETTINGS = ServeSettings.from_dict(
    yaml.safe_load(the("ConfigMap", "bdlora-config")["data"]["serve.yaml"])
)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return APIServer(SETTINGS, Tokenizer(str(folder)))


@pytest.fixture(scope="module")
def exposed(api):
    """All samples' names with their labels, once a bit of everything has happened."""
    metrics = api.metrics
    api.client.snapshot = Snapshot(
        running=2, queued=1, running_adapters={"a": 1}, waiting_adapters={"a": 1}
    )
    api.client.places = Places(slot=("a",))
    metrics.requests.labels("a", "ok").inc()
    for counter in (metrics.prompt_tokens, metrics.generated_tokens, metrics.rejected):
        counter.labels("a").inc()
    for histogram in (metrics.first_token_s, metrics.per_token_s):
        histogram.labels("a").observe(0.1)
    api.faults.add(404, "no", kind="", model=None)
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def requests(api, *paths):
    async def all_of_them():
        transport = httpx.ASGITransport(app=make_app(api))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.get(path)).status_code for path in paths]

    return all_of_them()


# --- the dashboard -----------------------------------------------------------------------------

DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES += [v["definition"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
_SELECTED = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")
_WORDS = {"sum", "max", "rate", "by", "histogram_quantile", "label_values", "__rate_interval"}


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_what_there_is(exposed, query):
    """Names, and the labels that select and group them."""
    bare = r"label_values\((vllm:\w+), "
    metrics = [*_SELECTED.findall(query), *((name, "") for name in re.findall(bare, query))]
    assert metrics, query
    labels = set()
    for name, selectors in metrics:
        assert name in exposed, name
        labels |= exposed[name] | TARGET_LABELS
        selected = set(re.findall(r"(\w+)=~?", selectors))
        assert selected <= exposed[name] | TARGET_LABELS, (name, selected)
    rest = _SELECTED.sub(" ", query)
    for name, _ in metrics:
        rest = rest.replace(name, " ")
    words = set(re.findall(r"[a-zA-Z_]\w*", rest)) - _WORDS
    assert words <= labels, words


def test_every_metric_of_the_engine_that_routers_and_operators_read_is_shown():
    shown = {name for query in QUERIES for name, _ in _SELECTED.findall(query)}
    assert {
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
        "vllm:prefix_cache_hits_total", "bdlora_adapters", "bdlora_slot_evictions_total",
        "bdlora_errors_total", "bdlora_rejected_requests_total", "bdlora_generated_tokens_total",
    } <= shown  # fmt: skip


def test_panels_have_units_ids_and_places_of_their_own():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_variables_of_the_dashboard_are_declared():
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD)))
    assert used == declared


# --- the image ---------------------------------------------------------------------------------


def _instructions():
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, rest.strip()


DOCKERFILE = list(_instructions())


def instructions(name):
    return [rest for each, rest in DOCKERFILE if each == name]


def test_the_image_copies_what_is_there():
    for copied in instructions("COPY"):
        *sources, _ = shlex.split(copied)
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in {
                base.partition(" AS ")[2] for base in instructions("FROM")
            }
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
    project = (ROOT / "pyproject.toml").read_text()
    # The wheel is built from what is copied.
    copied = " ".join(instructions("COPY"))
    for named in re.findall(r'^(?:readme = |license-files = \[)"([^"]+)"', project, re.MULTILINE):
        assert named in copied


def test_the_image_is_pinned_and_installs_what_is_tested():
    import torch

    bases = [base.split()[0] for base in instructions("FROM")]
    tags = [base.rpartition(":")[2] for base in bases]
    assert all(re.match(r"\d+\.\d+\.\d+-\w+-ubuntu24\.04$", tag) for tag in tags), bases
    release = {tag.rpartition(".")[0].partition("-")[0].rsplit(".", 1)[0] for tag in tags}
    assert len(release) == 1, "the ranks' CUDA and nvcc's are one"
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints-dev.txt").read_text(), re.MULTILINE)
    if torch.version.cuda is not None and torch.__version__.startswith(pinned[1]):
        assert release == {torch.version.cuda}
    installs = [run for run in instructions("RUN") if "pip install" in run]
    assert all("-c constraints-dev.txt" in run for run in installs)
    extras = dict(arg.partition("=")[::2] for arg in instructions("ARG"))["EXTRAS"]
    assert {"serve"} <= set(extras.split(",")) <= declared_extras()
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert CONTAINER["image"] == f"bdlora:{version[1]}"
    (pin,) = re.findall(r"flash-attn==([\d.]+)", " ".join(installs))
    # As docs/gpu.md asks: from 2.7.3 on, below 3.
    assert (2, 7, 3) <= tuple(int(part) for part in pin.strip(".").split(".")) < (3,)


def test_the_documents_name_the_versions_that_are_installed():
    """The table in docs/serving-a100.md."""
    page = (ROOT / "docs" / "serving-a100.md").read_text()
    table = dict(re.findall(r"^\| ([\w -]+) \| ([\d.]+(?:post\d+)?)", page, re.MULTILINE))
    pins = (ROOT / "constraints-dev.txt").read_text() + " ".join(instructions("RUN"))
    for part in ("torch", "triton", "megatron-core", "flash-attn"):
        (told,) = (version for name, version in table.items() if name.lower() == part)
        assert re.search(rf"(?m)\b{part}=={re.escape(told.strip('.'))}(?=[;\s]|$)", pins), part
    (base, *_) = instructions("FROM")
    assert base.startswith(f"nvidia/cuda:{table['CUDA']}.")


def test_the_image_runs_the_server_and_not_as_root(api):
    (command,) = instructions("ENTRYPOINT")
    (arguments,) = instructions("CMD")
    program, *words = [*json.loads(command), *json.loads(arguments)]
    assert program == "bdlora"
    parsed = _parser().parse_args(words)
    assert (parsed.host, parsed.port) == ("0.0.0.0", 8000)
    assert [str(parsed.port)] == instructions("EXPOSE")
    (user,) = instructions("USER")
    assert int(user) > 0
    (check,) = instructions("HEALTHCHECK")
    url, port, path = re.search(r"(http://127\.0\.0\.1:(\d+)(/\w+))", check).groups()
    assert int(port) == parsed.port, url
    assert asyncio.run(requests(api, path)) == [200]


# --- Kubernetes --------------------------------------------------------------------------------


def test_the_pod_runs_what_its_settings_say():
    assert _parser().parse_args(["serve", *CONTAINER["args"]]).config == Path(
        _mount("config")["mountPath"], "serve.yaml"
    )
    (port,) = CONTAINER["ports"]
    assert (SETTINGS.host, SETTINGS.port) == ("0.0.0.0", port["containerPort"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == SETTINGS.tensor_parallel_size
    assert Path(SETTINGS.model).is_relative_to(_mount("models")["mountPath"])
    assert SETTINGS.adapter_dirs == (_mount("adapters")["mountPath"],)
    gib = int(CONTAINER["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert gib * 2**30 > SETTINGS.tensor_parallel_size * SETTINGS.host_cache_bytes
    (shm,) = (v for v in POD["volumes"] if v["name"] == _mounted("/dev/shm")["name"])
    assert shm["emptyDir"]["medium"] == "Memory"
    assert POD["securityContext"]["runAsUser"] == int(*instructions("USER"))
    volumes = {volume["name"] for volume in POD["volumes"]}
    mounts = [*CONTAINER["volumeMounts"], *SYNCER["volumeMounts"]]
    assert {mount["name"] for mount in mounts} == volumes
    assert not any("subPath" in mount for mount in mounts)


def _mount(name):
    (found,) = (m for m in CONTAINER["volumeMounts"] if m["name"] == name)
    return found


def _mounted(path):
    (found,) = (m for m in CONTAINER["volumeMounts"] if m["mountPath"] == path)
    return found


def test_the_pod_has_the_time_to_drain():
    before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = before + SETTINGS.drain_s + 2 * server_module._STOP_S
    assert POD["terminationGracePeriodSeconds"] > needed


def test_probes_get_what_kubernetes_should_do(api):
    """Loading, ready, draining, and a rank's death; one app through all of them."""
    probes = [CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    (port,) = CONTAINER["ports"]
    assert {probe["port"] for probe in probes} == {port["name"]}
    paths = [probe["path"] for probe in probes]

    async def through_all_states():
        seen = {}
        api.draining = False
        ours, theirs = Pipe()
        try:
            seen["starting"] = await requests(api, *paths)
            api.client.attach(ours)
            seen["loading"] = await requests(api, *paths)
            theirs.send(Ready(max_model_len=100, vocab_size=100))
            theirs.send(StepReport())
            await api.client.ready()
            seen["ready"] = await requests(api, *paths)
            api.draining = True
            seen["draining"] = await requests(api, *paths)
            api.draining = False
            theirs.close()
            while not api.client.has_ended:
                await asyncio.sleep(0.01)
            seen["dead"] = await requests(api, *paths)
        finally:
            api.client.detach()
            ours.close()
        return seen

    assert asyncio.run(through_all_states()) == {
        "starting": [200, 200, 503],
        "loading": [200, 200, 503],
        "ready": [200, 200, 200],
        "draining": [200, 200, 503],
        "dead": [503, 503, 503],
    }


def test_what_is_selected_and_referred_to_is_there():
    labels = the("Deployment")["spec"]["template"]["metadata"]["labels"]
    (port,) = CONTAINER["ports"]
    assert the("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert the("Service")["spec"]["selector"] == labels
    assert the("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    pool = the("InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"]["selector"]["matchLabels"] == labels
    assert pool["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
    assert pool["spec"]["endpointPickerRef"]["port"]["number"]
    maps = {v["configMap"]["name"] for v in POD["volumes"] if "configMap" in v}
    assert maps == {o["metadata"]["name"] for o in OBJECTS if o["kind"] == "ConfigMap"}
    (rule,) = the("HTTPRoute")["spec"]["rules"]
    for backend in rule["backendRefs"]:
        assert the(backend["kind"], backend["name"])["apiVersion"].startswith(backend["group"])
    assert rule["timeouts"]["request"] == f"{SETTINGS.request_timeout_s:.0f}s"


def test_the_route_leads_to_answers_and_to_nothing_that_loads(api):
    (rule,) = the("HTTPRoute")["spec"]["rules"]
    routed = [match["path"] for match in rule["matches"]]
    assert {path["type"] for path in routed} == {"Exact"}
    paths = [path["value"] for path in routed]
    # GET of what wants POST: there, and no other method's.
    assert set(asyncio.run(requests(api, *paths))) == {200, 405}
    assert not any("lora" in path or "metrics" in path for path in paths)


def test_the_endpoint_picker_finds_what_it_reads(exposed):
    """The defaults of llm-d-router 0.9 and of the extension up to 1.5, by metric and labels."""
    wanted = {
        "vllm:num_requests_waiting": {"model_name"},
        "vllm:num_requests_running": {"model_name"},
        "vllm:kv_cache_usage_perc": {"model_name"},
        "vllm:lora_requests_info": {
            "max_lora", "running_lora_adapters", "waiting_lora_adapters",
        },
        "vllm:cache_config_info": {"block_size", "num_gpu_blocks"},
    }  # fmt: skip
    assert {name: exposed.get(name) for name in wanted} == wanted


def test_pickers_and_the_syncer_send_no_key(api):
    """With keys they would be refused, so the example has none."""
    assert not SETTINGS.api_keys
    assert SETTINGS.admin_key is None
    assert asyncio.run(requests(api, "/metrics", "/v1/models")) == [200, 200]
    locked = APIServer(replace(SETTINGS, admin_key="the-admin-key"), api.tokenizer)
    assert asyncio.run(requests(locked, "/metrics")) == [401]
