"""Whole runs on small models: the loss falls, resumed = uninterrupted, two processes = one, settings that clash."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import assert_close_rel
from runs import config_of, losses_of, metrics, model_of, weights

from rwkv_train.cli import main, parse
from rwkv_train.config import DataConfig, LogConfig, ModelConfig, TrainConfig
from rwkv_train.data.lanes import LaneBatches
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.train.fit import fit

ROOT = Path(__file__).parents[2]


def test_a_run_learns_and_leaves_what_it_promises(finished_of, generation):
    finished = finished_of(generation)
    records = metrics(finished)
    train = [r for r in records if "loss" in r]
    val = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in train] == list(range(1, 9))
    assert [r["step"] for r in val] == [0, 3, 6, 8]
    assert val[-1]["val_loss"] < val[0]["val_loss"] - 0.5
    assert val[0]["val_by_position"][0][0] == 0
    assert train[-1]["tokens"] == 8 * 2 * 4 * 32
    assert {"perplexity", "lr", "grad_norm", "tokens_per_s", "memory_mb", "data_wait", "eta_s"} <= train[0].keys()
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step=00000005", "step=00000008"]
    assert yaml.safe_load((finished / "config.yaml").read_text())["data"]["horizon"] == 2
    assert (finished / "tokenizer.json").is_file()


def test_a_second_run_of_the_same_name_gets_a_number(store, tmp_path):
    small = TrainConfig(steps=1, device="cpu")
    for _ in range(2):
        fit(config_of(store, tmp_path, train=small))
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run-2"}
    config, _ = parse("fit", ["--config", str(tmp_path / "run-2" / "config.yaml"), "--resume"])
    assert config == config_of(store, tmp_path, train=small, name="run-2")


def test_steps_without_a_trained_token_have_no_loss(tmp_path, capsys):
    """The prompts fill the first step; what is held out is what the run is scored on later."""
    lines = [json.dumps({"prompt": "long " * 20, "completion": "yes"}) for _ in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    prepare(PrepareConfig([str(tmp_path / "pairs.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    config = config_of(tmp_path / "store", tmp_path, train=TrainConfig(steps=1, log_every=1, device="cpu"))
    fit(replace(config, data=replace(config.data, lanes=1, val_share=0.8)))
    (record,) = [r for r in metrics(tmp_path / "run") if "loss" in r]
    out, err = capsys.readouterr()
    assert record["loss"] == record["perplexity"] == "nan" and "no loss: nothing was trained" in err
    assert "data.val_share 0.8 holds out 24 of 32 trained tokens, 75%; 8 (25%) are left to train on" in out
    with pytest.raises(SystemExit, match="0"):
        main(["validate", "--model", str(tmp_path / "run")])
    assert "24 tokens scored" in capsys.readouterr().out
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "val_loss": 1.0, "val_tokens": 7}\n')
    with pytest.raises(SystemExit, match="1"):
        main(["validate", "--model", str(tmp_path / "run")])
    assert "scored 7 tokens while it trained, and would score 24 now" in capsys.readouterr().err


def test_interrupted_and_resumed_is_uninterrupted(
    finished_of, store, tmp_path, monkeypatch, capsys, generation, heard_signals
):
    """To the bit: with dropout, accumulation, weight decay, in mid-document, and after Ctrl-C in mid-step."""
    finished = finished_of(generation)
    read = LaneBatches.__getitem__

    def read_and_interrupt(self, n):
        if n == 6 and self.accumulate == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, n)

    config = config_of(store, tmp_path, generation)
    with monkeypatch.context() as m:
        m.setattr(LaneBatches, "__getitem__", read_and_interrupt)
        assert fit(config) == 130
    assert "Saved. Continue with" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = tmp_path / "run"
    assert metrics(run)[-1]["step"] == 4
    assert fit(config, resume="newest") == 0
    ours, theirs = weights(run), weights(finished)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert losses_of(run) == losses_of(finished)


def test_resuming_from_an_older_checkpoint_repeats_what_came_after(finished, store, tmp_path):
    """As after a crash; metrics.jsonl tells each step once."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints" / "step=00000008")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a line that was being written
    assert fit(config_of(store, tmp_path), resume="newest") == 0
    assert losses_of(copy) == losses_of(finished)
    ours, theirs = weights(copy), weights(finished)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_resuming_with_other_batches_is_refused(finished, store, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = config_of(store, tmp_path)
    with pytest.raises(ValueError, match=r"data\.lanes is 2, and was 4"):
        fit(replace(config, data=replace(config.data, lanes=2)), resume="newest")


def test_two_processes_are_one(store, tmp_path, generation):
    """Uneven masks, accumulation: two ranks' gradients are the mean over all trained tokens of the step."""
    config = config_of(store, tmp_path, model=model_of(generation))
    assert fit(config) == 0
    two = replace(config, name="two", train=replace(config.train, devices=2))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(asdict(two)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_RANK", "WORLD"))}
    done = subprocess.run(
        [sys.executable, "train.py", "fit", "--config", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "run")
    for name, w in theirs.items():
        assert_close_rel(ours[name], w, 1e-4, name)
    losses = [[loss for _, loss in losses_of(tmp_path / name)] for name in ("two", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_precision_and_checkpoint_blocks_change_the_figures_little(finished_of, store, tmp_path, generation):
    want = [loss for _, loss in losses_of(finished_of(generation))]
    base = TrainConfig(steps=8, accumulate=2, log_every=1, device="cpu")
    fit(config_of(store, tmp_path, generation, train=replace(base, checkpoint_blocks=True)))
    assert [loss for _, loss in losses_of(tmp_path / "run")] == pytest.approx(want, rel=1e-4)
    fit(config_of(store, tmp_path, generation, name="bf16", train=replace(base, precision="bf16")))
    assert [loss for _, loss in losses_of(tmp_path / "bf16")] == pytest.approx(want, rel=5e-2)


def test_tensorboard_and_wandb_write_offline(store, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    log = LogConfig(tensorboard=True, wandb="offline")
    assert fit(config_of(store, tmp_path, log=log, train=TrainConfig(steps=2, log_every=1, device="cpu"))) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_continue_from_a_checkpoint(finished, store, tmp_path):
    """model.init takes a run; its loss goes on from where it was."""
    model = ModelConfig(init=str(finished))
    fit(config_of(store, tmp_path, model=model, train=TrainConfig(steps=1, device="cpu")))
    end = [r["val_loss"] for r in metrics(finished) if "val_loss" in r][-1]
    assert metrics(tmp_path / "run")[0]["val_loss"] == pytest.approx(end, rel=1e-6)


def test_settings_that_clash_are_refused_before_anything_is_written(store, tmp_path):
    for kwargs, message in [
        ({"data": DataConfig(path=str(tmp_path / "nothing"))}, "nothing"),
        ({"model": ModelConfig(n_layer=1, n_embd=8, vocab_size=100)}, "257 tokens and the model only 100"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(config_of(store, tmp_path / "runs", **kwargs))
    with pytest.raises(ValueError, match="no run to resume"):
        fit(config_of(store, tmp_path / "runs"), resume="newest")
    with pytest.raises(ValueError, match=r"data\.lanes \(4\) must be a multiple of train\.devices \(3\)"):
        config_of(store, tmp_path, train=TrainConfig(steps=1, devices=3))
    with pytest.raises(ValueError, match=r"model\.init .* and model\.n_layer contradict"):
        ModelConfig(init="x.pth", n_layer=2)
    for clash in ({"architecture": "rwkv7", "n_att": 8}, {"head_size": 8}):
        with pytest.raises(ValueError, match=rf"model\.architecture and model\.{[*clash][-1]} contradict"):
            ModelConfig(n_layer=1, n_embd=16, **clash)
    with pytest.raises(ValueError, match=r"exactly one of train\.steps and train\.epochs, found both"):
        TrainConfig(steps=1, epochs=1.0)
    assert not (tmp_path / "runs").exists()
