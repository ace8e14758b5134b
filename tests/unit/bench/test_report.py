"""The page, the JSON and the picture of a run with made-up times."""

from __future__ import annotations

import json

import pytest

from bdlora_megatron.bench.calibrate import Calibration, Machine, Predicted
from bdlora_megatron.bench.plan import Variant
from bdlora_megatron.bench.plot import plot_report
from bdlora_megatron.bench.report import BenchReport, write_report
from bdlora_megatron.cli.main import main
from bdlora_megatron.config import Layout
from bdlora_megatron.plan import PRESETS, Step, find_hardware, predict_step
from tests.unit.bench.cells import make_cells, small_plan

#: Rounds of each contender, in milliseconds.
ROUNDS = {
    "base": (8, 10, 12),
    "bdlora 32": (10, 20, 30),
    "slora 16": (20, 30, 90),
    "bridge 16": (20, 40, 60),
}


def _report(calibration=None, plan=None):
    plan = plan or small_plan()
    cells = make_cells(
        plan, lambda cell: [ms / 1e3 for ms in ROUNDS.get(cell.variant.label, (1, 1, 1))]
    )
    return BenchReport(
        plan=plan,
        cells=cells,
        calibration=calibration,
        command="bdlora bench -x",
        seconds=12.0,
        load=3.25,
    )


def test_times_spreads_and_ratios():
    page = _report().markdown()
    assert "Made by `bdlora bench -x` in 12 s" in page
    row = next(line for line in page.splitlines() if line.startswith("| decode 8 x 128 | 1 ms"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "10.0 (9.0 to 11.0)"
    assert cells[3] == "20.0 (15.0 to 25.0)"
    # Round by round: 20/10, 30/20, 90/30.
    assert cells[7] == "2.00 (1.75 to 2.50)"
    assert cells[8] == "30.00 (25.00 to 60.00)"
    assert "| decode 1 x 128 | 5 AR; 2.5 kB |" in page
    assert "load average before the run 3.2" in page
    assert "cost model" not in page
    assert "- Adapters on linear_qkv, linear_proj, linear_fc1, linear_fc2." in page
    assert "](a.png)" in _report().markdown("a.png")
    assert ".png" not in page


def test_errors_of_the_prediction():
    report = _report()
    cells = [cell for cell in report.cells if cell.variant.label == "base"]
    fit = Calibration(
        machine=Machine(),
        predicted=tuple(
            Predicted(cell=cell, seconds=10e-3 * factor, held_out=held_out)
            for cell, factor, held_out in zip(
                cells, (1.0, 1.1, 1.5, 0.8), (False, True, True, True), strict=False
            )
        ),
    )
    page = _report(fit).markdown()
    assert "| fitted | 1 | 0.0% | 0.0% | 0.0% | 100% |" in page
    assert "| held out | 3 | 20.0% | 50.0% | 50.0% | 67% |" in page
    assert "| of it, decode | 1 | 10.0% | 10.0% | 10.0% | 100% |" in page
    assert "| of it, prefill | 2 | 35.0% | 50.0% | 50.0% | 50% |" in page
    assert "| of it, train" not in page
    assert "| base | 10.00 | 8.00 | -20% |" in page
    data = _report(fit).to_dict()["calibration"]
    assert data["errors"]["of it, prefill"]["median"] == pytest.approx(0.35)
    assert [p["held_out"] for p in data["predicted"]] == [False, True, True, True]


def test_bridge_has_a_column_of_its_own(tmp_path):
    page = _report(plan=small_plan(bridge=True)).markdown()
    (head,) = (line for line in page.splitlines() if line.startswith("| step | link |"))
    assert "| S-LoRA 16 | Megatron-Bridge 16 | 2r / S-LoRA |" in head
    row = next(line for line in page.splitlines() if line.startswith("| decode 8 x 128 | 1 ms"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[7] == "40.0 (30.0 to 50.0)"
    # Of S-LoRA still, round by round.
    assert cells[8] == "2.00 (1.75 to 2.50)"
    stem = tmp_path / "new" / "layouts-tp4"
    assert write_report(_report(plan=small_plan(bridge=True)), stem).name == "layouts-tp4.md"
    assert {path.suffix for path in stem.parent.iterdir()} == {".json", ".md", ".png"}


def test_mixed_steps_have_rows_of_their_own_and_none_for_bridge(tmp_path):
    plan = small_plan(mixed=((8, 128),), adapters=(1, 8), bridge=True)
    report = _report(plan=plan)
    rows = [line for line in report.markdown().splitlines() if "mixed 8 x 128, U = 8" in line]
    times, traffic = rows[0], rows[2]
    cells = [cell.strip() for cell in times.strip("|").split("|")]
    assert cells[1:4] == ["0 ms", "10.0 (9.0 to 11.0)", "20.0 (15.0 to 25.0)"]
    assert cells[7:9] == ["-", "2.00 (1.75 to 2.50)"]
    assert traffic.strip("| ").split(" | ")[-2:] == ["5 AR; 2.5 kB", "-"]
    adapters = {cell["adapters"] for cell in report.to_dict()["cells"]}
    assert adapters == {None, 1, 8}
    assert plot_report(report, tmp_path / "mixed.png").stat().st_size > 1000


def test_everything_is_in_the_json():
    data = json.loads(json.dumps(_report().to_dict()))
    assert data["command"] == "bdlora bench -x"
    assert len(data["cells"]) == 10 * 5
    (found,) = [
        cell["seconds"]
        for cell in data["cells"]
        if (cell["phase"], cell["batch"], cell["latency_s"], cell["variant"])
        == ("decode", 8, 1e-3, "slora 16")
    ]
    assert found == [0.02, 0.03, 0.09]
    assert {"torch", "megatron-core", "Python"} <= data["machine"]["versions"].keys()
    assert data["calibration"] is None


def test_a_cell_that_was_not_measured():
    report = _report()
    with pytest.raises(KeyError, match="bdlora"):
        report.cell(Variant(layout=Layout.BDLORA, rank=2), report.plan.settings()[0])


def test_the_picture(tmp_path):
    path = plot_report(_report(), tmp_path / "layouts.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_fitted_machine_is_planned_with(tmp_path, capsys):
    """What a run was fitted to predicts as that machine does, and unlike one twice as fast."""
    shape, step = PRESETS["llama-3.1-8b"], Step(tokens=8, context=128)
    totals = []
    for flops in (2e10, 4e10):
        machine = Machine(flops=flops, launch=7e-5, start=3e-4)
        cell = _report().cells[0]
        predicted = tuple(Predicted(cell=cell, seconds=1.0, held_out=out) for out in (True, False))
        fit = Calibration(machine=machine, predicted=predicted)
        write_report(_report(fit), tmp_path / "ours")
        hardware = find_hardware(str(tmp_path / "ours.json"))
        total = predict_step(shape, step, hardware, 2).total
        assert total == predict_step(shape, step, machine.hardware(0.0, cpu=True), 2).total
        assert 2**30 < hardware.device.memory < 2**45
        totals.append(total)
    assert totals[1] < totals[0]
    asked = ["plan", "--model", "llama-3.1-8b", "--tp", "2", "--json", "--hardware"]
    capsys.readouterr()
    assert main([*asked, str(tmp_path / "ours.json")]) == 0
    assert json.loads(capsys.readouterr().out)["deployment"]["hardware"]["name"] == "ours.json"


def test_what_is_no_fitted_machine(tmp_path, capsys):
    write_report(_report(), tmp_path / "few")
    asked = ["plan", "--model", "llama-3.1-8b", "--tp", "2", "--hardware"]
    assert main([*asked, str(tmp_path / "few.json")]) == 2
    assert "few.json holds no fitted machine" in capsys.readouterr().err
    assert main([*asked, "a100-nvlnk"]) == 2
    assert "did you mean 'a100-nvlink'?" in capsys.readouterr().err
