"""Corrections through the commands people type: in the chat and from a file."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from feedback_toys import CONFIG
from helpers import random_model, run

import rwkv_train.feedback.learner as learner_module
from rwkv_train import load_model, save_model
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.feedback import Correction, FeedbackConfig, Learner
from rwkv_train.feedback.decode import Form, greedy
from rwkv_train.generate import prefill
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of random weights in a folder of its own, and a recipe that such a model can learn with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learner_module, "FeedbackConfig", lambda **k: FeedbackConfig(**(vars(CONFIG) | k)))
    save_model(random_model(n_embd=48, vocab_size=257), "model.pth")
    TextFormat(BYTES, Template()).save(tmp_path)
    return "model.pth"


def chat(model, *lines, capsys, monkeypatch, code=0) -> list[str]:
    """The answers of a scripted conversation, one block each; code: its exit code, 1 where a correction fails."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    argv = ["--model", model, "--plain", "--temperature=0", "--tokens=8", "--folder=home"]
    found, out, err = run("chat", *argv, capsys=capsys)
    assert found == code, err
    blocks = out.rstrip("\n").split("\n\n")
    assert len(blocks) == len(lines)
    return blocks


def test_a_scripted_conversation(model, tmp_path, capsys, monkeypatch, generation):
    if generation == "rwkv7":
        remembers = random_model(n_embd=64, vocab_size=257, seed=1, generation=generation, head_size=16)
        for block in remembers.blocks:
            block.att.w0.data -= 4  # or what was asked is forgotten before the reply begins
        save_model(remembers, model)
    say = {"capsys": capsys, "monkeypatch": monkeypatch}
    wrong, fixed, right, taught, history = chat(
        model, "sun?", "/fix hot", "/teach ice? => cold", "/teach nothing", "/history", **say, code=1
    )
    assert wrong not in ("hot", "cold")
    assert "received as correction 2" in fixed and "learnt (" in fixed and "after:  hot" in fixed
    assert "after:  cold" in right and "write /teach" in taught
    assert history == "2: sun? => hot\n4: ice? => cold"

    after = chat(
        model, "ice?", "/export out.jsonl", "/undo", "/history", "/undo 2", "/undo", "/undo", **say, code=1
    )  # restarted
    assert after[0] == "cold" and "wrote 2 corrections" in after[1] and "forgot 4" in after[2]
    assert after[3] == "2: sun? => hot"
    assert "1 corrections to undo, not 2" in after[4] and "forgot 2" in after[5] and "0 corrections" in after[6]
    assert chat(model, "sun?", **say) == [wrong]
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert (pair["chosen"], pair["rejected"]) == ("hot", wrong)


def test_settings_scopes_wrong_replies_and_readings_in_a_chat(model, tmp_path, capsys, monkeypatch):
    say = {"capsys": capsys, "monkeypatch": monkeypatch}
    (tmp_path / "text.txt").write_text("to and fro " * 50)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    blocks = chat(
        model, "/teach sun? => hot", "sun?", "/bad", "/back", "sun?", "/diff", "/settings scope lora",
        "/settings trainable all", "/settings steps many",
        "/learn text.txt", "/learn latin.txt", "/learn", "/learn none.txt", "/history", "/undo 3", "/diff",
        **say, code=1,
    )  # fmt: skip
    _, hot, bad, _, other, diff, scope, unknown, many, read, latin, empty, none, history, undone, same = blocks
    assert hot == "hot" != other and "learnt (" in bad and "before: hot" in bad
    assert "2 corrections, the last reply is by version" in diff and "ffn.value.weight" in diff
    assert scope == "scope is now trainable\ntrainable lora" and "trainable must be one of" in unknown
    assert "expected a whole number" in many
    assert "learnt (" in read and "latin.txt:1: invalid UTF-8 (byte 0xe9)" in latin and empty == "write /learn FILE"
    assert "No such file" in none
    assert "\n4: sun? => anything but: hot" in history and "read to and fro to" in history
    assert "weights are as before" in undone and "0 corrections" in same and "ffn" not in same
    assert "trainable           lora" in chat(model, "/settings", **say)[0]  # kept


def test_bad_corrections_are_told_in_one_line(model, capsys, monkeypatch):
    first, empty, long, history = chat(
        model,
        "/fix x",
        "/teach a =>",
        f"/teach a => {'x' * 3000}",
        "/history",
        capsys=capsys,
        monkeypatch=monkeypatch,
        code=1,
    )
    assert first == "nothing has been said yet" and "answer is empty" in empty and "3,000 characters" in long
    assert history == "nothing was learnt yet"


def test_feedback_from_a_file(model, tmp_path, capsys):
    """Cut at line feeds alone, without the byte order mark; fields that corrections do not have are named."""
    lines = (
        '\ufeff{"question": "su\u2028n?", "answer": "hot", "note": "by hand", "rejected": null}\r\n\n'
        '{"question": "ice?", "answer": "cold"}\n'
    )
    (tmp_path / "c.jsonl").write_bytes(lines.encode())
    code, out, err = run("feedback", "--model", model, "--file=c.jsonl", "--folder=home", capsys=capsys)
    assert code == 0 and "2 of 2 learnt" in out and "cold" in out
    assert 'not used: "note" (1 correction)\n' in err
    (journal,) = (tmp_path / "home").rglob("journal.jsonl")
    assert '"question": "su\u2028n?"' in journal.read_text(encoding="utf-8")


def test_what_fails_in_a_file_keeps_nothing_else_from_being_learnt(model, tmp_path, capsys, monkeypatch):
    questions = ("sun?", "ice?", "sea?")
    (tmp_path / "c.jsonl").write_text("".join(f'{{"question": "{q}", "answer": "cold"}}\n' for q in questions[1:]))
    argv = ["feedback", "--model", model, "--file=c.jsonl", "--folder=home"]
    learn, failing = Learner._learn, ["ice?", "sea?"]

    def learn_or_fail(self, model, received, *rest):
        if received.item.question in failing:
            raise RuntimeError("out of memory")
        return learn(self, model, received, *rest)

    monkeypatch.setattr(Learner, "_learn", learn_or_fail)
    with Learner(load_model(model), BYTES, tmp_path / "home" / "profiles" / tmp_path.name) as learner:
        learner.receive(Correction(questions[0], "hot"))  # and then a crash
    failing.pop()
    code, out, err = run(*argv, capsys=capsys)
    assert code == 1 and "2 of 3 learnt" in out and "learnt first: 2" in err
    assert " hot\n" in out and "not learnt: RuntimeError: out of memory\n" in out and " cold\n" in out


def test_an_empty_file_of_corrections_is_refused(model, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_bytes(b"\n")
    code, _, err = run("feedback", "--model", model, "--file=c.jsonl", "--folder=home", capsys=capsys)
    assert code == 1 and "c.jsonl holds no correction" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "sun?"}', "c.jsonl:3: expected"),
        (b'{"question": "sun?", "answer": 3}', "c.jsonl:3: expected"),
        (b'["question", "answer"]', "c.jsonl:3: expected"),
        (b'{"question": "sun?"\n, "answer": "hot"}', "c.jsonl:3: bad JSON"),
        (b"[" * 100_000, "c.jsonl:3: bad JSON"),
        (b'{"question": "sun?", "answer": "\\ud800"}', "c.jsonl:3: the answer is not valid Unicode"),
        (b'{"question": "sun?", "answer": " "}', "c.jsonl:3: the answer is empty"),
        (b'{"question": "sun?", "answer": "%s"}' % (b"x" * 3000), "c.jsonl:3: the answer has 3,000 characters"),
        (b'{"question": "sun?", "answer": "caf\xe9"}', "c.jsonl:3: invalid UTF-8"),
    ],
)
def test_one_bad_line_of_a_file_is_told_before_any_is_learnt(model, tmp_path, capsys, line, message):
    (tmp_path / "c.jsonl").write_bytes(b'{"question": "ice?", "answer": "cold"}\n\n' + line)
    code, out, err = run("feedback", "--model", model, "--file=c.jsonl", "--folder=home", capsys=capsys)
    assert code == 1 and message in err and err.count("\n") == 1 and not out
    assert all(path.read_text().count("\n") == 1 for path in (tmp_path / "home").rglob("journal.jsonl"))  # the base


def test_bytes_that_are_no_text_are_refused_in_a_chat(model, tmp_path):
    """From a pipe, as a terminal would not let them through."""
    program = Path(__file__).parents[2] / "train.py"
    argv = [sys.executable, program, "chat", f"--model={model}", "--plain", "--tokens=4", "--folder=home"]
    typed = b"\xef\xbb\xbf/help\r\nsun?\n/fix caf\xe9\n/history\n"
    done = subprocess.run(argv, input=typed, capture_output=True, timeout=120)
    assert done.returncode == 1, done.stderr  # as a correction was refused
    assert done.stdout.startswith(b"/help "), "the byte order mark is no part of the first line"
    _, refused, history, _ = done.stdout.decode(errors="replace").rsplit("\n\n", 3)
    assert "not valid Unicode" in refused and "nothing was learnt yet" in history


def test_an_answer_of_which_nothing_is_trained_is_refused(model, tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("train_roles: [user]\n")
    (tmp_path / "c.jsonl").write_text('{"question": "ice?", "answer": "cold"}\n')
    argv = ["--file=c.jsonl", "--folder=home", "--template=t.yaml"]
    code, _, err = run("feedback", "--model", model, *argv, capsys=capsys)
    assert code == 1 and "c.jsonl:1: the answer has no tokens that can be trained" in err


def test_batched_greedy_is_greedy_one_by_one():
    model = random_model(n_embd=24, vocab_size=257)
    prompts = [[0, *BYTES.encode(text)] for text in ("a", "bc", "d", "efg")]
    state = prefill(model, BYTES.encode("before"))[1]
    for start in (None, state):
        together = greedy(model, Form(BYTES), prompts, start, max_new_tokens=9)
        for prompt, reply in zip(prompts, together, strict=True):
            logits, s = prefill(model, prompt, start)
            ids = []
            while len(ids) < 9 and "\n\n" not in BYTES.decode(ids) and int(torch.argmax(logits)):
                ids.append(int(torch.argmax(logits)))
                logits, s = prefill(model, ids[-1:], s)
            assert reply == ids


def test_the_conversation_in_the_readme_is_a_real_one(tmp_path):
    from transcript import ROOT, transcript, without_figures

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```\n{without_figures(transcript(str(tmp_path)))}```" in without_figures(readme)
