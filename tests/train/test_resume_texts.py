"""What a run goes on from: the same text, a checkpoint of its own, also one of before; and one writer at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from runs import config_of, losses_of, store_in

from rwkv_train.checkpoints.run_checkpoint import FACTS, checkpoint_folder, commit, draft
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.data.store import Store
from rwkv_train.train.fit import fit
from rwkv_train.train.runlog import only_writer


@pytest.fixture
def run(finished, tmp_path):
    """As it was at step 5 of 8."""
    copy = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(checkpoint_folder(copy, 8))
    return copy


def make_old(checkpoint: Path) -> None:
    """As it was written before checkpoints kept settings and texts."""
    facts = json.loads((checkpoint / "manifest.json").read_text())
    shutil.copytree(checkpoint, draft(checkpoint))
    (draft(checkpoint) / FACTS).unlink()
    (draft(checkpoint) / "manifest.json").unlink()
    commit(checkpoint, step=facts["step"], val_loss=facts["val_loss"])


def test_the_same_text_in_another_place_is_taken(run, finished, store, tmp_path, capsys):
    config = config_of(store, tmp_path)
    again = store_in(tmp_path / "again")
    assert fit(replace(config, data=replace(config.data, path=str(again))), resume="newest") == 0
    assert losses_of(run) == losses_of(finished)
    assert f"data.path: {store} -> {again}: the same text\n" in capsys.readouterr().out


def test_a_plain_binidx_with_another_token_is_refused(store, tmp_path):
    for name in ("a", "b"):
        for suffix in ("bin", "idx"):
            shutil.copy(store / f"tokens.{suffix}", tmp_path / f"{name}.{suffix}")
    config = config_of(tmp_path / "a", tmp_path)
    config = replace(config, data=replace(config.data, tokenizer="bytes"), train=replace(config.train, steps=2))
    assert fit(config) == 0
    moved = replace(config, data=replace(config.data, path=str(tmp_path / "b")))
    longer = replace(moved, train=replace(config.train, steps=3))
    assert fit(longer, resume="newest") == 0
    with open(tmp_path / "b.bin", "r+b") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"data\.path: .*b holds other text .* but other ones.*prepare it again"):
        fit(longer, resume="newest")
    told = replace(config, data=replace(config.data, path=str(store), tokenizer=None))
    with pytest.raises(ValueError, match="one is a store, the other a plain binidx"):
        fit(replace(told, train=longer.train), resume="newest")
    assert Store.open(tmp_path / "b").manifest is None


def test_other_text_for_validation_is_told(store, tmp_path, capsys):
    val = store_in(tmp_path / "val")
    config = config_of(store, tmp_path)
    config = replace(
        config, data=replace(config.data, val=str(val), val_share=0.0), train=replace(config.train, steps=1)
    )
    assert fit(config) == 0
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(lines.read_text().replace("three", "THREE"))
    prepare(PrepareConfig([str(lines)], str(val), tokenizer="bytes", overwrite=True))
    assert fit(replace(config, train=replace(config.train, steps=2)), resume="newest") == 0
    assert "losses of validation up to step 1 do not compare" in capsys.readouterr().out


def test_a_checkpoint_of_before_goes_on_and_what_cannot_be_compared_is_said(run, finished, store, tmp_path, capsys):
    make_old(checkpoint_folder(run, 5))
    assert fit(config_of(store, tmp_path), resume="newest") == 0
    assert "whether the text is the same is not known" in capsys.readouterr().out
    assert losses_of(run) == losses_of(finished)


def test_a_checkpoint_of_before_refuses_by_its_weights_and_the_runs_config(run, store, tmp_path):
    make_old(checkpoint_folder(run, 5))
    config = config_of(store, tmp_path)
    with pytest.raises(ValueError, match=r"model\.n_layer is 3, and was 2 when"):
        fit(replace(config, model=replace(config.model, n_layer=3)), resume="newest")
    with pytest.raises(ValueError, match=r"train\.accumulate is 1, and was 2 when"):
        fit(replace(config, train=replace(config.train, accumulate=1)), resume="newest")
    with pytest.raises(ValueError, match=r"resume it with auto once, and go on with fsdp"):
        fit(replace(config, train=replace(config.train, strategy="fsdp")), resume="newest")
    (run / "config.yaml").unlink()
    assert fit(config, resume="newest") == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["accumulate"] == 2


def test_the_checkpoint_of_another_run_is_refused(run, store, tmp_path):
    config = replace(config_of(store, tmp_path), name="other")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"is no checkpoint of .*other, the run that name and runs say; .*model\.init"):
        fit(config, resume=str(checkpoint_folder(run, 5)))


def test_a_run_has_one_writer(run, store, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with only_writer(run), pytest.raises(ValueError, match=r"the run .*run is in use by another process"):
        fit(config_of(store, tmp_path), resume="newest")
    assert before == {path: path.read_bytes() for path in before}
    holder = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder, str(run / "lock")], **pipes) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="in use by another process"):
            fit(config_of(store, tmp_path), resume="newest")
        os.kill(process.pid, signal.SIGKILL)
    assert (run / "lock").is_file()
    assert fit(config_of(store, tmp_path), resume="newest") == 0
