"""Scores by position against a loop over documents; generation against whole forwards."""

import math

import numpy as np
import pytest
import torch
from helpers import random_model
from runs import store_of

from rwkv_train.data.lanes import LaneBatches, split
from rwkv_train.evaluate import Scorer, position_table
from rwkv_train.generate import Sampling, generate_text, prefill
from rwkv_train.tokenizer import load_tokenizer

LENGTHS = [5, 70, 16, 33, 40]


def score(model, store, lanes, width, forget=False):
    batches = LaneBatches(store, split(store, 0)[0], tokens_per_row=width, lanes=lanes)
    scorer = Scorer(model, np.arange(model.config.vocab_size), forget)
    for n in range(len(batches)):
        scorer.add(batches[n])
    return scorer.score()


def small_store():
    store = store_of(LENGTHS)
    store.tokens = np.where(store.tokens == 0, 0, store.tokens * 7 % 30 + 1)  # into a vocabulary of 31
    store.mask = (np.arange(len(store.tokens)) % 5 != 0).astype(np.uint8)
    return store


@pytest.mark.parametrize(("lanes", "width"), [(1, 200), (2, 7), (4, 16)])
def test_score_is_that_of_each_document_alone(lanes, width, generation):
    model, store = random_model(dtype=torch.float64, generation=generation), small_store()
    ours = score(model, store, lanes, width)
    nats, counts, n_bytes = {}, {}, 0
    for start, n in zip(store.offsets, store.lengths, strict=True):
        text = torch.tensor(store.tokens[start : start + n])
        logits = model(torch.cat([torch.tensor([0]), text[:-1]])[None])[0].detach()
        nll = -logits[0].log_softmax(-1)[range(n), text]
        for i in range(n):
            if store.mask[start + i]:
                bucket = 0 if i < 16 else 16 * 2 ** int(math.log2(i / 16))
                nats[bucket] = nats.get(bucket, 0) + float(nll[i])
                counts[bucket] = counts.get(bucket, 0) + 1
                n_bytes += int(text[i])  # the fake byte length of token t is t
    rows = ours.by_position()
    assert [r[0] for r in rows] == sorted(nats)
    for first, _, loss, count in rows:
        assert (loss, count) == (pytest.approx(nats[first] / counts[first], rel=1e-12), counts[first])
    assert ours.loss == pytest.approx(sum(nats.values()) / sum(counts.values()))
    assert ours.perplexity == pytest.approx(math.exp(ours.loss))
    assert ours.bits_per_byte == pytest.approx(sum(nats.values()) / math.log(2) / n_bytes)
    assert "position" in position_table(ours, ours, width)


def test_nothing_scored_is_no_result():
    nothing = Scorer(random_model(), np.zeros(31, int)).score()
    assert math.isnan(nothing.loss) and math.isnan(nothing.perplexity)
    assert nothing.bits_per_byte is None and nothing.by_position() == []


def test_forgetting_differs_only_after_the_first_chunk():
    model, store = random_model(dtype=torch.float64), small_store()
    carried, dropped = score(model, store, 1, 16), score(model, store, 1, 16, forget=True)
    assert dropped.loss != carried.loss
    assert score(model, store, 1, 200, forget=True).loss == pytest.approx(score(model, store, 1, 200).loss)


def test_greedy_generation_is_the_argmax_of_whole_forwards(generation):
    model, tokenizer = random_model(vocab_size=257, generation=generation), load_tokenizer("bytes")
    text = "".join(generate_text(model, tokenizer, "hi", Sampling(temperature=0), 12))
    ids = [0, *tokenizer.encode("hi")]
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        if ids[-1] == 0:
            break
    assert text == tokenizer.decode(ids[3:])


def test_prefill_in_pieces_is_prefill_at_once(monkeypatch, generation):
    model = random_model(dtype=torch.float64, generation=generation)
    ids = list(range(20))
    whole = prefill(model, ids)
    monkeypatch.setattr("rwkv_train.generate.PREFILL", 3)
    parts = prefill(model, ids)
    for a, b in zip((whole[0], *whole[1]), (parts[0], *parts[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_sampling():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    rng = torch.Generator().manual_seed(0)

    def seen(**kwargs):
        return {Sampling(**kwargs)(logits, rng) for _ in range(200)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.5) == {0}
    assert seen(top_p=0.65) == {0, 1}
    assert seen(temperature=0) == {0}
    for bad in ({"top_p": 0}, {"temperature": -1}, {"top_k": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)
