"""The table of families in docs/base-models.md says what the reader reads and the tests compare."""

from __future__ import annotations

import re

import transformers

from bdlora_megatron.decoder import FUSED_PARTS
from bdlora_megatron.models.config import FAMILIES
from tests.docs.pages import ROOT
from tests.tp.hf_models import CASES


def _rows():
    text = (ROOT / "docs/base-models.md").read_text("utf-8")
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    families = [[cell.strip() for cell in row] for row in cells if len(row) == 4]
    return {row[0].strip("`"): row for row in families[1:]}


def test_the_table_has_every_family_and_every_compared_model():
    rows = _rows()
    assert tuple(rows) == FAMILIES
    for family, (_, _, adapters, compared) in rows.items():
        names = [
            kind
            for kind, (name, _) in CASES.items()
            if getattr(transformers, f"{name}Config").model_type == family
        ]
        assert sorted(re.findall("`([^`]+)`", compared)) == sorted(names), family
        files = set(re.findall("`([^`]+)`", adapters))
        assert files == ({*FUSED_PARTS, "o_proj", "down_proj"} if family == "phi3" else set())
