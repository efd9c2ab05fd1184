"""The command line: overview, help, one clear line for every mistake, and the short commands end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import random_model, run

from rwkv_train import cli, load_model, save_model

ROOT = Path(__file__).parent.parent


def test_overview_and_help(capsys):
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0 and all(name in out for name in cli.COMMANDS)
    assert run(capsys=capsys)[0] == 2
    code, _, err = run("fti", capsys=capsys)
    assert code == 2 and "'fti'" in err and "fit" in err
    code, out, _ = run("bench", "--help", capsys=capsys)
    assert code == 0 and "bench wkv" in out and "prepare" not in out
    code, _, err = run("bench", "fit", capsys=capsys)
    assert code == 2 and "'bench fit'" in err and "bench train" in err
    for name in cli.COMMANDS:
        code, out, _ = run(*name.split(), "--help", capsys=capsys)
        assert code == 0 and "--config" in out and "_" not in "".join(w for w in out.split() if w.startswith("--"))


def test_every_setting_is_explained(capsys):
    for name in cli.COMMANDS:
        out = run(*name.split(), "--help", capsys=capsys)[1]
        for flag in out.split("\n  --")[1:]:
            words = flag.split("(type")[0].split()
            assert len(words) > 2, f"{name} --{words[0]} has no explanation"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["fit", "--name=x", "--train.step=3"], 2, "train.step"),
        (["fit", "--name=x", "--train.steps=many"], 2, "train.steps"),
        (["fit", "--config=nothing.yaml"], 2, "nothing.yaml"),
        (["fit", "--name=x", "--data.path=d", "--train.steps=3"], 1, "model.init"),
        (["prepare", "nothing.txt", "--out=o"], 1, "nothing.txt"),
        (["prepare"], 2, "out"),
        (["generate", "--model=nothing.pth"], 1, "nothing.pth"),
        (["generate", "--model=nothing.pth", "--top-p=2"], 1, "top_p"),
        (["export", "--model=nothing.pth", "--out=x.pth", "--dtype=int8"], 2, "dtype"),
        (["validate", "--model=nothing.pth"], 1, "--data"),
    ],
)
def test_mistakes_get_one_line(argv, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(*argv, capsys=capsys)
    assert found == code and message in err, err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_config_files_and_flags(tmp_path):
    """Flags beat the file, in any order of keys; a contradiction between the two is told."""
    file = tmp_path / "a.yaml"
    file.write_text("name: a\ndata: {path: d}\nmodel: {n_layer: 1, n_embd: 8}\ntrain: {steps: 5}\n")
    config, _ = cli.parse("fit", ["--config", str(file), "--train.val-every=7", "--optim.schedule", "wsd"])
    assert (config.train.steps, config.train.val_every, config.optim.schedule) == (5, 7, "wsd")
    with pytest.raises(ValueError, match=r"train\.steps and train\.epochs, found both"):
        cli.parse("fit", ["--config", str(file), "--train.epochs=1"])


def test_settings_are_read_by_their_old_names_too(tmp_path, capsys):
    """In files, as flags and by plan; under both names they are refused."""
    file = tmp_path / "a.yaml"
    text = "name: a\ndata: {path: d}\nmodel: {n_layer: 1, n_embd: 8}\ntrain: {steps: 5, recompute: true}\n"
    file.write_text(text)
    for name in ("fit", "plan"):
        assert cli.parse(name, ["--config", str(file)])[0].train.checkpoint_blocks is True
        for flag in (["--train.recompute=false"], ["--train.recompute", "false"], ["--train.checkpoint-blocks=false"]):
            assert cli.parse(name, ["--config", str(file), *flag])[0].train.checkpoint_blocks is False
    with pytest.raises(ValueError, match=r"--train\.recompute is the old name of --train\.checkpoint_blocks"):
        cli.parse("fit", ["--train.recompute=false", "--train.checkpoint-blocks=true"])
    file.write_text(text.replace("recompute: true", "recompute: true, checkpoint_blocks: true"))
    with pytest.raises(SystemExit, match="2"):
        cli.parse("fit", ["--config", str(file)])
    assert "train.recompute is the old name of train.checkpoint_blocks" in capsys.readouterr().err


def test_installed_command_is_the_script():
    script = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert script.returncode == 0 and "fit" in script.stdout


@pytest.fixture
def model(tmp_path, monkeypatch, generation):
    monkeypatch.chdir(tmp_path)
    save_model(random_model(vocab_size=257, generation=generation), "model.pth")
    return "model.pth"


def test_generate_is_repeatable(model, capsys):
    argv = ["generate", "--model", model, "--tokenizer=bytes", "--prompt=a\\nb", "--tokens=20", "--seed=1"]
    first, second = run(*argv, capsys=capsys), run(*argv, capsys=capsys)
    assert first == second and first[0] == 0 and first[1].startswith("a\nb")
    assert "--tokenizer" in run("generate", "--model", model, capsys=capsys)[2]
    typed = [*argv[:4], r"--prompt=C:\\new \frac\n.", "--tokens=1"]
    assert run(*typed, capsys=capsys)[1].startswith("C:\\new \\frac\n.")


def test_generate_continues_the_prompts_of_a_file(model, tmp_path, capsys):
    argv = ["generate", "--model", model, "--tokenizer=bytes", "--tokens=9"]
    (tmp_path / "prompts.txt").write_text("one\\n1\n\ntwo\nthree", encoding="utf-8")
    code, out, err = run(*argv, "--prompts=prompts.txt", "--seed=4", "--lanes=2", capsys=capsys)
    alone = [
        run(*argv, f"--prompt={p}", f"--seed={4 + i}", capsys=capsys)[1]
        for i, p in enumerate(("one\\n1", "two", "three"))
    ]
    assert (code, err) == (0, "") and out == "\n".join(alone)
    for flags, said in (
        (["--prompts=prompts.txt", "--prompt=x"], "--prompt and --prompts"),
        (["--prompts=prompts.txt", "--lanes=0"], "--lanes"),
        (["--prompt=x", "--lanes=2"], "--lanes is for"),
        (["--prompts=none.txt"], "none.txt"),
        (["--prompts="], "is a folder; name a file"),
        (["--prompts=empty.txt"], "empty.txt has no prompt"),
    ):
        (tmp_path / "empty.txt").write_text("\n \n")
        code, out, err = run(*argv, *flags, capsys=capsys)
        assert code == 1 and said in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("out", ["o.pth", "o.safetensors", "folder/"])
def test_export_and_back(model, out, capsys):
    code, text, _ = run("export", "--model", model, "--out", out, "--dtype=bf16", capsys=capsys)
    assert code == 0 and re.search("RWKV-[47], 2 layers x 16 channels", text)
    ours, theirs = load_model(out).state_dict(), load_model(model, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_validate_reports_every_figure(model, tmp_path, capsys):
    lines = [json.dumps({"text": "some text of one document " * (i + 1)}) for i in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert run("prepare", "t.jsonl", "--tokenizer=bytes", "--out=store", capsys=capsys)[0] == 0
    argv = ["--model", model, "--data=store", "--chunk-len=32", "--json=scores.json"]
    code, out, _ = run("validate", *argv, capsys=capsys)
    assert code == 0 and "bits per byte" in out and "state dropped every 32" in out
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert figures["carried"]["tokens"] == figures["dropped"]["tokens"] == sum(26 * (i + 1) + 1 for i in range(20))
    assert figures["carried"]["by_position"][0][:2] == [0, 15]
    binidx = ["--model", model, "--data=store/tokens.bin", "--chunk-len=500", "--no-compare"]
    assert run("validate", *binidx, capsys=capsys)[0] in (0, 2)
