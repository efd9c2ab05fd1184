"""Checkpoints of a run: whole or not there, damage is found, and the one before is used."""

import math
import os
import shutil

import pytest
import torch
from helpers import hurt, random_model, save_point
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_train import load_model
from rwkv_train.checkpoints.run_checkpoint import (
    checkpoint_folder,
    commit,
    draft,
    is_best,
    newest_sound,
    prune,
    run_checkpoints,
    verify,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints of different weights."""
    folder = tmp_path_factory.mktemp("run") / "run"
    for step in (5, 10):
        save_point(folder, step, random_model(seed=step), val_loss=float(step))
    return folder


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, capsys, data):
    copy = tmp_path / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    file = data.draw(st.sampled_from(["trainer.ckpt", "manifest.json"]))
    hurt(checkpoint_folder(copy, 10) / file, data)
    # A change to the manifest's layout, or to a fact beside the files, leaves the weights as they were.
    used = 5 if verify(checkpoint_folder(copy, 10)) else 10
    assert used == 5 or file == "manifest.json"
    capsys.readouterr()  # of the example before
    assert newest_sound(copy) == checkpoint_folder(copy, used)
    assert ("step=00000010 is damaged" in capsys.readouterr().err) == (used == 5)
    ours, theirs = load_model(copy).state_dict(), random_model(seed=used).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_no_sound_checkpoint_is_a_clear_error(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for path in run_checkpoints(copy):
        (path / "trainer.ckpt").write_bytes(b"")
    assert newest_sound(copy) is None and newest_sound(tmp_path / "nothing") is None
    with pytest.raises(ValueError, match="holds no model"):
        load_model(copy)


def test_only_finished_checkpoints_count(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(checkpoint_folder(copy, 10), draft(checkpoint_folder(copy, 20)))  # killed before its name was given
    for other in ("step=x", "last", "step=30.ckpt"):
        (copy / "checkpoints" / other).mkdir()
    (copy / "checkpoints" / "step=00000040").write_bytes(b"junk")
    assert [p.name for p in run_checkpoints(copy)] == ["step=00000005", "step=00000010"]


def test_the_newest_and_the_best_are_kept(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for step, score in ((15, 7.0), (20, 6.0), (25, None)):
        save_point(copy, step, random_model(), val_loss=score)
    save_point(copy, 12, random_model(), val_loss=math.nan)
    assert not is_best(copy, math.nan, 9)
    assert is_best(copy, 6.5, 3) and not is_best(copy, 6.5, 2) and not is_best(copy, 0.0, 0)
    prune(copy, keep=1, best=2)
    assert [p.name[-2:] for p in run_checkpoints(copy)] == ["05", "20", "25"]


def test_a_checkpoint_of_the_same_step_is_replaced_as_a_whole(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    save_point(copy, 10, random_model(seed=3))
    ours, theirs = load_model(copy).state_dict(), random_model(seed=3).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert sorted(os.listdir(copy / "checkpoints")) == ["step=00000005", "step=00000010"]


def test_folders_in_a_checkpoint_count_too(tmp_path):
    target = checkpoint_folder(tmp_path, 1)
    (draft(target) / "trainer.ckpt" / "checkpoint").mkdir(parents=True)
    (draft(target) / "trainer.ckpt" / "checkpoint" / "shard").write_bytes(b"1")
    commit(target)
    assert verify(target) is None
    (target / "trainer.ckpt" / "checkpoint" / "shard").write_bytes(b"2")
    assert verify(target) == "trainer.ckpt/checkpoint/shard is not what was written"
