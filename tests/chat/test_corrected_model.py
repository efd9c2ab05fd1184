"""A corrected model, exported: it is the profile's, in any form."""

import pytest
import torch
from feedback_toys import BYTES, CONFIG, QUICK, rehearsal_set, small_model
from helpers import run

from rwkv_train import load_model, save_model
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.feedback import Learner


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(a folder with a model, and with what a profile of it has learnt; the corrected model)"""
    folder, model = tmp_path_factory.mktemp("taught"), small_model()
    save_model(model, folder / "model" / "model.pth")
    TextFormat(BYTES, Template()).save(folder / "model")
    profile = folder / "kept" / "profiles" / "mine"
    with Learner(model, BYTES, profile, config=CONFIG, rehearsal=rehearsal_set(model)) as learner:
        assert learner.learn(QUICK[0]).accepted
        return folder, learner.model


@pytest.mark.parametrize("out", ["corrected.pth", "corrected/"])
def test_an_exported_model_has_the_corrections(taught, tmp_path, capsys, out):
    folder, model = taught
    argv = [f"--model={folder / 'model'}", "--profile=mine", f"--folder={folder / 'kept'}", f"--out={tmp_path}/{out}"]
    code, _, err = run("export", *argv, capsys=capsys)
    assert code == 0 and not err, err
    found = load_model(tmp_path / out)
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    code, _, err = run("export", *argv, "--dtype=bf16", capsys=capsys)
    assert code == 0 and "bf16 rounds what they changed" in err


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--profile=nobodys"], "has no profile nobodys; there are: mine"),
        (["--profile=mine", "--adapter"], "give one"),
    ],
)
def test_what_there_is_not_is_told(taught, tmp_path, capsys, flags, why):
    folder, _ = taught
    argv = [f"--model={folder / 'model'}", f"--folder={folder / 'kept'}", f"--out={tmp_path / 'x.pth'}", *flags]
    code, _, err = run("export", *argv, capsys=capsys)
    assert code == 1 and why in err and not (tmp_path / "x.pth").exists()
