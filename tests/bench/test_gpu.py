"""`bench gpu` on a CPU: every section runs on a bare machine, and whatever fails there ends its own job alone."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from bench_toys import TOY, TOY_GPU

from rwkv_train import cli
from rwkv_train.bench import elementwise_cases, gpu, gpu_generation, gpu_kernels, gpu_programs
from rwkv_train.bench.gpu_jobs import Job, Row
from rwkv_train.bench.gpu_kernels import timed
from rwkv_train.bench.settings import GpuBench
from rwkv_train.bench.wkv_operators import OPERATORS, Backend, Case, launches
from rwkv_train.generation import lanes
from rwkv_train.ops import elementwise, elementwise7, wkv4_cuda, wkv7_cuda
from rwkv_train.plan.card import read_report

ROOT = Path(__file__).parents[2]
TOYS = GpuBench(**TOY_GPU, device="cpu")


def test_all_of_it_runs_on_a_machine_that_has_torch_and_little_more(tmp_path):
    """Slow, as each section runs in the processes that it runs in on a GPU."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/tools/bare_machine"), str(ROOT)])}
    command = [sys.executable, "train.py", "bench", "gpu", *TOY["bench gpu"], "--device=cpu", "--tests"]
    done = subprocess.run(
        [*command, f"--json={tmp_path}/f.json"], cwd=ROOT, env=here, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("python: ") and "refused" not in done.stdout and "failed" not in done.stdout
    found = json.loads((tmp_path / "f.json").read_text())["results"]
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["sections"]) == [section.__name__.replace("_", " ") for section in gpu.SECTIONS]
    short = {row["what"]: row["found"] for row in found["short"]}
    count = len(found["sections"]["correctness"])
    assert short["operations against float64"] == f"{count} of {count} agree"
    assert short["fit with deepspeed_stage_2, 20 steps"] == "not run: deepspeed not installed"
    assert short["compute-sanitizer memcheck"] == "not run: it needs a GPU"
    assert "skipped" in short["tests of the kernels"] or "passed" in short["tests of the kernels"]
    for what in ("a copy", "wkv7 2x24x16 bf16, cpu: forward / backward", "step rwkv7-64x2x31, 2 x 16"):
        assert what in short and "not run" not in short[what]
    names = [row["name"] for row in found["sections"]["profile"]]
    assert len(names) == 40 and "aten::mm" in names


def test_a_bare_machine_reads_flags_and_refuses_what_is_no_value_of_theirs(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_Parser", type("_Parser", (ArgumentParser,), {"error": cli._Parser.error}))
    config, _ = cli.parse("bench gpu", [*TOY["bench gpu"], "--minutes", "2", "--tests", "--json=x.json"])
    assert (config.shapes, config.minutes, config.tests, config.json) == (["2x24x16"], 2, True, "x.json")
    for wrong in ("--minutes=soon", "--device=gpu", "--models=169M", "--repeats=1.5", "--nonsense=1"):
        with pytest.raises(SystemExit) as stop:
            cli.parse("bench gpu", [wrong])
        assert stop.value.code == 2 and wrong.partition("=")[0] in capsys.readouterr().err
    with pytest.raises(ValueError, match="this command needs packages that are not here"):
        cli.parse("fit", ["--name=x"])


# ---- what fails


def said(*events):
    return [(event.get("job"), event.get("row", {}).get("found"), event.get("next")) for event in events]


def test_an_exception_ends_its_job_and_keeps_the_rows_before_it(monkeypatch, capsys):
    def broken():
        yield Row({"n": 1}, "before", "kept")
        raise RuntimeError("the card is on fire")

    def section(config, results):
        yield Job("breaks", broken)
        yield Job("breaks in another program", broken, ours=False)
        yield Job("looks up", lambda: [Row(what="seen", found=str(results["section"]))])

    monkeypatch.setattr(gpu, "SECTIONS", (section,))
    events, results = [], {}
    gpu.work(TOYS, 0, results, events.append)
    failed = "failed: RuntimeError: the card is on fire"
    assert said(*events) == [
        *((0, None, None), (None, "kept", None), (None, failed, None)),
        *((1, None, None), (None, "kept", None), (None, failed, None)),
        *((2, None, None), (None, "[{'n': 1}, {'n': 1}]", None), (None, None, 3)),
    ]
    assert [event["row"]["good"] for event in events if "row" in event] == [True, False, True, True, True]
    assert "section: breaks\nTraceback" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "_works", lambda device: False)  # as after an illegal access
    events.clear()
    gpu.work(TOYS, 1, {}, events.append)
    assert said(*events)[-1] == (None, None, 2), "another process goes on with the next job"


WORKER = """
import json, os, sys, time
first = json.loads(sys.stdin.readline())["first"]
tell = lambda *events: print(*map(json.dumps, events), sep="\\n", flush=True)
for n in range(first, 5):
    row = {"cells": {"n": n}, "what": f"job {n}", "found": f"first was {first}", "good": True}
    tell({"job": n, "what": f"job {n}"}, {"row": row})
    if n == 1: print('{"row": {"ce', end="", flush=True), os._exit(3)
    if n == 2: time.sleep(600)
tell({"next": 5})
"""


@pytest.fixture
def five_jobs(monkeypatch):
    """Of them one crashes and one does not end."""
    jobs = [Job(f"job {n}", list, limit=0.3 if n == 2 else 60) for n in range(5)]
    monkeypatch.setattr(gpu, "SECTIONS", (lambda config, results: iter(jobs),))
    monkeypatch.setattr(gpu.Worker, "command", [sys.executable, "-c", WORKER])


@pytest.mark.usefixtures("five_jobs")
def test_a_crash_and_a_job_without_end_cost_themselves_alone(tmp_path, capsys):
    file = tmp_path / "f.json"
    assert gpu.gpu(GpuBench(**TOY_GPU, device="cpu", json=str(file))) == 1
    short = [(row["what"], row["found"]) for row in json.loads(file.read_text())["results"]["short"]]
    assert short == [
        *(("job 0", "first was 0"), ("job 1", "first was 0"), ("job 1", "failed: its process ended with status 3")),
        *(("job 2", "first was 2"), ("job 2", "failed: it took over 0.3 s")),
        *(("job 3", "first was 3"), ("job 4", "first was 3")),
    ]
    assert "| failed: it took over 0.3 s" in capsys.readouterr().out


@pytest.mark.usefixtures("five_jobs")
def test_it_ends_when_its_minutes_are_over_and_where_no_process_begins(tmp_path, monkeypatch, capsys):
    assert gpu.gpu(GpuBench(**TOY_GPU, device="cpu", minutes=0)) == 0
    assert "5 jobs left out: 0 minutes are over" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "jobs", lambda config, results: iter([("all", Job(f"job {n}", list)) for n in range(5)]))
    with monkeypatch.context() as patch:
        patch.setattr(gpu.Board, "left", property(lambda board: 60.0 if len(board.short) < 4 else 0.0))
        assert gpu.gpu(TOYS) == 1, "job 1 crashes before"
    out = capsys.readouterr().out
    assert "| ended: 8 minutes are over" in out and "2 jobs left out: 8 minutes are over" in out
    monkeypatch.setattr(gpu.Worker, "command", [sys.executable, "-c", "raise SystemExit(1)"])
    assert gpu.gpu(TOYS) == 1
    out = capsys.readouterr().out
    assert "5 jobs left out: no process begins to work (its process ended with status 1)" in out


def test_a_time_without_the_copy_and_the_check_says_so():
    backend = Backend(OPERATORS["wkv4"].backend("torch"))
    (row,) = timed("wkv4", "torch", backend, "1x9x4", "fp32", TOYS, {"limits": [{"what": "a copy"}]}, told=True)
    assert row.found.endswith("us, - / - of a copy (not checked)") and row.cells["forward share"] is None
    of = {"operation": "wkv4", "backend": "torch", "dtype": "bf16"}
    near = of | {"near": True, "good": False, "error": "off: 0.02 > 0.01, y"}
    (row,) = timed("wkv4", "torch", backend, "1x9x4", "bf16", TOYS, {"correctness": [near]}, told=True)
    assert row.found.endswith("of a copy (off: 0.02 > 0.01, y)") and row.cells["forward us"] > 0
    far = near | {"near": False}
    (row,) = timed("wkv4", "torch", backend, "1x9x4", "bf16", TOYS, {"correctness": [far]}, told=True)
    assert row.found == "refused"


def test_a_failed_copy_does_not_spoil_the_report_for_plan(tmp_path):
    report = {"machine": {"gpu": "Card"}, "results": {"sections": {"limits": [{"what": "a copy", "failed": "x"}]}}}
    (tmp_path / "f.json").write_text(json.dumps(report))
    assert read_report(tmp_path / "f.json") == {"gpu": "Card", "bandwidth": None, "speed": None, "steps": []}


# ---- what is checked


def test_the_kernels_of_training_are_among_those_that_are_checked():
    """Several channels or rows a thread, and several tiles in one stretch: sizes pick them."""

    def drawn(operator):
        return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in OPERATORS[operator].large]

    (k,) = drawn("wkv4")
    plan = wkv4_cuda._Work.plan(k, "auto")
    assert plan.stretches == 1 and k.shape[1] > 2 * plan.rows * plan.S and k.shape[2] % 2 == 0
    rows = {wkv7_cuda.Variant.of(r.unflatten(-1, (-1, 64))).rows for r in drawn("wkv7")}
    assert 2 in rows


def test_rows_name_the_kernels_that_ran(on_cpu):
    with launches() as ran:
        Case.draw("wkv4", (2, 40, 6), torch.bfloat16, "cpu", resets=True).results(wkv4_cuda.wkv4)
    assert "wkv4 backward=False dtype=bf16 vector=2 32x8: forward" in ran
    assert "wkv4 backward=True dtype=bf16 vector=1 32x8: backward" in ran and len(set(ran)) == len(ran)


@pytest.mark.parametrize("name", elementwise_cases.CASES)
def test_a_wrong_operation_between_products_is_found(name, monkeypatch):
    assert elementwise_cases.check(name, "fp32", "cpu").good
    module = next(m for m in (elementwise, elementwise7) if hasattr(m, name))
    right, calls = getattr(module, name), []

    def wrong(*inputs, **more):
        out = right(*inputs, **more)
        calls.append(1)
        scale = 1 if len(calls) % 2 else 1.01  # the specification comes first
        return tuple(x * scale for x in out) if isinstance(out, tuple) else out * scale

    monkeypatch.setattr(module, name, wrong)
    assert not elementwise_cases.check(name, "fp32", "cpu").good


def test_the_sanitizer_says_how_many_errors_it_found(tmp_path, monkeypatch, capfd):
    for status in (0, 9):
        program = tmp_path / "compute-sanitizer"
        program.write_text(f"#!/bin/sh\necho $1\necho '========= ERROR SUMMARY: {status} errors'\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        (row,) = gpu_programs._sanitizer("racecheck", "cuda")
        assert (row.found, row.good) == (f"ERROR SUMMARY: {status} errors", status == 0)
        assert "--tool=racecheck" in capfd.readouterr().err


def test_each_kernel_has_a_small_call_for_the_sanitizer():
    gpu_programs.small("cpu")


def test_every_way_of_generating_is_timed_and_checked(monkeypatch):
    monkeypatch.setattr(lanes, "recorder", lambda device: lambda call: call)  # as on a GPU; a replay is a call
    results = {"limits": [{"limit": gpu_kernels.COPY, "found": 1e9}]}
    (job, *_) = gpu_generation.generation(TOYS, results)
    rows = list(job.run())
    assert [row.cells["launched"] for row in rows] == list(gpu_generation.WAYS) and all(row.good for row in rows)
    assert all(row.cells["tokens/s"] > 0 and row.cells["of a copy"] > 0 for row in rows)
