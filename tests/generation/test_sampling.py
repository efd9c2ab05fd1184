"""Choosing tokens: every way to one against a plain loop, and the settings against what they promise."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rwkv_train.generation import sampling
from rwkv_train.generation.sampling import Needs, Sampling, choose, random_numbers


def chosen(logits: Tensor, lanes: list[Sampling], uniform: list[float], counts: Tensor | None = None) -> list[int]:
    settings = torch.tensor([lane.numbers for lane in lanes])
    counts = torch.zeros(logits.shape) if counts is None else counts
    return choose(logits, settings, torch.tensor(uniform, dtype=torch.float64), Needs.of(lanes), counts).tolist()


def plainly(logits: Tensor, how: Sampling, uniform: float, counts: Tensor) -> int:
    """The specification, a token at a time, in float64."""
    logits = logits.double() - how.presence_penalty * (counts > 0) - how.frequency_penalty * counts
    if how.greedy:
        return int(logits.argmax())
    p = (logits / how.temperature).softmax(-1).tolist()
    left, mass = {}, 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        tie = left and p[i] == min(left.values())
        is_enough = mass >= how.top_p or len(left) >= (how.top_k or len(p))
        if p[i] < how.min_p * max(p) or (left and not tie and is_enough):
            break
        left[i] = p[i]
        mass += p[i]
    target, mass = uniform * sum(left.values()), 0.0
    for i in sorted(left):
        mass += left[i]
        if mass > target:
            return i
    return max(left)


settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.5, 1, 3]),
    top_p=st.sampled_from([1, 0.01, 0.6, 0.95]),
    top_k=st.sampled_from([0, 1, 5, 300]),
    min_p=st.sampled_from([0, 0.001, 0.1, 1]),
    presence_penalty=st.sampled_from([0, 1.5]),
    frequency_penalty=st.sampled_from([0, -0.5]),
)


@hypothesis.settings(max_examples=50)
@given(st.lists(settings, min_size=1, max_size=4), st.sampled_from([7, 300, 2000]), st.integers(0, 9), st.data())
def test_every_way_is_the_plain_loop(lanes, width, seed, data):
    rng = torch.Generator().manual_seed(seed)
    few = data.draw(st.sampled_from([8, 10_000]))  # with the likeliest first, or all at once
    logits = 3 * torch.randn(len(lanes), width, dtype=torch.float64, generator=rng)
    counts = torch.randint(0, 3, logits.shape, generator=rng).float()
    uniform = torch.rand(len(lanes), dtype=torch.float64, generator=rng).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "FEW", few)
        found = chosen(logits, lanes, uniform, counts)
    assert found == [plainly(*lane) for lane in zip(logits, lanes, uniform, counts, strict=True)]


@pytest.mark.parametrize("few", [8, 10_000])
def test_equal_logits_stay_together(monkeypatch, few):
    """Those of bfloat16 are often equal: what is left does not depend on how they are sorted."""
    monkeypatch.setattr(sampling, "FEW", few)
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    logits[0, [3, 500, 999]] = 5
    for how in (Sampling(top_k=1), Sampling(top_p=0.05), Sampling(top_k=2), Sampling(min_p=0.01), Sampling(min_p=1)):
        assert [chosen(logits, [how], [u])[0] for u in (0, 0.4, 0.999)] == [3, 500, 999]
    assert chosen(logits, [Sampling(0)], [0.9]) == [3]
    assert len({chosen(logits, [Sampling(top_k=4)], [u / 50])[0] for u in range(50)}) > 20


def test_a_share_of_one_is_a_token_that_is_left():
    logits = torch.tensor([[0.0, 9.0, 8.0, 0.0, 0.0]])
    assert chosen(logits, [Sampling(top_k=2)], [1 - 2**-53]) == [2]


def test_where_a_choice_is_recorded_it_asks_for_no_number():
    """What waits for the device cannot be recorded; on "meta" there are no numbers. Its first use takes seconds."""
    like = {"device": "meta"}
    settings, uniform = torch.zeros(2, 7, **like), torch.zeros(2, dtype=torch.float64, **like)
    for needs in (
        Needs(True, True, True, True, True, False),
        Needs(False, True, *[False] * 4),
        Needs(True, *[False] * 5),
    ):
        token = choose(torch.zeros(2, 9000, **like).bfloat16(), settings, uniform, needs, torch.zeros(2, 9000, **like))
        assert token.shape == (2,) and token.dtype == torch.int64


def test_shares():
    logits, rng = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.Generator().manual_seed(0)

    def seen(**kwargs):
        how = Sampling(**kwargs)
        return {chosen(logits, [how], [float(torch.rand((), generator=rng))])[0] for _ in range(200)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.5) == {0}
    assert seen(top_p=0.65) == {0, 1}
    assert seen(temperature=0) == {0}
    assert [seen(min_p=share) for share in (0.1, 0.2, 0.5)] == [{0, 1, 2}, {0, 1}, {0}]
    assert seen(min_p=0.1, temperature=0.5) == {0, 1}
    assert seen(min_p=0.1, top_k=2) == seen(min_p=0.1, top_p=0.65) == seen(min_p=0.2, top_p=0.99) == {0, 1}
    many = torch.rand(10_000, dtype=torch.float64, generator=rng).tolist()
    found = torch.bincount(torch.tensor(chosen(logits.expand(10_000, -1), [Sampling()] * 10_000, many)))
    assert torch.allclose(found / 10_000, logits[0].softmax(-1), atol=0.015)


def test_settings_are_checked():
    for bad in ({"top_p": 0}, {"top_p": 1.1}, {"temperature": -1}, {"top_k": -1}, {"min_p": -0.1}, {"min_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)
    for name in ("temperature", "presence_penalty", "frequency_penalty"):
        for value in (1e31, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=name):
                Sampling(**{name: value})
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=str(seed)):
            random_numbers(seed)


def test_settings_at_their_ends_still_give_a_token():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    best, counts = int(logits.argmax()), torch.zeros(1, 50)
    counts[0, 3], counts[0, 4] = 1000, 1
    for temperature in (1e-300, 1e-45, 1e-39, 1e-7, 1e-6):
        assert chosen(logits * 1e3, [Sampling(temperature)], [0.99]) == [best]
    for penalty in (1e30, -1e30):
        for setting in ("presence_penalty", "frequency_penalty"):
            for temperature in (0, 1):
                how = replace(Sampling(temperature), **{setting: penalty})
                assert (chosen(logits, [how], [0.5], counts)[0] in (3, 4)) == (penalty < 0)
