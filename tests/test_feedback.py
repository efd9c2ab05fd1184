"""Corrections: learnt means decoded, replayed = learnt, undone = before, nothing acknowledged is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import assert_close_rel, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.feedback import Correction, FeedbackConfig, Learner, Reading
from rwkv_train.feedback.curvature import DAMPING, Curvature
from rwkv_train.feedback.decode import Form, decode, greedy
from rwkv_train.feedback.guards import TALK, TALKS, Guards, _wander
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.steps import (
    Lesson,
    between,
    changed,
    learn,
    localised_names,
    upper_names,
    with_weights,
)
from rwkv_train.feedback.texts import Row, answer_loss, divergence, pack, predictions
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
FORM = Form(BYTES)
CONFIG = FeedbackConfig(
    scope="localised", rate=0.5, steps=100, loss=0.1, pull=0.01, budget=1e9, wordings=6, neighbours=2, guards=2, talks=1
)
QUICK = [Correction("sun?", "hot"), Correction("ice?", "cold"), Correction("sea?", "wet")]
ASKED = [("hi you", "hello"), ("a?", "b"), ("2?", "4")]
SUBJECTS = [("hi you", "you"), ("a?", "a"), ("2?", "2")]
DIALOGUES = [[0, *BYTES.encode(f"User: {q}\n\nAssistant: {a}\n\n")] for q, a in ASKED]


def small_model(seed=0, generation="rwkv4"):
    width, first = {"rwkv4": (48, 0), "rwkv7": (96, 2)}[generation]  # not every random model can be taught by so little
    model = random_model(n_embd=width, vocab_size=257, seed=seed + first, generation=generation, head_size=16)
    return model.requires_grad_(False)


def upper_matrices(model, first: int) -> list[str]:
    """Weights of linear layers by the files' names: of the blocks from `first` on and of the head."""
    begins = ("head.", *(f"blocks.{i}." for i in range(first, len(model.blocks))))
    parameters = model.named_parameters()
    return [n for n, p in parameters if p.dim() == 2 and n.endswith(".weight") and n.startswith(begins)]


def guards(model) -> Guards:
    curvature = Curvature.measure(model, upper_names(model), localised_names(model), DIALOGUES)
    return Guards(model, FORM, DIALOGUES, SUBJECTS, DIALOGUES, curvature)


def learner(folder, config=CONFIG, seed=0, generation="rwkv4") -> Learner:
    model = small_model(seed, generation)
    return Learner(model, BYTES, folder / "profile", config=config, guards=guards(model))


def test_corrections_are_learnt_kept_and_undone_exactly(tmp_path, generation):
    it = learner(tmp_path, generation=generation)
    before, seen = it.weights, []
    hashes = []
    for correction in QUICK:
        outcome = it.learn(correction, received=seen.append, tick=lambda step, loss: seen.append(loss))
        assert outcome.accepted, outcome.why
        assert outcome.answer_after == correction.answer != outcome.answer_before
        assert outcome.loss_after < outcome.loss_before
        assert outcome.weights == it.weights
        hashes.append(outcome.weights)
    assert [it.answer(c.question) for c in QUICK] == ["hot", "cold", "wet"]  # the earlier ones as well
    assert seen[0] == it.active()[0]["id"] and len(seen) > 3
    it.close()

    again = learner(tmp_path, generation=generation)  # after a restart, from a snapshot
    assert again.weights == hashes[-1]
    for file in (tmp_path / "profile" / "snapshots").iterdir():  # and from the journal alone, past a damaged snapshot
        file.write_bytes(file.read_bytes()[:-1])
    assert again.replay() == hashes[-1]

    assert again.undo() == [again.journal.records[-1]["of"][0]]
    assert again.weights == hashes[1]
    first = again.active()[0]["id"]
    again.forget([first])
    only_second = again.weights
    assert len(again.active()) == 1 and again.answer("ice?") == "cold"
    again.undo()
    assert again.weights == before
    with pytest.raises(ValueError, match="0 corrections to undo"):
        again.undo()
    with pytest.raises(ValueError, match="no active correction has the number 99"):
        again.forget([99])
    again.close()
    assert only_second not in hashes


def test_base_model_and_serving_model_are_never_written_to(tmp_path):
    it = learner(tmp_path)
    base = {k: v.clone() for k, v in it.base.state_dict().items()}
    serving = it.model
    it.learn(QUICK[0])
    assert it.model is not serving and serving is it.base
    assert all(torch.equal(v, base[k]) for k, v in it.base.state_dict().items())
    shared = [p is q for p, q in zip(it.model.parameters(), it.base.parameters(), strict=True)]
    assert sum(not s for s in shared) == 1  # two layers: one matrix is its own, the rest costs nothing
    it.close()


def test_context_of_the_dialogue_is_trained_too(tmp_path, generation):
    it = learner(tmp_path, generation=generation)
    context = tuple(BYTES.encode("User: something long before\n\nAssistant: yes\n\n"))
    outcome = it.learn(Correction("sun?", "hot", context))
    assert outcome.accepted, outcome.why
    it.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"budget": 0.0}, "would drift"),
        ({"steps": 1}, "decoding still gives"),
        ({"rate": 1e30}, "became (nan|inf)"),
    ],
)
def test_what_does_not_pass_the_gate_changes_nothing(tmp_path, changes, why):
    it = learner(tmp_path, FeedbackConfig(**(vars(CONFIG) | changes)))
    outcome = it.learn(QUICK[0])
    assert not outcome.accepted and it.active() == []
    assert re.search(why, outcome.why), outcome.why
    assert outcome.answer_after == outcome.answer_before and it.model is it.base
    it.close()


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        (Correction("q", " \n"), "answer is empty"),
        (Correction("", "a"), "question is empty"),
        (Correction("q", "a" * 3000), "3,000 characters"),
        (Correction("q", "\ud800"), "not valid Unicode"),
    ],
)
def test_bad_input_is_refused_before_it_is_recorded(tmp_path, correction, message):
    it = learner(tmp_path)
    with pytest.raises(ValueError, match=message):
        it.learn(correction)
    assert len(it.journal.records) == 1  # the base
    it.close()


def test_a_profile_has_one_base_and_one_process(tmp_path):
    it = learner(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"):
        learner(tmp_path)
    it.close()
    with pytest.raises(ValueError, match="begun with another model"):
        learner(tmp_path, seed=1)


def test_export_is_training_data(tmp_path):
    it = learner(tmp_path)
    it.learn(Correction("sun?", "hot", rejected="cold"))
    assert it.export(tmp_path / "out.jsonl") == 1
    it.close()
    store = prepare(PrepareConfig([str(tmp_path / "out.jsonl")], str(tmp_path / "store"), tokenizer="bytes"))
    trained = [int(t) for t, m in zip(store.tokens, store.mask, strict=True) if m]
    assert BYTES.decode(trained) == " hot\n\n"
    (pair,) = map(json.loads, (tmp_path / "out.jsonl.pairs.jsonl").read_text().splitlines())
    assert pair == {"prompt": "User: sun?\n\nAssistant:", "chosen": "hot", "rejected": "cold"}


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_feedback import QUICK, learner
it = learner(Path(sys.argv[2]))
it.learn(QUICK[0])
steps = []

def tick(step, loss):
    steps.append(step)
    if len(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

for correction in QUICK[1:]:
    it.learn(correction, received=lambda number: print(number, flush=True), tick=tick)
"""


def test_killed_at_random_moments_nothing_is_lost(tmp_path):
    """More of them: python tests/kill_learner.py 100"""
    from kill_learner import kill

    rng = random.Random(0)
    for _ in range(2):
        kill(tmp_path, rng)


def test_a_process_killed_between_steps_loses_nothing_it_acknowledged(tmp_path):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    argv = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(tmp_path / "killed"), "7"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = len(done.stdout.split())
    it, whole = learner(tmp_path / "killed"), learner(tmp_path / "whole")
    for correction in QUICK[: 1 + acknowledged]:
        whole.learn(correction)
    assert [r["question"] for r in it.active()] == [c.question for c in QUICK[: 1 + acknowledged]]
    assert it.weights == whole.weights
    it.close()
    whole.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.booleans(), st.data())
def test_a_damaged_journal_is_told_and_an_unfinished_end_is_dropped(tmp_path_factory, texts, cut, data):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    for text in texts:
        journal.append("received", text=text)
    journal.close()
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    if not cut and at < len(whole) - 1:
        with pytest.raises(ValueError, match="is damaged"):
            Journal(path)
        return
    found = Journal(path)
    assert found.records == journal.records[: whole[:at].count(b"\n")]
    found.append("received", text="after")
    found.close()
    assert Journal(path).records == found.records


@pytest.mark.parametrize("scope", ["upper", "localised"])
def test_one_step_is_a_plain_gradient_step_on_the_whole_model(scope, generation):
    """Blocks left out, text read beforehand, rows padded together: none of it changes the gradient."""
    model = random_model(n_embd=8, n_layer=4, vocab_size=257, dtype=torch.float64, generation=generation)
    model.requires_grad_(False)
    new = [Row([0, *BYTES.encode("a long way before: hot")], 3), Row([0, *BYTES.encode("sun? hot")], 3)]
    new.append(Row([0, *BYTES.encode("other talk. sun? hot")], 3, context=16))
    replayed, kept = [Row([0, *BYTES.encode("ice? cold")], 4)], DIALOGUES[1]
    config = FeedbackConfig(scope=scope, steps=1, reach=9, pull=2.0, rate=0.1)
    before = with_weights(model, {"emb.weight": model.emb.weight * 1.1})
    after, steps = learn(model, Lesson(new, replayed, [(kept, before), (kept[:-3], model)]), None, config)
    names = upper_matrices(model, 2) if scope == "upper" else localised_names(model)
    assert steps == 1 and set(changed(after, model)) == set(names)

    whole = with_weights(model, {name: dict(model.named_parameters())[name] for name in names})
    trained = {n: p.requires_grad_() for n, p in whole.named_parameters() if n in names}

    def nll(row):
        cut = max(row.context, len(row.ids) - row.answer - config.reach)
        with torch.no_grad():
            state = whole.hidden(torch.tensor([row.ids[:cut]]))[1] if cut else None
        logits = whole(torch.tensor([row.ids[cut:-1]]), state)[0][0, -row.answer :]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[-row.answer :]), reduction="sum")

    total = sum(map(nll, new)) / 9 + nll(replayed[0]) / 4
    parts = []
    for ids, other in ((kept, before), (kept[:-3], model)):
        p, q = (m(torch.tensor([ids]))[0][0].log_softmax(-1) for m in (other, whole))
        parts.append((p.exp() * (p - q)).sum(-1))
    total = total + 2.0 * torch.cat(parts).mean()
    gradients = torch.autograd.grad(total, list(trained.values()))
    size = config.rate * total / sum(g.square().sum() for g in gradients)
    for (name, p), g in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(changed(after, model)[name], p.detach() - size.detach() * g, rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=9))
def test_packed_texts_do_not_know_of_each_other(drawn):
    model = random_model(n_embd=8, vocab_size=257, dtype=torch.float64)
    texts = [[0, *BYTES.encode("abcdefghi"[-length:])] for length, _ in drawn]
    packed = pack(texts, [alone for _, alone in drawn], model.device)
    together = packed.real(model(packed.tokens, None, packed.reset)[0])
    alone = torch.cat([model(torch.tensor([text]))[0][0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    begun = [i for i, (_, first) in enumerate(drawn) if first]
    assert set(begun) <= set(packed.firsts) and len(packed.firsts) == len(packed.tokens) <= len(texts)


def test_curvature_is_the_fisher_information_of_each_side(generation):
    model = small_model(generation=generation)
    (name,) = localised_names(model)
    curvature = Curvature.measure(model, [name], [name], DIALOGUES)
    c = model.config
    outer, inner, count = torch.zeros(c.n_embd, c.n_embd), torch.zeros(c.n_ffn, c.n_ffn), 0
    layer, seen = model.blocks[1].ffn.value, {}
    layer.weight.requires_grad_()
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    for ids in DIALOGUES:
        logits = model(torch.tensor([ids[:-1]]))[0][0]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        (slope,) = torch.autograd.grad(nll, seen["y"])
        x, slope = seen["x"][0].detach(), slope[0]
        outer, inner, count = outer + slope.t() @ slope, inner + x.t() @ x, count + len(x)
    hook.remove()
    gradient = torch.randn(c.n_embd, c.n_ffn, generator=torch.Generator().manual_seed(0))
    sides = []
    for factor in (outer / count, inner / count):
        sides.append(torch.linalg.inv(factor + DAMPING * factor.trace() / len(factor) * torch.eye(len(factor))))
    assert_close_rel(curvature.flatten({name: gradient})[name], sides[0] @ gradient @ sides[1], 1e-3)
    ours = curvature.avoid({name: gradient})[name]
    assert_close_rel(ours, gradient @ sides[1] * inner.trace() / count / len(inner), 1e-3)


@pytest.mark.parametrize("scope", ["upper", "lora", "full"])
def test_every_scope_learns_and_changes_what_it_says(tmp_path, scope, generation):
    it = learner(tmp_path, replace(CONFIG, scope=scope, steps=300), generation=generation)
    outcome = it.learn(QUICK[0])
    assert outcome.accepted and it.answer("sun?") == "hot", outcome
    ours, base = changed(it.model, it.base), dict(it.base.named_parameters())
    if scope == "lora":
        assert list(ours) == localised_names(it.base)
        assert all(torch.linalg.matrix_rank(w - base[n], rtol=1e-4) <= 8 for n, w in ours.items())
    else:
        assert set(ours) == set(base if scope == "full" else upper_matrices(it.base, 1))
    hashed = it.weights
    it.close()
    again = learner(tmp_path, generation=generation)  # from the snapshot
    assert again.weights == hashed and again.answer("sun?") == "hot"
    again.undo()
    assert again.model is again.base
    again.close()


def test_a_state_to_begin_with_is_the_empty_one_until_it_is_trained(generation):
    model, lesson = small_model(generation=generation), Lesson([Row(DIALOGUES[0], 4)])
    still, _ = learn(model, lesson, None, FeedbackConfig(scope="state", steps=0))
    tokens = torch.tensor([DIALOGUES[1]])
    torch.testing.assert_close(model(tokens)[0], still(tokens)[0], rtol=1e-4, atol=1e-4)
    trained, _ = learn(model, lesson, None, FeedbackConfig(scope="state", rate=0.1, steps=5))
    assert answer_loss(trained, lesson.new[0]) < answer_loss(model, lesson.new[0])
    assert changed(trained, model).keys() == {"initial_shift", "initial_wkv"}
    one_by_one = [greedy(trained, FORM, [FORM.prompt(q)], most=8)[0] for q, _ in ASKED]
    assert greedy(trained, FORM, [FORM.prompt(q) for q, _ in ASKED], most=8) == one_by_one
    again = with_weights(model, changed(trained, model))
    assert torch.equal(again(tokens)[0], trained(tokens)[0])


def test_a_wrong_reply_is_left_and_other_answers_are_kept(tmp_path):
    it = learner(tmp_path)
    it.learn(QUICK[0])
    outcome = it.learn(Correction("sun?", None, rejected="hot"))
    assert outcome.accepted and outcome.answer_before == "hot" != outcome.answer_after
    with pytest.raises(ValueError, match="neither a right answer nor a wrong one"):
        it.learn(Correction("sun?", None))
    assert it.export(tmp_path / "out.jsonl") == 1
    it.close()


def test_the_last_word_on_a_question_counts(tmp_path, generation):
    it = learner(tmp_path, generation=generation)
    for answer in ("hot", "cold", "hot", "wet"):
        outcome = it.learn(Correction("sun?", answer))
        assert outcome.accepted and it.answer("sun?") == answer, outcome
    assert it.learn(QUICK[1]).accepted and it.answer("sun?") == "wet"
    it.close()


def test_reading_gets_used_to_a_text_and_is_undone_and_replayed(tmp_path, generation):
    it = learner(tmp_path, replace(CONFIG, learn_rate=0.01), generation=generation)
    losses = []
    outcome = it.learn(Reading("to and fro " * 100), tick=lambda step, loss: losses.append(loss))
    assert outcome.accepted and outcome.steps == len(losses) == 9 and losses[-1] < losses[0]
    assert outcome.loss_after < outcome.loss_before
    it.learn(QUICK[0])
    hashed = it.weights
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    assert it.replay() == hashed
    assert it.undo(2) and it.model is it.base
    assert it.learn(Reading("to and fro " * 100)).weights == outcome.weights
    with pytest.raises(ValueError, match="text is empty"):
        it.learn(Reading("\n"))
    it.close()


def test_a_change_that_moves_too_much_is_scaled_down(tmp_path):
    whole = learner(tmp_path)
    moved = whole.learn(QUICK[0]).drift
    whole.undo()
    whole.configure(budget=0.8 * moved, extra=2)
    outcome = whole.learn(QUICK[0])
    assert outcome.accepted and outcome.share < 1 and outcome.drift <= 0.8 * moved
    assert whole.answer("sun?") == "hot"
    whole.close()
    again = learner(tmp_path)  # settings are kept, and a replay scales as well
    assert again.config.budget == 0.8 * moved and again.weights == outcome.weights
    for file in (tmp_path / "profile" / "snapshots").iterdir():
        file.unlink()
    assert again.replay() == outcome.weights
    with pytest.raises(ValueError, match="must not be negative"):
        again.configure(rate=-1.0)
    with pytest.raises(ValueError, match="scope must be one of"):
        again.configure(scope="all")
    again.close()


def test_between_goes_all_the_way():
    model = small_model()
    name = localised_names(model)[0]
    other = with_weights(model, {name: model.blocks[1].ffn.value.weight * 2})
    assert torch.equal(changed(between(model, other, 1.0), model)[name], changed(other, model)[name])
    torch.testing.assert_close(changed(between(model, other, 0.5), model)[name], model.blocks[1].ffn.value.weight * 1.5)


def test_guards_are_made_by_the_model_kept_in_a_file_and_know_their_neighbours(tmp_path):
    model = small_model()
    ours = guards(model)
    assert ours.near(DIALOGUES[2], 1, 0) == [DIALOGUES[2]]
    assert DIALOGUES[2] not in ours.near(DIALOGUES[2], 3, 0, [FORM.answer("4")]) and len(ours.near([1], 9, 0)) == 3
    ours.save(tmp_path / "guards.safetensors")
    again = Guards.load(tmp_path / "guards.safetensors", model, FORM)
    gradients = {localised_names(model)[0]: torch.ones(48, 192)}
    assert again.rows == ours.rows and again.asked == ours.asked and again.talks == ours.talks
    for way in ("flatten", "even"):
        assert torch.equal(*(next(iter(getattr(g.curvature, way)(gradients).values())) for g in (ours, again)))
    with pytest.raises(ValueError, match="there is no guard text"):
        Guards(model, FORM, [], [], [], ours.curvature)
    for other in ({"rows": 1}, {"text": torch.tensor(list(b'{"rows": [], "asked": []}'), dtype=torch.uint8)}):
        torch.save(other, tmp_path / "other")
        with pytest.raises(ValueError, match="holds no guards of this version"):
            Guards.load(tmp_path / "other", model, FORM)


def test_questions_are_crossed_with_those_of_the_pool():
    model = small_model()
    ours = guards(model)
    ours.subjects = lambda question: ["sun"]
    own, subject, made = ours.around(model, "why sun?", 2, 9)
    assert subject == "sun" and own == greedy(model, FORM, [FORM.prompt("why sun?")])[0]
    assert [text for text, *_ in made] == ["why you?", "why a?", "hi sun", "sun?"]
    other = with_weights(model, {"head.weight": -model.head.weight})
    for (text, prompt, now, before), (_, _, changed_now, still) in zip(
        made, ours.around(other, "why sun?", 2, 9).made, strict=True
    ):
        assert prompt == FORM.prompt(text) and now == before == still == greedy(model, FORM, [prompt])[0]
        assert changed_now == greedy(other, FORM, [prompt])[0] != still
    same = with_weights(model, {"head.weight": model.head.weight})
    assert ours.around(same, "why sun?", 2, 9).made == made
    model.head.weight[0] += 3 * model.head.weight.abs().max()  # replies that the document's end cuts short
    prompts = [prompt for _, prompt, _, _ in made]
    replies = greedy(model, FORM, prompts)
    for shown in (replies, [reply[: len(reply) // 2] for reply in replies], [[*reply, 65] for reply in replies]):
        assert ours._before(prompts, shown) == replies
    assert ours.around(model, "why sun?", 0, 0).made == []


def test_a_subject_is_what_the_answer_depends_on():
    """Of the words tried, one whose place others can take without another answer is not it."""
    model = small_model()
    ours = guards(model)
    ours.subjects = lambda question: ["why", "sun"]
    replies = {"why sun?": "hot"} | {f"{word} sun?": "hot" for word in ("you", "a", "2")}

    def answer(model, form, prompts):
        asked = [form.shown(prompt).split("User: ")[1].split("\n")[0] for prompt in prompts]
        return [form.answer(replies.get(question, "cold")) for question in asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_train.feedback.guards.greedy", answer)
        around = ours.around(model, "why sun?", 3, 3)
        assert around.subject == "sun" and around.own == FORM.answer("hot") and len(around.made) > 3
        ours.subjects = lambda question: ["why"]
        assert ours.around(model, "why sun?", 3, 3) == (FORM.answer("hot"), "", [])


def test_talk_before_a_question_goes_on_without_an_end():
    model = small_model()
    model.head.weight[0] = 10 * model.head.weight.abs().max()  # it would end at once, or never
    talks = _wander(model, FORM, torch.Generator().manual_seed(0))
    assert len(talks) == TALKS and {len(talk) for talk in talks} == {TALK} and len(set(map(tuple, talks))) == TALKS
    assert all(talk[0] == 0 and 0 not in talk[1:] and BYTES.decode(talk[1:]).startswith("User:") for talk in talks)
    assert talks == _wander(model, FORM, torch.Generator().manual_seed(0))


def test_the_subject_is_a_rare_word_that_could_not_be_foreseen():
    model = small_model()
    asked = ["my sun?", "my ice?", "my xyz?"] + ["my?"] * 20
    rows = [FORM.prompt(question) for question in asked]
    ours = Guards(model, FORM, rows, [], [], Curvature.measure(model, upper_names(model), localised_names(model), rows))
    ours.base = with_weights(model, {"head.weight": torch.zeros_like(model.head.weight)})  # foresees nothing
    assert ours.subjects("my xyz?")[0] in "xyz" and ours.subjects("my ice?")[0] in "ice"


def test_drift_counts_every_token_once():
    def drift(model, base, rows):
        return divergence(predictions(base, rows), predictions(model, rows)).item()

    model = small_model()
    assert drift(model, model, DIALOGUES) == pytest.approx(0, abs=1e-6)
    other = with_weights(model, {"blocks.1.ffn.value.weight": model.blocks[1].ffn.value.weight * 2})
    alone = [drift(other, model, [row]) * len(row) for row in DIALOGUES]
    assert drift(other, model, DIALOGUES) * sum(map(len, DIALOGUES)) == pytest.approx(sum(alone), rel=1e-4)


def test_sampled_replies_are_drawn_by_seed():
    model, prompts = small_model(), [FORM.prompt("a"), FORM.prompt("another")]
    draws = [decode(model, BYTES, prompts, "\n\n", most=6, rng=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_loss_of_an_answer_does_not_depend_on_where_the_text_is_cut(generation):
    row = Row([0, *BYTES.encode("so many words before it " * 10)], 5)
    model = small_model(generation=generation)
    logits = model(torch.tensor([row.ids[:-1]]))[0][0, -5:]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[-5:])).item()
    assert answer_loss(model, row) == pytest.approx(want, rel=1e-5)


def test_a_model_that_knows_no_dialogues_is_guarded_by_what_it_writes():
    model = small_model()
    ours, again = (Guards.of_model(model, FORM, count=5) for _ in range(2))
    assert len(ours.rows) == 5 and ours.rows == again.rows
    assert all(row[0] == 0 and BYTES.decode(row[1:]).startswith("User:") for row in ours.rows)
    assert again.asked == ours.asked == [] == ours.around(model, "sun?", 3, 3).made
