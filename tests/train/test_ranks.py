"""Several ranks are one: DDP, FSDP and DeepSpeed on two CPU processes, their gradients, checkpoints and signals."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import assert_close_rel
from runs import config_of, metrics, model_of, weights

from rwkv_train.checkpoints.run_checkpoint import checkpoint_folder, verify
from rwkv_train.config import DataConfig, FitConfig, OptimConfig, TrainConfig
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.train.callbacks import SIGNALS
from rwkv_train.train.fit import fit

ROOT = Path(__file__).parents[2]
TRAIN = TrainConfig(steps=8, accumulate=2, val_every=3, save_every=4, log_every=1, device="cpu")
PLAIN = model_of()  # without dropout, whose draws depend on the ranks
# A large eps, since AdamW with a small one takes the same steps if all gradients are twice as large; the first gradient
# is clipped and the others are not.
OPTIM = OptimConfig(lr=0.1, warmup=2, weight_decay=0.01, eps=1.0, clip=5.0)


def quiet_environment(**more) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD", "MASTER", "NODE_RANK", "GROUP", "TORCHELASTIC")
    return {k: v for k, v in os.environ.items() if not k.startswith(names)} | {"OMP_NUM_THREADS": "1"} | more


def on_ranks(config: FitConfig, folder: Path, *argv: str, ranks: int = 2, **environment) -> None:
    """`fit` in as many processes, as torchrun starts them on each node."""
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(asdict(config)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), "tests/tools/ranks.py", "fit", "--config", str(file), *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=quiet_environment(PYTHONPATH=str(ROOT), **environment),
    )
    assert done.returncode == 0, done.stderr[-5000:]


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def single_of(store, tmp_path_factory):
    """single_of(generation): the same run in one process."""

    @functools.cache
    def run(generation):
        runs = tmp_path_factory.mktemp("single")
        assert fit(config_of(store, runs, model=model_of(generation), optim=OPTIM, train=TRAIN)) == 0
        return runs / "run"

    return run


@pytest.fixture
def single(single_of):
    return single_of("rwkv4")


DEEPSPEED = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload")]
STRATEGIES = [("rwkv4", s) for s in ("ddp", "fsdp", *DEEPSPEED)]
STRATEGIES += [("rwkv7", s) for s in ("ddp", "fsdp", "deepspeed_stage_3")]


@pytest.mark.parametrize(("generation", "strategy"), STRATEGIES)
def test_two_ranks_are_one_and_go_on_from_their_checkpoint(single_of, store, tmp_path, generation, strategy):
    """With a horizon of two chunks, accumulation, clipping, uneven masks."""
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    train = replace(TRAIN, devices=2, strategy=strategy)
    config = config_of(store, tmp_path, model=model_of(generation), optim=OPTIM, train=train)
    single = single_of(generation)
    on_ranks(config, tmp_path)
    run = tmp_path / "run"
    whole = weights(run)
    assert_close_rel(flat(whole), flat(weights(single)), 1e-6)
    for key in ("loss", "grad_norm"):
        ours, theirs = ([r[key] for r in metrics(folder) if key in r] for folder in (run, single))
        assert ours == pytest.approx(theirs, rel=2e-6), key
    assert verify(checkpoint_folder(run, 4)) is None
    shutil.rmtree(checkpoint_folder(run, 8))
    on_ranks(config, tmp_path, "--resume")
    again = weights(run)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_two_ranks_that_gather_16_bits_are_one_within_their_rounding(store, tmp_path):
    train = replace(TRAIN, steps=3, precision="bf16", checkpoint_blocks=True)
    found = {}
    for ranks, strategy in ((1, "auto"), (2, "fsdp")):
        config = config_of(store, tmp_path / strategy, model=model_of("rwkv7"), optim=OPTIM)
        config = replace(config, data=replace(config.data, chunk_len=32, horizon=1))
        (tmp_path / strategy).mkdir()
        on_ranks(replace(config, train=replace(train, devices=ranks, strategy=strategy)), tmp_path, ranks=ranks)
        run = tmp_path / strategy / "run"
        found[ranks] = [r[key] for r in metrics(run) for key in ("loss", "val_loss", "grad_norm") if key in r]
    assert len(found[1]) > 6 and found[2] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_with_all_lanes_goes_on_as_two_with_half_of_them(single, store, tmp_path, strategy):
    shutil.copytree(single, tmp_path / "run")
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 8))
    train = replace(TRAIN, devices=2, strategy=strategy)
    on_ranks(config_of(store, tmp_path, model=PLAIN, optim=OPTIM, train=train), tmp_path, "--resume")
    assert_close_rel(flat(weights(tmp_path / "run")), flat(weights(single)), 1e-6)


def test_however_a_step_is_split_its_gradient_is_the_mean_over_its_trained_tokens(tmp_path):
    """1 process x accumulate 4 = 2 processes x accumulate 2 = one big batch, on very uneven masks."""
    pairs = [{"prompt": "p" * n, "completion": "c" * (15 - n)} for n in [1, 14, 13, 7, 14, 14, 2, 14] * 8]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    prepare(PrepareConfig([str(tmp_path / "pairs.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    found = {}
    for name, ranks, accumulate in (("four", 1, 4), ("two", 2, 2), ("one", 1, 1)):
        data = DataConfig(path=str(tmp_path / "store"), lanes=4, chunk_len=64 // accumulate, val_share=0)
        train = TrainConfig(steps=1, accumulate=accumulate, devices=ranks, device="cpu")
        config = FitConfig(name, PLAIN, data, train, runs=str(tmp_path), optim=OptimConfig(lr=1e-3, z_loss=0.0))
        path = tmp_path / f"{name}.gradients"
        on_ranks(config, tmp_path, ranks=ranks, GRADIENTS=str(path))
        found[name] = torch.load(path, weights_only=True)
    assert flat(found["one"]).norm() > 0.1
    for name, gradient in found["one"].items():
        assert_close_rel(found["four"][name], gradient, 1e-6, name)
        assert_close_rel(found["two"][name], gradient, 1e-6, name)


@pytest.mark.parametrize(("hit", "sent"), [("first", "SIGTERM"), ("second", "SIGHUP"), ("both", "SIGHUP")])
def test_a_signal_to_any_rank_ends_all_of_them_saved(store, tmp_path, heard_signals, hit, sent):
    """The first rank starts the second one by itself, as `fit` does without torchrun."""
    config = config_of(store, tmp_path, model=PLAIN, train=replace(TRAIN, steps=100_000, devices=2, save_every=10**6))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asdict(config)))
    argv = [sys.executable, "train.py", "fit", "--config", str(tmp_path / "run.yaml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=ROOT, env=quiet_environment(), **pipes) as first:
        for line in first.stderr:
            if line.startswith("step 3/"):  # validation: training has begun
                break
        second = [p for p in psutil.Process(first.pid).children() if "train.py" in " ".join(p.cmdline())]
        assert len(second) == 1
        for process in {"first": [first], "second": second, "both": [first, *second]}[hit]:
            process.send_signal(signal.Signals[sent])
        out, _ = first.communicate(timeout=120)
    known = "SIGTERM" if hit == "second" else sent  # which signal came to another rank is not known
    assert first.returncode == SIGNALS[signal.Signals[known]]
    for _ in range(100):
        if not second[0].is_running() or second[0].status() == psutil.STATUS_ZOMBIE:  # which nobody asked about
            break
        with suppress(psutil.TimeoutExpired):
            second[0].wait(1)
    else:
        pytest.fail("the second rank goes on alone")
    step = int(out.split("Stopped at step ")[1].split()[0])
    assert verify(checkpoint_folder(tmp_path / "run", step)) is None
