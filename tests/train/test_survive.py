"""Runs that survive: kills, full disks, damaged files, numbers that are none; and what is told about them."""

import json
import re
import resource
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import hurt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kill_fit import kill
from runs import config_of, losses_of, metrics, weights

from rwkv_train import cli, load_model
from rwkv_train.checkpoints.run_checkpoint import checkpoint_folder, run_checkpoints, verify
from rwkv_train.config import LogConfig, TrainConfig
from rwkv_train.train import module
from rwkv_train.train.fit import fit

TRAIN = TrainConfig(steps=8, accumulate=2, val_every=3, save_every=5, log_every=1, device="cpu")


def same(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_killed_at_random_moments_a_run_ends_as_if_left_alone(store, tmp_path):
    """The short version of kill_fit.py."""
    shutil.copytree(store, tmp_path / "store")
    kill(tmp_path, kills=2, steps=20)


def test_a_run_killed_before_its_first_checkpoint_begins_again(finished, store, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert fit(config_of(store, tmp_path), resume="newest") == 0
    same(tmp_path / "run", finished)
    assert losses_of(tmp_path / "run") == losses_of(finished)
    assert [r["step"] for r in metrics(tmp_path / "run") if "val_loss" in r] == [0, 3, 6, 8]


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(finished, store, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    newest = checkpoint_folder(tmp_path / "run", 8) / "trainer.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"trainer\.ckpt is not what was written"):
        fit(config_of(store, tmp_path), resume=str(newest))
    assert fit(config_of(store, tmp_path), resume="newest") == 0
    assert "step=00000008 is damaged" in capsys.readouterr().err
    same(tmp_path / "run", finished)


def test_asynchronous_checkpoints_are_the_same(finished, store, tmp_path):
    assert fit(config_of(store, tmp_path, train=replace(TRAIN, save_async=True, save_every=1, keep=9))) == 0
    run = tmp_path / "run"
    assert [verify(path) for path in run_checkpoints(run)] == [None] * 8
    same(run, finished)
    half = [load_model(checkpoint_folder(r, 5)).state_dict() for r in (run, finished)]
    assert all(torch.equal(half[0][k], half[1][k]) for k in half[1])


def test_the_best_checkpoint_is_kept(store, tmp_path):
    train = replace(TRAIN, steps=6, val_every=1, keep=1, keep_best=1)
    config = config_of(store, tmp_path, train=train)
    assert fit(replace(config, optim=replace(config.optim, lr=0.3))) == 0  # so large that the loss also rises
    scores = {r["step"]: r["val_loss"] for r in metrics(tmp_path / "run") if r.get("val_loss") and r["step"]}
    best = min(scores, key=scores.get)
    assert best < 6 and [p.name for p in run_checkpoints(tmp_path / "run")] == [f"step={n:08d}" for n in (best, 6)]
    assert fit(config, resume=str(checkpoint_folder(tmp_path / "run", best))) == 0


def test_a_full_disk_ends_a_run_with_one_line_and_its_checkpoints_intact(store, tmp_path):
    config = config_of(store, tmp_path, train=replace(TRAIN, save_every=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = []

    def fill_the_disk(self, *args):
        if self.batches_done == 8:
            largest.append((checkpoint_folder(tmp_path / "run", 2) / "trainer.ckpt").stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest[0] // 2, hard))
        return step(self, *args)

    step = module.OnlineTrainingModule.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.OnlineTrainingModule, "training_step", fill_the_disk)
        try:
            with pytest.raises(OSError, match=r"step 6 could not be saved .*make room.*--resume") as caught:
                fit(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    run = tmp_path / "run"
    assert {p.name: verify(p) for p in run_checkpoints(run)} == {"step=00000002": None, "step=00000004": None}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step=00000002", "step=00000004"]
    assert fit(config, resume="newest") == 0


def test_a_folder_that_cannot_be_written_and_data_that_is_gone(finished, store, tmp_path):
    config = config_of(store, tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 8))
    (tmp_path / "run" / "checkpoints" / ".step=00000008.tmp").write_text("in the way")
    with pytest.raises(OSError, match="step 8 could not be saved"):
        fit(config, resume="newest")
    gone = replace(config, data=replace(config.data, path=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="gone"):
        fit(gone, resume="newest")
    assert verify(checkpoint_folder(tmp_path / "run", 5)) is None


def breaks_at(batches):
    """A loss that is no number in some batches."""
    real = module.chunked_loss

    def loss(*args, **kwargs):
        total, tokens, state = real(*args, **kwargs)
        loss.calls += 1
        return total * (torch.nan if loss.calls in batches else 1.0), tokens, state

    loss.calls = 0
    return loss


def test_steps_without_a_finite_gradient_change_nothing_and_are_counted(store, tmp_path, monkeypatch):
    """A run of two steps whose second breaks ends with the weights of the first; the next good one goes on."""
    config = config_of(store, tmp_path, train=replace(TRAIN, steps=4, save_every=1, keep=9))
    monkeypatch.setattr(module, "chunked_loss", breaks_at({4}))
    assert fit(config) == 0
    run = tmp_path / "run"
    first, second, third = (load_model(checkpoint_folder(run, n)).state_dict() for n in (1, 2, 3))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(second[k], third[k]) for k in first)
    records = [r for r in metrics(run) if "loss" in r]
    assert [r["skipped"] for r in records] == [0, 1, 1, 1]
    assert all(isinstance(r["loss"], float) for r in records) and records[1]["grad_norm"] == "nan"


def test_too_many_of_them_end_the_run_and_name_the_documents(store, tmp_path, monkeypatch, capsys):
    config = config_of(store, tmp_path, train=replace(TRAIN, max_skips=3, save_every=1, keep=9))
    monkeypatch.setattr(module, "chunked_loss", breaks_at({4, 7, 8, 9, 11, 12}))
    with pytest.raises(ValueError, match=r"3 steps in a row.*step 6, with documents .*inspect --run \S+ --step 6") as e:
        fit(config)
    run = tmp_path / "run"
    assert [verify(p) for p in run_checkpoints(run)] == [None] * 5
    named = {int(n) for n in re.search(r"documents ([\d, ]+)", str(e.value))[1].rstrip(", ").split(", ")}
    with pytest.raises(SystemExit, match="0"):
        cli.main(["inspect", "--run", str(run), "--step=6"])
    shown = capsys.readouterr().out.split("batch 2, ", 1)[1]
    assert named == {int(n) for n in re.findall(r"document (\d+),", "batch 2, " + shown)}


def test_inspect_prints_the_batch_that_was_trained(finished, store, tmp_path, monkeypatch, capsys):
    seen = []
    real = module.chunked_loss

    def spy(model, tokens, targets, *args, **kwargs):
        seen.append((targets != -100).sum().item())
        return real(model, tokens, targets, *args, **kwargs)

    monkeypatch.setattr(module, "chunked_loss", spy)
    fit(config_of(store, tmp_path))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["inspect", "--run", str(tmp_path / "run"), "--step=4"])
    lines = capsys.readouterr().out.split("step 4 trains ")[1].splitlines()
    assert int(lines[0].split()[0]) == sum(seen[6:8])
    for n in (1, 2):
        trained = [int(re.search(r"(\d+) trained", line)[1]) for line in lines[1:] if line.startswith(f"batch {n}, ")]
        assert sum(trained) == seen[5 + n]
    with pytest.raises(SystemExit, match="1"):
        cli.main(["inspect", "--run", str(tmp_path / "run"), "--step=9"])
    assert "steps 1 to 8" in capsys.readouterr().err


def test_a_report_needs_nothing_else_and_works_on_an_unfinished_run(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run <1>")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "run &lt;1&gt;" in page and "step=00000008" in page and "weight_decay" in page and "Samples" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/png") == len(list((run / "report").glob("*.png"))) == 7
    (run / "metrics.jsonl").write_text('{"step": 3, "val_loss": "nan"}\n')
    (run / "samples.jsonl").write_text('{"prompt": "a", "text": "b\u2028c"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "none is a number" in page and "b\u2028c" in page
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(run)])
    with pytest.raises(SystemExit, match="1"):
        cli.main(["report", str(tmp_path)])
    assert "no run" in capsys.readouterr().err


def test_wandb_offline_is_read_back_and_a_resumed_run_keeps_its_id(store, tmp_path, monkeypatch):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = config_of(store, tmp_path, log=LogConfig(wandb="offline"), train=replace(TRAIN, steps=4, save_every=2))
    assert fit(config) == 0
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 4))
    assert fit(config, resume="newest") == 0
    wandb.teardown()  # its own process writes the files
    ids, logged = set(), {}
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for content in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name, value in items.items():
                logged.setdefault(name, []).append(json.loads(value))
    assert ids == {(tmp_path / "run" / "wandb-id").read_text()}
    want = [r["loss"] for r in metrics(tmp_path / "run") if "loss" in r]
    assert logged["loss"] == pytest.approx(want + want[2:])
    assert {"perplexity", "lr", "grad_norm", "tokens_per_s", "memory_mb", "val_loss"} <= logged.keys()
    tables = [str(value) for name, value in logged.items() if "by_position" in name or name.startswith("samples")]
    assert len(tables) >= 2 and any("table" in t for t in tables)


def log_records(raw: bytes):
    """The records of a file in LevelDB's log format, which follows seven bytes of wandb's own."""
    whole, place = b"", 7
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_one_clear_line(finished, store, tmp_path, capsys, data):
    """Whatever is damaged: a run that is told of it, or one that is not touched by it; never a traceback."""
    shutil.rmtree(tmp_path, ignore_errors=True)
    shutil.copytree(store, tmp_path / "store")
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 8))
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["runs"], config["data"]["path"] = str(tmp_path), str(tmp_path / "store")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"prompt": "two", "completion": "three"}\n')
    trained = ["tokens.bin", "tokens.idx", "tokens.mask", "tokens.crc", "manifest.json", "tokenizer.json"]
    files = [f"store/{name}" for name in trained] + ["run/checkpoints/step=00000005/trainer.ckpt"]
    name = data.draw(st.sampled_from([*files, "config.yaml", "text.jsonl"]))
    others = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p != tmp_path / name}
    hurt(tmp_path / name, data)
    if name == "text.jsonl":
        argv = ["prepare", str(tmp_path / name), "--tokenizer=bytes", "--out", str(tmp_path / "new")]
    else:
        argv = ["fit", "--config", str(tmp_path / "config.yaml"), "--resume"]
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    err = capsys.readouterr().err
    if ended.value.code:
        (line,) = [line for line in err.splitlines() if line.startswith("train.py ")]
        assert len(line) < 600 and "Traceback" not in err
        assert {p: p.read_bytes() for p in others if "checkpoints" in str(p)} == {
            p: content for p, content in others.items() if "checkpoints" in str(p)
        }
    elif name in files:
        # Harmless: the whole run is what it would have been. (Settings and texts may well say something else now.)
        same(tmp_path / "run", finished)
