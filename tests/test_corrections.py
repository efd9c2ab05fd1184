"""Corrections through the commands people type: in the chat, from a file, and measured."""

import io
import json
import sys

import pytest
import torch
from helpers import random_model
from test_cli import run
from test_feedback import CONFIG

import rwkv_train.feedback.learner as learner_module
from rwkv_train import save_model
from rwkv_train.data.facts import facts
from rwkv_train.feedback import FeedbackConfig
from rwkv_train.feedback.bench import TARGETS, load_cases
from rwkv_train.feedback.cases import fact_cases, small_talk, strangers_talk
from rwkv_train.feedback.decode import greedy
from rwkv_train.generate import prefill
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of random weights in a folder of its own, and a recipe that such a model can learn with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learner_module, "FeedbackConfig", lambda **k: FeedbackConfig(**(vars(CONFIG) | k)))
    save_model(random_model(n_embd=48, vocab_size=257), "model.pth")
    BYTES.save("tokenizer.json")
    return "model.pth"


def chat(model, *lines, capsys, monkeypatch) -> list[str]:
    """The answers of a scripted conversation, one block each."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    argv = ["--model", model, "--plain", "--temperature=0", "--tokens=8", "--folder=home"]
    code, out, err = run("chat", *argv, capsys=capsys)
    assert code == 0, err
    blocks = out.rstrip("\n").split("\n\n")
    assert len(blocks) == len(lines)
    return blocks


def test_a_scripted_conversation(model, tmp_path, capsys, monkeypatch):
    say = {"capsys": capsys, "monkeypatch": monkeypatch}
    wrong, fixed, right, taught, history = chat(
        model, "sun?", "/fix hot", "/teach ice? => cold", "/teach nothing", "/history", **say
    )
    assert wrong not in ("hot", "cold")
    assert "received as correction 2" in fixed and "learnt (" in fixed and "after:  hot" in fixed
    assert "after:  cold" in right and "write /teach" in taught
    assert history == "2: sun? => hot\n4: ice? => cold"

    after = chat(
        model, "ice?", "/export out.jsonl", "/undo", "/history", "/undo 2", "/undo", "/undo", **say
    )  # restarted
    assert after[0] == "cold" and "wrote 2 corrections" in after[1] and "forgot 4" in after[2]
    assert after[3] == "2: sun? => hot"
    assert "1 corrections to undo, not 2" in after[4] and "forgot 2" in after[5] and "0 corrections" in after[6]
    assert chat(model, "sun?", **say) == [wrong]
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert (pair["chosen"], pair["rejected"]) == ("hot", wrong)


def test_bad_corrections_are_told_in_one_line(model, capsys, monkeypatch):
    first, empty, long, history = chat(
        model, "/fix x", "/teach a =>", f"/teach a => {'x' * 3000}", "/history", capsys=capsys, monkeypatch=monkeypatch
    )
    assert first == "nothing has been said yet" and "answer is empty" in empty and "3,000 characters" in long
    assert history == "nothing was learnt yet"


def test_feedback_from_a_file(model, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text(
        '{"question": "sun?", "answer": "hot"}\n\n{"question": "ice?", "answer": "cold"}\n'
    )
    code, out, _ = run("feedback", "--model", model, "--file=c.jsonl", "--folder=home", capsys=capsys)
    assert code == 0 and "2 of 2 learnt" in out and "cold" in out
    (tmp_path / "c.jsonl").write_text('{"question": "sun?"}\n')
    code, _, err = run("feedback", "--model", model, "--file=c.jsonl", "--folder=home", capsys=capsys)
    assert code == 1 and "c.jsonl:1: expected" in err


def test_bench_feedback_short(model, tmp_path, capsys, monkeypatch):
    """The whole protocol, on two cases and a model that knows nothing."""
    monkeypatch.setattr("rwkv_train.corrections.SINGLES", 1)
    cases = [
        {"question": f"{q}?", "answer": a, "neighbours": [{"question": q}]} for q, a in (("sun", "hot"), ("ice", "no"))
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    (tmp_path / "q.txt").write_text("who?\nwhat?\nwhen?\n")
    (tmp_path / "text.txt").write_text("some text that stays as it is. " * 20)
    argv = [
        "--cases=cases.jsonl",
        "--unrelated=q.txt",
        "--heldout=text.txt",
        "--counts=[1,2]",
        "--seeds=1",
        "--json=r.json",
    ]
    code, out, err = run("bench", "feedback", "--model", model, *argv, capsys=capsys)
    assert code == 0, err
    assert all(name in out for name in TARGETS) and "N=2" in out and "rate 0 N=2" in out and "naive N=2" in out
    results = json.loads((tmp_path / "r.json").read_text())
    still = results["rate 0 N=2"]
    assert still["all retained"] == 0 and still["unrelated identical"] == 1 and still["neighbours changed"] == 0
    assert still["perplexity rise"] == pytest.approx(0, abs=1e-6)
    assert results["N=1"]["newest, empty state"] == results["N=1"]["all retained"]
    (tmp_path / "cases.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"cases.jsonl:1: no case"):
        load_cases(tmp_path / "cases.jsonl")


def test_batched_greedy_is_greedy_one_by_one():
    model = random_model(n_embd=24, vocab_size=257)
    prompts = [[0, *BYTES.encode(text)] for text in ("a", "bc", "d", "efg")]
    state = prefill(model, BYTES.encode("before"))[1]
    for start in (None, state):
        together = greedy(model, BYTES, prompts, start, most=9)
        for prompt, reply in zip(prompts, together, strict=True):
            logits, s = prefill(model, prompt, start)
            ids = []
            for _ in range(9):
                ids.append(int(torch.argmax(logits)))
                if ids[-1] == 0:
                    break
                logits, s = prefill(model, ids[-1:], s)
            assert reply == BYTES.decode(ids).split("\n\n")[0].strip()


def test_own_cases_are_false_facts_that_spare_what_they_watch():
    cases = fact_cases()
    assert cases == fact_cases() and len(cases) > 100
    true = {f.questions()[0]: f.answer for f in facts()}
    taught = {c.question for c in cases}
    for case in cases:
        assert case.answer != true[case.question] and len(case.paraphrases) == 4 and case.same_subject
        for watched in (*case.neighbours, *case.same_subject):
            assert watched["answer"] == true[watched["question"]] and watched["question"] not in taught
    assert len(set(small_talk())) == 200
    assert len(strangers_talk(count=10)) > 10_000
