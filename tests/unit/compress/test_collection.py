"""Collections from end to end, beside dense fp64 algebra and PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from bdlora_megatron.blocks import reshard
from bdlora_megatron.compress import CompressOptions, compress_adapters, read_collection
from bdlora_megatron.convert import ModuleKey, WriteOptions, read_adapter, write_adapter
from bdlora_megatron.errors import AdapterNotFoundError
from tests.tolerances import assert_close
from tests.unit.cli.adapters import run, run_json
from tests.unit.compress.planted import (
    RUN,
    contents,
    dense,
    distance,
    numbers,
    save,
    sources_of,
    spaces,
    updates,
    within,
)
from tests.unit.convert.peft_files import WIDTHS, blocks, peft_model, tiny_llama
from tests.unit.convert.peft_files import save as save_model

SHARED, BLOCKED = {"form": "shared"}, {"form": "blocked", "tp": 2}


def compress(out, folders, **options):
    return compress_adapters(sources_of(*folders), out, CompressOptions(**options))


def alike(folder, count, *, basis_rank=6, noise=0.0, seed=0, **more):
    """Adapters of one space with ranks 2 to 4 and sizes and scales that differ widely."""
    random = numbers(seed)
    space = spaces(random, basis_rank)
    made = []
    for number in range(count):
        rank = 2 + number % 3
        tensors = within(random, space, rank, noise=noise, size=10.0 ** (number % 5 - 2))
        name = folder / f"{seed}{number:02}"
        made.append(save(name, tensors, rank=rank, alpha=1 + number, **more))
    return made


def assert_report_is_true(report, out, folders):
    """Errors are those of what is stored, in every module."""
    for adapter, folder in zip(report.adapters, sorted(folders), strict=True):
        before, after = updates(folder), updates(out / "adapters" / adapter.name)
        assert adapter.error == pytest.approx(distance(before, after), abs=3e-7)
        for key, error in adapter.modules.items():
            wanted = distance({key: before[key]}, {key: after[key]})
            assert error == pytest.approx(wanted, abs=3e-7)


@pytest.mark.parametrize("form", [SHARED, BLOCKED], ids=["shared", "blocked"])
def test_a_collection_that_shares_a_basis_is_recovered(form, tmp_path):
    folders = alike(tmp_path / "src", 5)
    # Each slice of a blocked basis has a rank of its own.
    rank = 6 * form.get("tp", 1)
    report = compress(tmp_path / "out", folders, rank=rank, **form)
    assert max(adapter.error for adapter in report.adapters) < 1e-6
    for folder in folders:
        got = updates(tmp_path / "out" / "adapters" / folder.name)
        assert distance(updates(folder), got) < 1e-6


@pytest.mark.parametrize("form", [SHARED, BLOCKED], ids=["shared", "blocked"])
@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reported_errors_are_dense_errors(form, core, dtype, tmp_path):
    folders = alike(tmp_path / "src", 4, noise=0.5, dtype=torch.float32)
    report = compress(tmp_path / "out", folders, rank=4, core=core, dtype=dtype, **form)
    assert min(adapter.error for adapter in report.adapters) > 0.1
    assert_report_is_true(report, tmp_path / "out", folders)


def test_a_blocked_basis_is_a_fit_of_each_slice(tmp_path):
    """Columns of o_proj and down_proj, rows of the others, as adapters by themselves."""
    folders = alike(tmp_path / "src", 4, noise=0.3)
    compress(tmp_path / "out", folders, rank=4, **BLOCKED)
    for number in range(2):
        cut = []
        for folder in folders:
            adapter = read_adapter(folder)
            tensors = {}
            for key, factors in adapter.modules.items():
                stem = f"base_model.model.model.{key}.lora_"
                A, B = factors.A, factors.B
                if key.name in ("o_proj", "down_proj"):
                    A = A.chunk(2, dim=1)[number]
                else:
                    B = B.chunk(2)[number]
                # So that a slice weighs what it weighs in the whole.
                norm = dense(factors).norm()
                tensors |= {f"{stem}A.weight": A, f"{stem}B.weight": B / norm * factors.scale}
            cut.append((adapter, tensors))
        for key in cut[0][0].modules:
            _assert_slice_is_fitted(tmp_path / "out", key, number, cut)


def _assert_slice_is_fitted(out, key, number, cut):
    """The collection's basis holds as much of the slices as a fit of them alone."""
    from bdlora_megatron.compress.fit import fit_basis
    from bdlora_megatron.compress.stack import stack_pairs

    stem = f"base_model.model.model.{key}.lora_"
    pairs = sorted(
        ((t[f"{stem}B.weight"], t[f"{stem}A.weight"]) for _, t in cut), key=lambda p: p[1].shape
    )
    fit = fit_basis(stack_pairs(pairs, [1.0] * len(pairs)), 2)
    with read_collection(out).basis(0) as basis:
        U, V = basis[key].U[number], basis[key].V[number]
    held = sum(float((U.t() @ B @ (A @ V)).square().sum()) for B, A in pairs)
    assert held == pytest.approx(fit.energies[-1], rel=1e-5)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_slice_that_needs_fewer_columns_is_filled_up(core, tmp_path):
    """The first half of q_proj's outputs and of o_proj's inputs does not change at all."""
    random = numbers(0)
    own = spaces(random, 3, modules=["self_attn.q_proj", "self_attn.o_proj"])
    tensors = within(random, own, 3)
    for name, tensor in tensors.items():
        if "q_proj.lora_B" in name:
            tensor[: len(tensor) // 2] = 0
        elif "o_proj.lora_A" in name:
            tensor[:, : tensor.shape[1] // 2] = 0
    folder = save(tmp_path / "src" / "half", tensors, rank=3)
    out = tmp_path / "out"
    report = compress(out, [folder], rank=6, core=core, **BLOCKED)
    assert report.adapters[0].error < 1e-6
    assert distance(updates(folder), updates(out / "adapters" / "half")) < 1e-6
    with read_collection(out).basis(0) as basis:
        for factors in basis.values():
            assert factors.U.shape[2] == factors.V.shape[2] == 3
            assert not factors.U[0, :, 1:].any()
            assert torch.linalg.matrix_rank(factors.U[1]) == 3


def test_equal_adapters_cost_one(tmp_path):
    random = numbers(0)
    tensors = within(random, spaces(random, 4), 3)
    folders = [save(tmp_path / "src" / f"a{i}", tensors, rank=3) for i in range(6)]
    for count in (1, 6):
        out = tmp_path / f"out{count}"
        report = compress(out, folders[:count], rank=16)
        assert max(adapter.error for adapter in report.adapters) < 1e-7
        with read_collection(out).basis(0) as basis:
            assert {b.U.shape[2] for b in basis.facts.values()} == {3}
    one, six = (tmp_path / f"out{n}" / "cluster_000" / "basis.safetensors" for n in (1, 6))
    assert one.stat().st_size == six.stat().st_size


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_rank_of_all_ranks_is_exact(core, tmp_path):
    """Unrelated adapters, with as many columns as all of them have ranks."""
    folders = [alike(tmp_path / "src", 1, seed=seed)[0] for seed in range(3)]
    report = compress(tmp_path / "out", folders, rank=6, core=core)
    worst = max(adapter.error for adapter in report.adapters)
    # Matrices that have nothing in common are not all diagonal in one frame of their own size.
    assert worst < 1e-7 if core == "full" else worst < 1


def test_neither_order_nor_workers_nor_names_of_files_matter(tmp_path):
    folders = [f for seed in range(2) for f in alike(tmp_path / "src", 4, seed=seed, noise=0.2)]
    options = CompressOptions(rank=6, clusters=2, max_error=0.5)
    outs = [tmp_path / f"out{i}" for i in range(2)]
    compress_adapters(sources_of(*folders), outs[0], options)
    compress_adapters(sources_of(*folders[::-1]), outs[1], options, workers=2)
    one, other = map(contents, outs)
    assert len(one) > 10
    assert one == other
    assert {path.name for path in outs[0].iterdir() if path.name in RUN} == RUN
    assert not list(tmp_path.glob(".*"))


def test_one_thread_computes_whatever_the_caller_has(tmp_path):
    """Sums of several threads round otherwise."""
    seen, before = [], torch.get_num_threads()

    def show(results, *_):
        for result in results:
            seen.append(torch.get_num_threads())
            yield result

    torch.set_num_threads(2)
    try:
        folders = alike(tmp_path / "src", 1)
        options = CompressOptions(rank=2)
        compress_adapters(sources_of(*folders), tmp_path / "out", options, show=show)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_planted_clusters_are_found(tmp_path):
    folders = [f for seed in range(3) for f in alike(tmp_path / "src", 5, seed=seed, noise=0.02)]
    report = compress(tmp_path / "out", folders, rank=6, clusters=3)
    found = {adapter.name: adapter.cluster for adapter in report.adapters}
    for seed in range(3):
        own = {found[f"{seed}{number:02}"] for number in range(5)}
        assert len(own) == 1
    assert len(set(found.values())) == 3
    assert max(adapter.error for adapter in report.adapters) < 0.1
    one = compress(tmp_path / "one", folders, rank=6)
    assert min(adapter.error for adapter in one.adapters) > 0.3


def test_clusters_are_found_by_samples_too(tmp_path, monkeypatch):
    """Of modules, of candidates for seeds and of rows, with few adapters open at a time."""
    monkeypatch.setattr("bdlora_megatron.compress.tasks._SKETCH", 24)
    monkeypatch.setattr("bdlora_megatron.compress.driver._CANDIDATES", 5)
    monkeypatch.setattr("bdlora_megatron.compress.opened._MOST", 2)
    folders = [f for seed in range(2) for f in alike(tmp_path / "src", 6, seed=seed)]
    # An adapter of one module, which may not be among those that are looked at.
    for layer, module in spaces(numbers(0), 6):
        tensors = within(numbers(5), {(layer, module): spaces(numbers(0), 6)[layer, module]}, 2)
        folders.append(save(tmp_path / "src" / module, tensors, rank=2))
    report = compress(tmp_path / "out", folders, rank=6, clusters=2, cluster_modules=2)
    found = {adapter.name: adapter.cluster for adapter in report.adapters}
    groups = [{found[f"{seed}{number:02}"] for number in range(6)} for seed in range(2)]
    assert groups in ([{0}, {1}], [{1}, {0}])
    for module in WIDTHS:
        assert {found[module]} == groups[0], module
    assert max(adapter.error for adapter in report.adapters) < 1e-6


def test_the_type_is_the_widest_of_all(tmp_path):
    src = tmp_path / "src"
    half = alike(src, 2, dtype=torch.bfloat16)
    mixed = [*half, *alike(src, 1, seed=1, dtype=torch.float16)]
    for folders, dtype in ((half, "bfloat16"), (mixed, "float32")):
        out = tmp_path / dtype
        report = compress(out, folders, rank=6)
        collection = read_collection(out)
        assert collection.manifest.dtype == dtype
        with collection.adapter(half[0].name) as adapter:
            assert {factors.dtype for factors in adapter.modules.values()} == {torch.float32}
        assert_report_is_true(report, out, folders)


def test_what_loses_too_much_is_kept_whole(tmp_path):
    folders = alike(tmp_path / "src", 6, noise=0.01)
    odd = [alike(tmp_path / "src", 1, seed=seed)[0] for seed in (7, 8)]
    (odd[0] / "tokenizer.json").write_text("{}")
    (folders[0] / "chat_template.jinja").write_text("{{ messages }}")
    polluted = compress(tmp_path / "all", folders + odd, rank=6)
    assert max(a.error for a in polluted.adapters) > 0.1
    out = tmp_path / "out"
    report = compress(out, folders + odd, rank=6, max_error=0.1)
    assert [adapter.name for adapter in report.whole] == [folder.name for folder in odd]
    assert all(adapter.error > 0.1 for adapter in report.whole)
    # The basis is fitted to the others alone.
    alone = compress(tmp_path / "alone", folders, rank=6)
    for one, other in zip(report.adapters, alone.adapters, strict=False):
        assert one.error == pytest.approx(other.error, abs=1e-6)
    for folder in odd:
        kept = out / "adapters" / folder.name
        assert (kept / "adapter_config.json").is_file()
        assert distance(updates(folder), updates(kept)) == 0
    assert (out / "adapters" / odd[0].name / "tokenizer.json").read_text() == "{}"
    copied = out / "adapters" / folders[0].name / "chat_template.jinja"
    assert copied.read_text() == "{{ messages }}"
    assert "2 kept whole" in report.summary()
    assert read_collection(out).entry(odd[0].name).cluster is None


def test_a_collection_that_has_nothing_in_common_stays_whole(tmp_path):
    folders = [alike(tmp_path / "src", 1, seed=seed)[0] for seed in range(4)]
    report = compress(tmp_path / "out", folders, rank=2, max_error=0.01, clusters=2)
    assert len(report.whole) == 4
    # Alone in its cluster, an adapter loses nothing and saves nothing.
    assert sorted(adapter.reason for adapter in report.whole) == ["error", "error", "room", "room"]
    assert "2 kept whole, which are in clusters that would save no room" in report.summary()
    assert report.clusters == ()
    for folder in folders:
        assert distance(updates(folder), updates(tmp_path / "out" / "adapters" / folder.name)) == 0


def test_modules_ranks_and_structures_may_differ(tmp_path):
    """Missing modules, a rank pattern, blocks and updates of nothing."""
    random = numbers(0)
    space = spaces(random, 6, layers=2)
    attention = {at: own for at, own in space.items() if "attn" in at[1]}
    first = {at: own for at, own in space.items() if at[0] == 0}
    src = tmp_path / "src"
    whole = within(random, space, 4)
    whole |= within(random, {(1, "mlp.up_proj"): space[1, "mlp.up_proj"]}, 2)
    zero = {
        name: torch.zeros_like(tensor) if "lora_B" in name else tensor
        for name, tensor in within(random, first, 2).items()
    }
    folders = [
        save(src / "attention", within(random, attention, 3), rank=3),
        save(src / "first", within(random, first, 2), rank=2, use_rslora=True),
        save(src / "pattern", whole, rank=4, rank_pattern={"layers.1.mlp.up_proj": 2}),
        save(src / "zero", zero, rank=2),
    ]
    blocked = read_adapter(folders[1])
    modules = {key: reshard(factors, 2) for key, factors in blocked.modules.items()}
    made = type(blocked)(name="blocked", modules=modules, base=blocked.base)
    folders.append(write_adapter(made, src / "blocked", "peft"))
    folders.append(write_adapter(blocked, src / "sharded", "megatron", options=WriteOptions()))
    for number, form in enumerate((SHARED, BLOCKED)):
        out = tmp_path / f"out{number}"
        report = compress(out, folders, rank=12, **form)
        assert max(adapter.error for adapter in report.adapters) < 1e-6
        for folder in folders:
            before, after = updates(folder), updates(out / "adapters" / folder.name)
            assert before.keys() == after.keys()
            if folder.name == "zero":
                assert all(not update.any() for update in after.values())
            else:
                assert distance(before, after) < 1e-6
    only_zero = compress(tmp_path / "only", folders[3:4], rank=4, max_error=0.0)
    assert only_zero.adapters[0].error == 0
    assert only_zero.whole == []


@pytest.mark.parametrize("form", [SHARED, BLOCKED], ids=["shared", "blocked"])
def test_peft_loads_what_is_written_back(form, tmp_path, capsys):
    """The logits of a model with the written adapter are those with the stored update."""
    folders = [
        save_model(peft_model(r=4), tmp_path / "src" / "one"),
        save_model(peft_model(r=8, use_bdlora=blocks(4)), tmp_path / "src" / "two"),
    ]
    out = tmp_path / "out"
    compress(out, folders, rank=6, **form)
    collection = read_collection(out)
    status, *_ = run(capsys, "convert", out / "adapters", "--to", "peft", "--out", tmp_path / "p")
    assert status == 0
    ids = torch.arange(12)[None]
    for folder in folders:
        base = tiny_llama().double()
        entry = collection.entry(folder.name)
        with collection.basis(entry.cluster) as basis, collection.cores(folder.name) as cores:
            for key, core in cores.items():
                module = base.get_submodule(f"model.{key}")
                U, S, V = (tensor.double() for tensor in (basis[key].U, core, basis[key].V))
                parts = list(U @ S @ V.mT)
                row = key.name in ("o_proj", "down_proj")
                module.weight.data += torch.cat(parts, dim=1 if row else 0)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "p" / folder.name).double()
        with torch.no_grad():
            assert_close(loaded(ids).logits, base(ids).logits, folder.name, (1e-6, 1e-5))
        raw = json.loads((tmp_path / "p" / folder.name / "adapter_config.json").read_text())
        assert (raw["use_bdlora"] is not None) == (form is BLOCKED)


def test_the_command_and_those_that_read_what_it_writes(tmp_path, capsys):
    folders = alike(tmp_path / "src", 3, noise=0.1)
    out = tmp_path / "out"
    options = ["--out", out, "--rank", 4, "--workers", 1]
    status, text, _ = run(capsys, "compress", tmp_path / "src", *options)
    assert status == 0
    assert "3 of 3 adapters compressed in 1 cluster(s)" in text
    report = json.loads((out / "report.json").read_text())
    assert [adapter["name"] for adapter in report["adapters"]] == [f.name for f in folders]
    assert report["peak_bytes"] > 1e7
    page = (out / "report.md").read_text()
    assert all(f"| {folder.name} | 0 |" in page for folder in folders)
    assert "| self_attn.q_proj | median" in page
    verified = run_json(capsys, "verify", folders[0], out / "adapters" / folders[0].name)[1]
    key = verified["modules"][0]["key"]
    relative = verified["modules"][0]["relative"]
    assert report["adapters"][0]["modules"][key] == pytest.approx(relative, abs=3e-7)
    status, text, _ = run(capsys, "inspect", out / "adapters")
    assert status == 0
    assert text.count("compressed") == 3
    # A collection is replaced when that is asked for, and nothing else is.
    status, _, said = run(capsys, "compress", tmp_path / "src", *options)
    assert (status, "pass another path, or --overwrite" in said) == (2, True)
    status, data = run_json(capsys, "compress", folders[0], *options, "--overwrite")
    assert (status, len(data["adapters"])) == (0, 1)
    assert not (out / "adapters" / folders[1].name).exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    options[1] = home
    status, _, said = run(capsys, "compress", folders[0], *options, "--overwrite")
    assert (status, "is no collection" in said) == (2, True)


def test_a_collection_is_read_lazily_by_name_and_module(tmp_path):
    folders = alike(tmp_path / "src", 2, dtype=torch.float32)
    compress(tmp_path / "out", folders, rank=5, core="diagonal")
    collection = read_collection(tmp_path / "out")
    key = ModuleKey(layer=0, name="k_proj")
    with collection.basis(0) as basis, collection.cores(folders[0].name) as cores:
        assert basis.facts[key].U.is_meta
        assert len(basis) == len(cores) == len(WIDTHS)
        assert basis[key].U.shape == (1, WIDTHS["self_attn.k_proj"][1], 5)
        assert basis[key].V.shape == (1, WIDTHS["self_attn.k_proj"][0], 5)
        assert cores[key].shape == (1, 5)
        assert ModuleKey(layer=3, name="k_proj") not in basis
        with pytest.raises(KeyError):
            cores[ModuleKey(layer=3, name="k_proj")]
    with pytest.raises(AdapterNotFoundError, match="did you mean '000'"):
        collection.entry("0000")
