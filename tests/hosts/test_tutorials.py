"""The tutorials of NeMo and Megatron-Bridge, followed in the environments that have them.

What follows in another environment, serving, is followed by tests/docs/test_tutorials.py.
"""

from __future__ import annotations

import pytest

from tests.docs.follow import Reader
from tests.hosts.test_bridge import has_bridge
from tests.hosts.test_nemo import has_nemo

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.skipif(not has_nemo(), reason="nemo-toolkit is not installed; see make test-nemo")
def test_nemo(tmp_path):
    prelude = "from tests.fakes.nemo_on_cpu import prepare\nprepare()\n"
    reader = Reader(folder=tmp_path, port=0, until="## 5. Serve it", prelude=prelude, exact=True)
    reader.follow("tutorials/nemo.md")
    (last,) = (tmp_path / "run" / "adapter" / "checkpoints").glob("*-last")
    for name in ("weights", "context", "hf_adapter", "hf_adapter-dense"):
        assert (last / name).is_dir(), f"the tutorial says that a checkpoint has {name}"


@pytest.mark.skipif(not has_bridge(), reason="megatron-bridge is not installed; see test-bridge")
def test_bridge(tmp_path):
    prelude = "from tests.fakes.bridge_on_cpu import prepare\nprepare()\n"
    reader = Reader(folder=tmp_path, port=0, until="## 4. Serve it", prelude=prelude, exact=True)
    reader.follow("tutorials/bridge.md")
    adapter = tmp_path / "run" / "adapter"
    for name in ("iter_0000006/run_config.yaml", "hf_adapter", "hf_adapter-dense"):
        assert (adapter / name).exists(), f"the tutorial says that a checkpoint has {name}"
    config = (adapter / "iter_0000006" / "run_config.yaml").read_text("utf-8")
    assert "_target_: bdlora_megatron.bridge.BDLoRA" in config
