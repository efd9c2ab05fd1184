"""A model that gives no finite number: every command says so in one line, with what helps, and none waits for ever."""

import io
import sys

import pytest
import torch
from helpers import random_model, run

from rwkv_train import load_model, save_model
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.feedback import Correction, Learner
from rwkv_train.models.finite import NotFinite, finite
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
WEIGHT = "blocks.0.att.key.weight"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """nan.pth; half.pth, whose activations pass float16; large.pth, a weight of which does."""
    monkeypatch.chdir(tmp_path)
    BYTES.save("tokenizer.json")
    (tmp_path / "template.yaml").write_text("{}\n")
    for name in ("nan", "half", "large"):
        model = random_model(vocab_size=257)
        weight = dict(model.named_parameters())[WEIGHT].data
        if name == "half":
            for part in (model.blocks[0].ln0, model.blocks[0].att.output, model.blocks[0].ffn.value):
                part.weight.data *= 6e4 / part.weight.abs().max()
        else:
            weight[0, 0] = {"nan": float("nan"), "large": 1e5}[name]
        save_model(model, f"{name}.pth", torch.float16 if name == "half" else None)


NAN = f"the model gives no finite number: its weight {WEIGHT} holds nan; use another copy"
HALF = "the model gives no finite number: its weights are finite, what it computes from them is not in float16"


@pytest.mark.parametrize(("name", "message"), [("nan", NAN), ("half", HALF)], ids=["nan", "half"])
def test_generate_and_validate_say_so(models, tmp_path, capsys, name, message):
    (tmp_path / "text.txt").write_text("some text, some more text\n")
    prepare(PrepareConfig(["text.txt"], "store", tokenizer="bytes"))
    commands = [["generate", "--tokens=5"], ["generate", "--tokens=5", "--temperature=0"]]
    for argv in [*commands, ["validate", "--data=store", "--lanes=1"]]:
        code, _, err = run(*argv, f"--model={name}.pth", capsys=capsys)
        assert code == 1 and message in err.splitlines()[-1]
        assert name == "nan" or "--dtype fp32 or bf16" in err
        if name == "half":
            code, _, err = run(*argv, f"--model={name}.pth", "--dtype=fp32", capsys=capsys)
            assert code == 0, err


def test_a_chat_says_so_for_every_line_and_comes_to_its_end(models, capsys, monkeypatch):
    for name, dtype, message in (("nan", "fp32", NAN), ("half", "fp16", HALF)):
        lines = "a\n/teach a? => b\n/history\n/teach c? => d\n" if dtype == "fp32" else "a\nb\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code, out, _ = run("chat", f"--model={name}.pth", "--folder=kept", f"--dtype={dtype}", capsys=capsys)
        blocks = out.split("\n\n")[:-1]
        assert code == 1 and len(blocks) == lines.count("\n") and message in blocks[0] and message in blocks[-1]
        if dtype == "fp32":
            assert f"2: a? => b (not learnt: {NAN}" in blocks[2]


def test_export_refuses_what_would_not_be_the_model(models, tmp_path, capsys):
    code, _, err = run("export", "--model=large.pth", "--out=out/x.pth", "--dtype=fp16", capsys=capsys)
    assert code == 1 and f"{WEIGHT} reaches 100,000, and float16 ends at 65,504; write the model as fp32 or bf16" in err
    code, _, err = run("export", "--model=nan.pth", "--out=out/x.pth", capsys=capsys)
    assert code == 1 and f"its weight {WEIGHT} holds nan" in err and not (tmp_path / "out").exists()
    assert run("export", "--model=large.pth", "--out=out/x.pth", "--dtype=bf16", capsys=capsys)[0] == 0
    code, _, err = run("generate", "--model=large.pth", "--dtype=fp16", capsys=capsys)
    assert code == 1 and f"its weight {WEIGHT} holds infinity in float16, which ends at 65,504" in err


def test_a_correction_of_such_a_model_is_recorded_as_not_learnt(models, tmp_path):
    with Learner(load_model("nan.pth"), BYTES, tmp_path / "profile") as learner:
        with pytest.raises(NotFinite, match="holds nan"):
            learner.learn(Correction("a?", "b"))
        assert learner.waiting() == learner.learnt() == [] and learner.model is learner.base


def test_large_numbers_are_numbers():
    model = random_model(dtype=torch.float16)
    for largest in (6e4, -6e4):
        predictions = torch.full((100,), largest, dtype=torch.float16)
        assert finite(predictions, model) is predictions
    wide = torch.full((100,), 1e38)  # whose sum is none
    assert finite(wide, model) is wide
    for wrong in ("nan", "inf", "-inf"):
        with pytest.raises(NotFinite):
            finite(torch.tensor([0.0, float(wrong)]), model)
    with pytest.raises(NotFinite):
        finite(torch.tensor([float("inf"), float("-inf")]), model)
