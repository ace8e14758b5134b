"""FP8 base models as they are published: read slice by slice, equal to number times scale."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bdlora_megatron.errors import ShapeError
from bdlora_megatron.models.fp8_files import FP8Files

ROWS, COLUMNS = 11, 10
#: The name of the scale, its shape, the blocks in the config, and the scale of each number.
FORMS = {
    "deepseek": ("weight_scale_inv", (3, 2), (4, 6)),
    "block": ("weight_scale", (3, 2), (4, 6)),
    "channel": ("weight_scale", (ROWS, 1), (0, 0)),
    "row": ("weight_scale", (ROWS,), (0, 0)),
    "tensor": ("weight_scale", (1,), (0, 0)),
    "scalar": ("weight_scale", (), (0, 0)),
}


def _made(folder, form, **more):
    name, shape, block = FORMS[form]
    torch.manual_seed(2)
    stored = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.1
    tensors = {"x.weight": stored, f"x.{name}": scale, "norm.weight": torch.ones(3), **more}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    full = scale.double()
    if len(shape) == 2 and shape[1] > 1:
        full = full.repeat_interleave(block[0], 0)[:ROWS].repeat_interleave(block[1], 1)
        full = full[:, :COLUMNS]
    elif form == "row":
        full = full[:, None]
    return stored.double() * full, block


@pytest.mark.parametrize("form", FORMS)
def test_every_slice_is_its_numbers_times_their_scales(form, tmp_path):
    wanted, block = _made(tmp_path, form, **{"x.input_scale": torch.ones(1)})
    with FP8Files(tmp_path, block) as files:
        assert files.shapes == {"x.weight": (ROWS, COLUMNS), "norm.weight": (3,)}
        for start, stop in ((0, ROWS), (3, 9), (10, 11)):
            got = files.rows("x.weight", start, stop)
            torch.testing.assert_close(got.double(), wanted[start:stop], rtol=1e-6, atol=0)
        for start, stop in ((0, COLUMNS), (5, 7), (6, 10)):
            got = files.columns("x.weight", start, stop)
            torch.testing.assert_close(got.double(), wanted[:, start:stop], rtol=1e-6, atol=0)
        assert torch.equal(files.rows("norm.weight", 0, 3), torch.ones(3))
        assert "1 weights of" in files.summary
        assert "1 scales for them are not used" in files.summary


def test_scales_that_do_not_fit_are_told_all_at_once(tmp_path):
    _, block = _made(tmp_path, "deepseek", **{"y.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)})
    with pytest.raises(ShapeError) as caught:
        FP8Files(tmp_path, (4, 4))
    assert "- x.weight_scale_inv is [3, 2]; for x.weight [11, 10]" in str(caught.value)
    assert "- y.weight is FP8 and has no y.weight_scale or _scale_inv" in str(caught.value)
    assert block == (4, 6)
