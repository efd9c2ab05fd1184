"""The benchmarks at toy sizes: they run, write what they found, and print no speed for what is wrong."""

import gc
import json
import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from bench_toys import TOY
from helpers import run
from torch.utils.flop_counter import FlopCounterMode

from rwkv_train.bench import measure, memory, models
from rwkv_train.bench.apart import Apart, apart, peak_mb
from rwkv_train.bench.limits import matrices_of, matrix_products
from rwkv_train.bench.wkv_operators import OPERATORS
from rwkv_train.ops.wkv4 import BACKENDS

COLUMNS = {
    "bench wkv": ["wkv4", "wkv7", "cpu", "torch", "reference", "transformers", "1x33x8", "bf16", "share of a copy"],
    "bench train": ["ours fp32", "ours bf16", "transformers fp32", "products bf16", "WKV's share", "over truncated"],
    "bench memory": [
        "ours, exact",
        "ours, truncated",
        "transformers RWKV-4",
        "transformers GPT-NeoX",
        "exact over",
        "rwkv7-16x2x31: training low-rank factors over inference",
    ],
    "bench generate": ["ours", "package rwkv", "transformers", "with sampling", "matrix-vector", "over the package"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few_checks(monkeypatch):
    """One small shape to check each operator on: tests/ops has all the others."""
    for name, operator in OPERATORS.items():
        monkeypatch.setitem(OPERATORS, name, replace(operator, checks=[(2, 17, 21)]))


@pytest.fixture
def in_this_process(monkeypatch):
    """What `apart` would do in a process of its own, which the tests of `apart` show."""

    def here(function, limit_gb, limit_s, **arguments):
        module, name = function.split(":")
        return Apart(getattr(import_module(module), name)(**arguments), peak_mb())

    monkeypatch.setattr(memory, "apart", here)
    gc.freeze()  # or every section looks through the objects of all packages
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.usefixtures("few_checks", "in_this_process")
def test_a_benchmark_prints_a_table_and_writes_json(name, here, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("rwkv")
    more = ["--peers=true", "--plot=m.svg"] if name == "bench memory" else []
    code, out, err = run(*name.split(), *TOY[name], "--json=f.json", *more, capsys=capsys)
    assert code == 0, err
    assert all(column in out for column in COLUMNS[name]), out
    assert not any(word in out for word in ("refused", "disagrees", "failed", "not run")), out
    found = json.loads((here / "f.json").read_text())
    assert found["benchmark"] == name.split()[1] and found["results"] and found["settings"]
    assert found["machine"]["cores"] and found["machine"]["packages"]["torch"]
    if more:
        assert "<svg" in (here / "m.svg").read_text()


def test_an_rwkv7_generates_beside_the_package(monkeypatch, capsys):
    pytest.importorskip("rwkv")
    monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)  # it is of one generation, chosen as it is imported
    code, out, err = run("bench", "generate", *TOY["bench generate"], "--size=rwkv7-64x2x31", capsys=capsys)
    assert code == 0 and "over the package rwkv" in out and "refused" not in out, out + err


def off_by_a_tenth(w, u, k, v, state, reset=None):
    y, state = fallback_wkv4(w, u, k, v, state, reset)
    return y * 1.1, state


def without_the_states_gradient(w, u, k, v, state, reset=None):
    return fallback_wkv4(w, u, k, v, state.detach() + 0 * state, reset)


fallback_wkv4 = BACKENDS["torch"]


@pytest.mark.parametrize(
    ("wrong", "told"), [(off_by_a_tenth, "is off by 1.0e-01"), (without_the_states_gradient, "gradient of state")]
)
@pytest.mark.usefixtures("few_checks")
def test_a_wrong_backend_gets_no_speed(wrong, told, here, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "torch", wrong)
    code, out, _ = run(
        "bench", "wkv", *TOY["bench wkv"], "--operators=[wkv4]", "--dtypes=[fp32]", "--json=f.json", capsys=capsys
    )
    assert code == 1 and told in out
    rows = json.loads((here / "f.json").read_text())["results"]["rows"]
    assert {row["backend"]: "forward" in row for row in rows}["torch"] is False
    assert [row for row in rows if row["backend"] == "reference" and "forward" in row]
    refused = [line for line in out.splitlines() if "| torch" in line]
    assert len(refused) == 2 and all("refused" in line and " ms" not in line for line in refused)


def test_a_wrong_step_and_wrong_logits_get_no_speed(here, monkeypatch, capsys):
    monkeypatch.setattr("rwkv_train.ops.build_cpu.available", lambda: False)
    monkeypatch.setitem(BACKENDS, "torch", off_by_a_tenth)
    for name in ("bench train", "bench generate"):
        code, out, _ = run(*name.split(), *TOY[name], "--peers=false", capsys=capsys)
        ours = [line for line in out.splitlines() if "| ours" in line and "sampling" not in line]
        assert code == 1 and ours
        assert any("disagrees" in line and "refused" in line for line in ours), out


@pytest.mark.usefixtures("few_checks")
def test_a_failing_peer_is_told_and_the_rest_is_measured(here, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise TypeError("not today")

    monkeypatch.setattr("rwkv_train.bench.wkv_operators._transformers", broken)
    monkeypatch.setattr("rwkv_train.bench.wkv_operators.installed", lambda package: "1")
    code, out, _ = run("bench", "wkv", *TOY["bench wkv"], "--dtypes=[fp32]", capsys=capsys)
    (line, _) = [line for line in out.splitlines() if "| transformers" in line]
    assert code == 0 and "failed: TypeError: not today" in line and "refused" in line


@pytest.mark.parametrize("size", ["16x2x31", "rwkv7-16x2x31"])
def test_the_bare_products_are_those_of_the_step(size):
    model = models.random_model(models.size_of(size))
    tokens, _ = models.random_text(model.config, 2, 12)
    text = tokens, tokens  # every token has a target: a row without one is no row of the head's products
    counted = []
    for call in (models.training_step(model, text), matrix_products(model, 24)):
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 6 * 24 * sum(w.numel() for w in matrices_of(model)) > 0


def test_exact_and_truncated_steps_are_what_they_say():
    """One chunk: the same gradients. Several: the truncated ones are others, the exact ones those of one chunk."""
    model = models.random_model(models.size_of("16x2x31")).double()
    text = models.random_text(model.config, 1, 24)
    whole = models.gradients(models.training_step(model, text), model)

    def difference(step):
        step()
        name = "blocks.0.att.key.weight"
        return measure.relative_error(dict(model.named_parameters())[name].grad, whole[name])

    assert difference(models.training_step(model, text, chunk_len=8)) < 1e-12
    assert difference(models.truncated_step(model, text, 24)) < 1e-12
    assert difference(models.truncated_step(model, text, 8)) > 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "wkv", "train"])
def test_without_a_gpu_one_line_says_so(name, capsys):
    flags = [] if name == "gpu" else ["--device=cuda"]
    code, out, err = run("bench", name, *flags, capsys=capsys)
    assert code == 1 and "no GPU" in err and err.count("\n") == 1 and not out


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "tools"))


def test_a_process_of_its_own_has_its_own_peak(tools):
    here = peak_mb()
    ballast = torch.ones(300 * 250_000)  # held by this process, and not by those that it starts
    little, much = (apart("hold:hold", 10, 300, megabytes=m) for m in (1, 200))
    assert little.result == 10**6 and 150 < much.peak_mb - little.peak_mb < 250
    assert little.peak_mb < here + ballast.nbytes / 1e6


def test_limits_end_a_process(tools):
    assert apart("hold:hold", 10, 0, megabytes=1).why_not == "over 0 s"
    assert apart("hold:hold", 0.01, 300, megabytes=100).why_not == "over 0.01 GB"
    assert "unexpected keyword argument" in apart("hold:hold", 10, 300, gigabytes=1).why_not


def test_a_peer_over_its_limit_is_told_and_longer_texts_are_not_tried(here, monkeypatch, capsys):
    tried = []

    def fake(function, limit_gb, limit_s, *, kind, length, **rest):
        tried.append((kind, length))
        if kind == memory.EXACT:
            assert limit_gb == limit_s == math.inf
        elif length > 16 and kind in memory.PEERS:
            return Apart(why_not=f"over {limit_gb:g} GB")
        return Apart({"seconds": 1.0, "loaded_mb": 90.0}, 100.0 + length)

    monkeypatch.setattr(memory, "apart", fake)
    flags = ["--lengths=[64,16,32]", "--lora-size=", "--limit-gb=3", "--peers=true", "--plot=m.svg"]
    code, out, _ = run("bench", "memory", *TOY["bench memory"], *flags, capsys=capsys)
    assert code == 0 and out.count("not run: over 3 GB") == 4 and out.count("116 MB, 1 s") == 4
    assert "ours, exact: peak at 64 over 16 tokens" in out
    assert len(tried) == 4 * 2 + 2 and "over 3 GB at 32" in (here / "m.svg").read_text()


def test_turns_and_agreement():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    found = measure.race(calls, 3, least=0)
    assert called == [*"aabbcc", *"abc", *"bca", *"cab"] and all(len(t.seconds) == 3 for t in found.values())
    assert [len(t.seconds) for t in measure.race(calls, 3, budget=0).values()] == [1, 1, 1]
    one = torch.ones(3)
    assert measure.relative_error(one * 1.5, one) == 0.5
    assert all(math.isinf(measure.relative_error(x, one)) for x in (one * math.nan, one[:2], one * math.inf))
    assert measure.agreement(lambda: {"x": one}, {"x": one, "z": one}, 1).where == "z"


def test_sizes():
    assert (models.size_of("169M").n_embd, models.size_of("8x3").vocab_size) == (768, 1024)
    with pytest.raises(ValueError, match="there is no size '170M'; write 256x4"):
        models.size_of("170M")


def test_who_fails_leaves_the_race_and_the_others_go_on():
    def broken():
        raise RuntimeError("out of order")

    def failing_later(called=[]):  # noqa: B006
        called.append(1)
        if len(called) > 3:
            broken()

    calls, failed = {"broken": broken, "whole": lambda: None, "later": failing_later}, {}
    found = measure.race(calls, 5, least=0, failed=failed)
    assert list(found) == ["whole"] and len(found["whole"].seconds) == 5
    assert failed == dict.fromkeys(["broken", "later"], "RuntimeError: out of order")
    with pytest.raises(RuntimeError, match="out of order"):
        measure.race(calls, 5, least=0)


def test_what_is_off_by_little_is_timed_and_says_so():
    off = measure.Agreement(0.034, 0.03, "gradient of w")
    assert not off.good and off.near and str(off) == "off: 0.034 > 0.03, gradient of w"
    wrong = measure.Agreement(0.34, 0.03, "y")
    assert not wrong.near and "disagrees: y is off by 3.4e-01" in str(wrong)
    assert not measure.Agreement(math.inf, 0.03, failed="x").near


@pytest.mark.parametrize("name", ["bench train", "bench generate"])
def test_a_peer_that_cannot_be_made_and_a_step_that_fails_leave_the_rest_of_the_table(name, here, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise TypeError("not today")

    module = import_module(f"rwkv_train.{name.replace(' ', '.')}")
    monkeypatch.setattr(module, "in_transformers", broken)
    monkeypatch.setattr(module, "installed", lambda package: package == "transformers")
    failing = "matrix_products" if name == "bench train" else "_decoding"
    whole = getattr(module, failing)
    draws = lambda args: name == "bench train" or args[2].temperature  # noqa: E731
    monkeypatch.setattr(module, failing, lambda *args: broken if draws(args) else whole(*args))
    less = ["--sizes=[16x2x31]", "--chunks=0"] if name == "bench train" else []
    code, out, _ = run(*name.split(), *TOY[name], *less, capsys=capsys)
    lines = [line for line in out.splitlines() if "not today" in line]
    assert any("transformers" in line and "failed: TypeError: not today" in line for line in lines), out
    assert any("products" in line or "sampling" in line for line in lines), out
    assert [line for line in out.splitlines() if "| ours" in line and "(" in line and "failed" not in line], out
    assert code == (1 if name == "bench generate" else 0)
