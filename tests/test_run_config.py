"""A run is opened from any folder, and from where it was moved together with its store."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import random_model, run
from runs import config_of, metrics

from rwkv_train import cli, save_model
from rwkv_train.config import ModelConfig, TrainConfig
from rwkv_train.run_config import found_paths, is_run_config
from rwkv_train.train.fit import fit
from rwkv_train.train.runlog import new_run


@pytest.fixture
def home(store, tmp_path, monkeypatch):
    """A folder "my work" with text/store and base.pth, and a run of two steps in runs/run that starts from these."""
    work = tmp_path / "my work"
    shutil.copytree(store, work / "text" / "store")
    save_model(random_model(vocab_size=257), work / "base.pth")
    monkeypatch.chdir(work)
    short = TrainConfig(steps=2, save_every=2, val_every=2, log_every=1, device="cpu")
    fit(config_of("text/store", "runs", train=short, model=ModelConfig(init="base.pth")))
    return work


def settings_from(folder: Path, monkeypatch, *argv):
    monkeypatch.chdir(folder)
    return cli.parse("fit", list(argv))[0]


def test_a_run_is_found_from_any_folder(home, tmp_path, monkeypatch, capsys):
    file = home / "runs" / "run" / "config.yaml"
    written = yaml.safe_load(file.read_text())
    assert [written["runs"], written["data"]["path"], written["model"]["init"]] == [
        str(home / name) for name in ("runs", "text/store", "base.pth")
    ]
    expected = settings_from(home, monkeypatch, "--config", str(file))
    for argv in (["--config", "my work/runs/run/config.yaml"], ["--config=my work/runs/run/config.yaml"]):
        found = settings_from(tmp_path, monkeypatch, *argv)
        assert Path(found.runs).absolute() == Path(expected.runs)
        assert (found.name, found.data, found.model) == (expected.name, expected.data, expected.model)
    inside = settings_from(file.parent, monkeypatch, "--config", "config.yaml", "--data.path=other")
    assert (inside.runs, inside.name, inside.data.path) == (str(home / "runs"), "run", "other")
    monkeypatch.chdir(tmp_path)
    assert run("validate", "--model", "my work/runs/run", capsys=capsys)[0] == 0
    assert run("inspect", "--run", "my work/runs/run", "--step=2", capsys=capsys)[0] == 0


@pytest.mark.parametrize("relative", [False, True], ids=["as written now", "as written before"])
def test_a_run_that_was_moved_with_its_store_goes_on(home, tmp_path, monkeypatch, capsys, relative):
    file = home / "runs" / "run" / "config.yaml"
    if relative:
        config = yaml.safe_load(file.read_text())
        config |= {"runs": "runs", "data": config["data"] | {"path": "text/store"}}
        config["model"]["init"] = "base.pth"
        file.write_text(yaml.safe_dump(config))
    moved = tmp_path / "else where"
    home.rename(moved)
    (moved / "runs" / "run").rename(moved / "runs" / "old one")
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "else where/runs/old one/config.yaml", "--resume", "--train.steps=2"]
    code, out, err = run("fit", *argv, capsys=capsys)
    assert code == 0, err
    assert out.startswith(f"{Path('else where/runs/old one')}: ")
    assert "--model 'else where/runs/old one'" in out  # what to do next, as a shell takes it
    assert len([r for r in metrics(moved / "runs" / "old one") if "loss" in r]) == 2
    assert os.listdir(moved / "runs") == ["old one"]


def test_what_is_not_found_is_told(home, tmp_path, capsys):
    file = home / "runs" / "run" / "config.yaml"
    assert is_run_config(file) and not is_run_config(home / "config.yaml")
    shutil.rmtree(home / "text")
    assert found_paths(file)["data.path"] == str(home / "text" / "store")
    assert f"{file}: data.path is not there: looked for {home / 'text' / 'store'}" in capsys.readouterr().err
    found_paths(file, given=("data.path",))
    assert capsys.readouterr().err == ""


def test_an_adapter_on_a_model_and_a_pair_of_files_are_paths_too(home, monkeypatch):
    save_model(random_model(vocab_size=257), home / "a.pth")
    shutil.copy(home / "text/store/tokens.bin", home / "pair.bin")
    shutil.copy(home / "text/store/tokens.idx", home / "pair.idx")
    file = home / "runs" / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text()) | {"runs": "runs"}
    config["data"] |= {"path": "pair", "tokenizer": "bytes"}
    config["model"]["init"] = "base.pth+a.pth"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.chdir("/")
    found = found_paths(file)
    assert found["data.path"] == str(home / "pair") and found["data.tokenizer"] == "bytes"
    assert found["model.init"] == f"{home / 'base.pth'}+{home / 'a.pth'}"


def test_a_folder_that_cannot_be_written_is_one_line(store, capsys, monkeypatch):
    monkeypatch.chdir("/proc")
    config = config_of(store, "runs", train=TrainConfig(steps=1, device="cpu"))
    with pytest.raises(ValueError, match=r"the run's folder runs/run cannot be made .*--runs"):
        fit(replace(config))
    for argv in (["prepare", __file__, "--tokenizer=bytes", "--out=o"], ["export", "--model", "m.pth", "--out=o.pth"]):
        code, _, err = run(*argv, capsys=capsys)
        assert code == 1 and len(err.strip().splitlines()) == 1


def test_runs_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=r"the folder .*runs cannot be made .*--runs"):
        new_run(str(tmp_path / "runs"), "run")


@pytest.mark.parametrize("content", ["", "- 1\n", "data: 3\n"])
def test_a_config_that_holds_no_settings_is_one_line(tmp_path, capsys, content):
    run_folder = tmp_path / "runs" / "e"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text(content)
    for argv in (["validate", "--model", run_folder], ["fit", "--config", run_folder / "config.yaml", "--resume"]):
        code, _, err = run(*argv, capsys=capsys)
        assert code and "config.yaml" in err and err.count("\n") == 1 and "Traceback" not in err
