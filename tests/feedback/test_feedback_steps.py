"""The steps of a correction, and what they are computed with: what is left out or packed changes nothing."""

from dataclasses import replace

import pytest
import torch
from feedback_toys import ASKED, BYTES, DIALOGUES, FORM, small_model, upper_matrices
from helpers import assert_close_rel, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.templates import TurnEnd
from rwkv_train.feedback import FeedbackConfig, texts
from rwkv_train.feedback.curvature import DAMPING, Curvature
from rwkv_train.feedback.decode import decode, greedy
from rwkv_train.feedback.lesson import Lesson
from rwkv_train.feedback.packing import pack
from rwkv_train.feedback.steps import TURNS, inputs_of, take_steps
from rwkv_train.feedback.texts import (
    CHUNK,
    SURE,
    Anchored,
    Example,
    answer_loss,
    batch,
    divergence,
    log_probs,
    read,
    wrong,
)
from rwkv_train.feedback.trainable import between, changed, localised_names, trained_twin, upper_names, with_weights
from rwkv_train.models.adapters import begin_in


@pytest.mark.parametrize("tuned", [False, True])  # whether it begins in a state
@pytest.mark.parametrize(("trainable", "chunk"), [("upper", CHUNK), ("upper", 5), ("localised", CHUNK)])
def test_one_step_is_a_plain_gradient_step_on_the_whole_model(trainable, chunk, tuned, generation, monkeypatch):
    """Blocks left out, text read beforehand, texts padded together, read in chunks: none of it changes the gradient."""
    monkeypatch.setattr(texts, "CHUNK", chunk)
    model = random_model(n_embd=8, n_layer=4, vocab_size=257, dtype=torch.float64, generation=generation)
    if tuned:
        begin_in(model, model(torch.tensor([DIALOGUES[0]]))[1])
    model.requires_grad_(False)
    new = [Example([0, *BYTES.encode("a long way before: hot")], 3), Example([0, *BYTES.encode("sun? hot")], 3)]
    new.append(Example([0, *BYTES.encode("other talk. sun? hot")], 3, context=16))
    replayed, kept = [Example([0, *BYTES.encode("ice? cold")], 4)], DIALOGUES[1]
    config = FeedbackConfig(trainable=trainable, steps=1, truncation=9, kl_weight=2.0, step_factor=0.1)
    before = with_weights(model, {"emb.weight": model.emb.weight * 1.1})
    rehearsed = [Anchored(kept, before), Anchored(kept[:-3], model), Anchored(kept, before, 4, 6)]
    contrasted = [Anchored(kept[:-1], before, 2), Anchored(kept, model, 3, 9), Anchored(kept, before, 3, 8)]
    after, steps = take_steps(model, Lesson(new, replayed, rehearsed=rehearsed, contrasted=contrasted), None, config)
    names = upper_matrices(model, 2) if trainable == "upper" else localised_names(model)
    assert steps == 1 and set(changed(after, model)) == set(names)

    whole = with_weights(model, {name: dict(model.named_parameters())[name] for name in names})
    trained = {n: p.requires_grad_() for n, p in whole.named_parameters() if n in names}

    def nll(example):
        cut = max(example.context, len(example.ids) - example.answer - config.truncation)
        with torch.no_grad():
            state = whole.hidden(torch.tensor([example.ids[:cut]]))[1] if cut else None
        logits = whole(torch.tensor([example.ids[cut:-1]]), state)[0][0, -example.answer :]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids[-example.answer :]), reduction="sum")

    total = sum(map(nll, new)) / 9 + nll(replayed[0]) / 4

    def log_probs_of(model, text):
        with torch.no_grad():
            state = model.hidden(torch.tensor([text.ids[: text.context]]))[1] if text.context else None
        return model(torch.tensor([text.ids[text.context :]]), state)[0][0].log_softmax(-1)[-(text.last or 99) :]

    pairs = [(log_probs_of(text.model, text), log_probs_of(whole, text)) for text in [*rehearsed, *contrasted][::TURNS]]
    total = total + 2.0 * torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()
    gradients = torch.autograd.grad(total, list(trained.values()))
    size = config.step_factor * total / sum(g.square().sum() for g in gradients)
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
    assert_close_rel(curvature.precondition_kfac({name: gradient})[name], sides[0] @ gradient @ sides[1], 1e-3)
    ours = curvature.precondition_input({name: gradient})[name]
    assert_close_rel(ours, gradient @ sides[1] * inner.trace() / count / len(inner), 1e-3)


def test_a_state_to_begin_with_is_the_empty_one_until_it_is_trained(generation):
    model, lesson = small_model(generation=generation), Lesson([Example(DIALOGUES[0], 4)])
    still, _ = take_steps(model, lesson, None, FeedbackConfig(trainable="state", steps=0))
    tokens = torch.tensor([DIALOGUES[1]])
    torch.testing.assert_close(model(tokens)[0], still(tokens)[0], rtol=1e-4, atol=1e-4)
    trained, _ = take_steps(model, lesson, None, FeedbackConfig(trainable="state", step_factor=0.1, steps=5))
    assert answer_loss(trained, lesson.new[0]) < answer_loss(model, lesson.new[0])
    assert changed(trained, model).keys() == {"initial_shift", "initial_wkv"}
    one_by_one = [greedy(trained, FORM, [FORM.prompt(q)], max_new_tokens=8)[0] for q, _ in ASKED]
    assert greedy(trained, FORM, [FORM.prompt(q) for q, _ in ASKED], max_new_tokens=8) == one_by_one
    again = with_weights(model, changed(trained, model))
    assert torch.equal(again(tokens)[0], trained(tokens)[0])


def test_a_twin_is_watched_and_the_model_it_was_made_of_is_not():
    model, seen = small_model(), []
    twin = with_weights(model, {})
    twin.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model(torch.tensor([[0]]))
    assert not seen
    twin(torch.tensor([[0]]))
    assert len(seen) == 1


def test_between_goes_all_the_way():
    model = small_model()
    name = localised_names(model)[0]
    other = with_weights(model, {name: model.blocks[1].ffn.value.weight * 2})
    assert torch.equal(changed(between(model, other, 1.0), model)[name], changed(other, model)[name])
    torch.testing.assert_close(changed(between(model, other, 0.5), model)[name], model.blocks[1].ffn.value.weight * 1.5)


def test_drift_counts_every_token_once():
    def drift(model, base, rows):
        return divergence(log_probs(base, rows), log_probs(model, rows)).item()

    model = small_model()
    assert drift(model, model, DIALOGUES) == pytest.approx(0, abs=1e-6)
    other = with_weights(model, {"blocks.1.ffn.value.weight": model.blocks[1].ffn.value.weight * 2})
    alone = [drift(other, model, [row]) * len(row) for row in DIALOGUES]
    assert drift(other, model, DIALOGUES) * sum(map(len, DIALOGUES)) == pytest.approx(sum(alone), rel=1e-4)


def test_sampled_replies_are_drawn_by_seed():
    model, prompts = small_model(), [FORM.prompt("a"), FORM.prompt("another")]
    draws = [
        decode(model, BYTES, prompts, TurnEnd("\n\n"), max_new_tokens=6, rng=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_loss_of_an_answer_does_not_depend_on_where_the_text_is_cut(generation):
    example = Example([0, *BYTES.encode("so many words before it " * 10)], 5)
    model = small_model(generation=generation)
    logits = model(torch.tensor([example.ids[:-1]]))[0][0, -5:]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids[-5:])).item()
    assert answer_loss(model, example) == pytest.approx(want, rel=1e-5)


def test_steps_avoid_what_contrasts_share(generation):
    """Woodbury's identity gives the inverse of C with their inputs added; the inputs are those of a plain forward."""
    model = random_model(n_embd=16, n_layer=2, vocab_size=257, generation=generation, head_size=16)
    names = upper_names(model)
    curvature = Curvature.measure(model.requires_grad_(False), names, localised_names(model), DIALOGUES)
    texts = [Anchored(DIALOGUES[0], model, 3), Anchored(DIALOGUES[1], with_weights(model, {}), 2)]
    twin, parameters = trained_twin(model, "upper")
    inputs = inputs_of(twin, read(twin, texts, "upper")[0], list(parameters))
    given = {}
    for text in texts:
        hooks = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, args, name=name, last=text.last: given.setdefault(name, []).append(args[0][0, -last:])
            )
            for name in names
        ]
        model(torch.tensor([text.ids]))
        for hook in hooks:
            hook.remove()
    gradients = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for name, p in parameters.items()
    }
    ways = curvature.avoiding(inputs, 10.0).precondition_input(gradients)
    for name, parts in given.items():
        k = torch.cat(parts)
        assert_close_rel(inputs[name], k, 1e-5)
        mean = curvature.tensors[f"{name}.in.diagonal"].mean()
        added = 10 * (k.t() @ k).double() / len(k) / mean
        c = curvature.tensors[f"{name}.in.inverse"].double().inverse() + added
        assert_close_rel(ways[name], (gradients[name].double() @ c.inverse()).float(), 1e-3)


def _said(question: str, answer: str, negative: bool = False) -> Example:
    ids = BYTES.encode(answer)
    return Example([0, *BYTES.encode(question), *ids], len(ids), negative=negative)


@pytest.mark.parametrize(("trainable", "extra"), [("upper", 1), ("upper", 8), ("full", 1), ("localised", 1)])
def test_what_is_watched_is_trained_if_it_is_lost(trainable, extra, generation):
    config = FeedbackConfig(trainable=trainable, steps=60, kl_weight=0, extra=extra)
    model = small_model(generation=generation)
    first, second, other = _said("sun?", "hot"), _said("xun?", "hat"), _said("sun?", "cold", negative=True)
    learnt, _ = take_steps(model, Lesson([first]), None, config)
    assert not wrong(learnt, [first, other])
    lost, _ = take_steps(learnt, Lesson([second]), None, config)
    assert wrong(lost, [first, second, other]) == [first]
    kept, _ = take_steps(learnt, Lesson([second], watched={1: other, 2: first}), None, config)
    assert not wrong(kept, [first, second, other])


@pytest.mark.parametrize("together", [1, 2, 16])
def test_wrong_is_what_greedy_decoding_would_not_write(together, generation, monkeypatch):
    monkeypatch.setattr(texts, "TOGETHER", together)
    model = small_model(generation=generation)
    prompts = [[0, *BYTES.encode(text)] for text in ("sun?", "a much longer question?", "b?")]
    replies = greedy(model, FORM, prompts, max_new_tokens=4)
    right = [Example(prompt + reply, len(reply)) for prompt, reply in zip(prompts, replies, strict=True)]
    other = [Example([*example.ids[:-1], example.ids[-1] ^ 1], example.answer) for example in right]
    avoided = [replace(example, negative=True) for example in right + other]
    assert wrong(model, [*right, *other, *avoided]) == [*other, *avoided[: len(right)]]


@pytest.mark.parametrize("trainable", ["upper", "full", "state"])
def test_what_is_unsure_are_the_tokens_that_cost_much(trainable, generation):
    model = small_model(generation=generation)
    with torch.no_grad():
        model.head.weight *= 1e3
    prompts = [[0, *BYTES.encode(text)] for text in ("sun?", "a much longer question?", "b?")]
    replies = greedy(model, FORM, prompts, max_new_tokens=2)
    ids = [prompt + reply + BYTES.encode("!?") for prompt, reply in zip(prompts, replies, strict=True)]
    twin, _ = trained_twin(model, trainable)
    whole = batch(twin, [Example(one, 4) for one in ids], trainable, 64)
    nll = torch.cat([-log_probs(model, [one[:-1]], [4])[range(4), one[-4:]] for one in ids])
    assert 0 < (nll > SURE).sum() < len(nll)
    assert_close_rel(whole.read().unsure().loss(), nll[nll > SURE].mean(), 1e-4)
    assert_close_rel(whole.read().loss(), nll.mean(), 1e-4)


def test_nothing_is_unsure_of_what_is_learnt():
    model, text = small_model(), [0, *BYTES.encode("sun?")]
    with torch.no_grad():
        model.head.weight *= 1e4
    reply = greedy(model, FORM, [text], max_new_tokens=3)[0]
    learnt, negative = (Example(text + reply, 3, negative=negative) for negative in (False, True))
    assert batch(model, [learnt], "full", 64).read().unsure() is None
    unsure = batch(model, [negative], "full", 64).read().unsure()
    assert unsure is not None and len(unsure.targets) == 3
    other = Example(text + [token + 1 for token in reply], 3, negative=True)
    assert batch(model, [other], "full", 64).read().unsure() is None
