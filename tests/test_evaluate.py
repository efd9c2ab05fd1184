"""Scores by position against a loop over documents; generation against whole forwards."""

import math

import numpy as np
import pytest
import torch
from helpers import random_model
from runs import store_of

from rwkv_train.data.lanes import LaneBatches, split
from rwkv_train.evaluate import Scorer, position_table

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
