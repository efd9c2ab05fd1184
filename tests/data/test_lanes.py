"""Lanes: every document whole and in order, the batch of step n a pure function of n, the same on any ranks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import EOD, store_of

from rwkv_train.data.lanes import Documents, LaneBatches, Schedule, split, trained_tokens


def batches_of(store, documents=None, **kwargs):
    return LaneBatches(store, documents or split(store, 0)[0], **kwargs)


def lane_text(batches, row, steps):
    """One row of many steps, end to end: (inputs, targets, reset) as lists."""
    rows = [batches[n] for n in range(steps)]
    return [torch.cat([b[key][row] for b in rows]).tolist() for key in ("tokens", "targets", "reset")]


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(1, 4), st.integers(1, 9), st.integers(0, 5))
def test_lanes_are_whole_documents_end_to_end(lengths, lanes, width, seed):
    store = store_of(lengths)
    steps = 40
    batches = batches_of(store, tokens_per_row=width, lanes=lanes, seed=seed, steps=steps)
    texts = {tuple(store.tokens[o : o + n]) for o, n in zip(store.offsets, store.lengths, strict=True)}
    for row in range(lanes):
        inputs, targets, reset = lane_text(batches, row, steps)
        starts = [i for i, r in enumerate(reset) if r] + [len(targets)]
        assert starts[0] == 0
        for a, b in itertools.pairwise(starts[:-1]):  # the last document may be unfinished
            assert tuple(targets[a:b]) in texts
            assert inputs[a:b] == [EOD, *targets[a : b - 1]]


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_deals_every_document_once(lengths, seed, lanes):
    schedule = Schedule(np.array(lengths), lanes, seed, epochs=3)
    schedule.length()
    dealt = sorted(d for documents in schedule.documents for d in documents)
    assert dealt == sorted(list(range(len(lengths))) * 3)
    busiest = max(sum(lengths[d] for d in documents) for documents in schedule.documents)
    assert busiest <= 3 * sum(lengths) / lanes + max(lengths)  # no lane runs ahead by more than a document


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_batch_of_step_n_is_a_pure_function_of_n():
    store, options = store_of([7, 30, 1, 12, 19]), {"tokens_per_row": 8, "lanes": 3, "seed": 1, "steps": 50}
    in_order = [batches_of(store, **options)[n] for n in range(50)]
    walked = batches_of(store, **options)
    for n in (49, 0, 17, 3, 48):
        assert equal(walked[n], in_order[n])
    assert not equal(batches_of(store, **(options | {"seed": 2}))[0], in_order[0])
    with pytest.raises(IndexError):
        walked[50]


@pytest.mark.parametrize("masked", [False, True])
def test_one_rank_with_8_lanes_is_two_ranks_with_4(masked):
    store = store_of([17, 3, 40, 8, 8, 21, 5, 33, 12])
    if masked:
        store.mask = (np.arange(len(store.tokens)) % 3 == 0).astype(np.uint8)
    options = {"tokens_per_row": 6, "lanes": 8, "steps": 20, "accumulate": 2}
    one = batches_of(store, **options)
    ranks = [batches_of(store, **options) for _ in range(2)]
    for rank, batches in enumerate(ranks):
        batches.take(rank, 2)
    for n in range(20):
        whole, parts = one[n], [b[n] for b in ranks]
        for key in ("tokens", "targets", "reset", "position"):
            assert torch.equal(torch.cat([p[key] for p in parts]), whole[key])
        group = [one[m] for m in (n - n % 2, n - n % 2 + 1)]
        trained = sum(int((b["targets"] != -100).sum()) for b in group)
        assert [int(p["step_tokens"]) for p in parts] == [trained, trained]


def test_masks_apply_to_targets_as_they_are():
    store = store_of([5, 4])
    store.mask = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1], np.uint8)
    batches = batches_of(store, tokens_per_row=9, lanes=1)  # one pass, longest first
    assert batches[0]["targets"][0].tolist() == [-100, -100, 3, 4, EOD, -100, 1002, -100, EOD]
    assert batches[0]["tokens"][0].tolist() == [EOD, 1, 2, 3, 4, EOD, 1001, 1002, 1003]


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, st.integers(1, 4), st.integers(1, 9))
def test_one_pass_reads_every_token_once(lengths, lanes, width):
    store = store_of(lengths)
    batches = batches_of(store, tokens_per_row=width, lanes=lanes)
    seen = torch.cat([batches[n]["targets"].flatten() for n in range(len(batches))])
    assert sorted(seen[seen != -100].tolist()) == sorted(store.tokens.tolist())


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(1, 40))
def test_cut_keeps_the_text(lengths, longest):
    store = store_of(lengths)
    documents = split(store, 0)[0].cut(longest)
    assert documents.lengths.max() <= longest and documents.lengths.min() >= 1
    pieces = [store.tokens[s : s + n] for s, n in zip(documents.starts, documents.lengths, strict=True)]
    assert np.concatenate(pieces).tolist() == store.tokens.tolist()


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.floats(0, 0.9))
def test_split_shares_the_tokens_out(lengths, share):
    store = store_of(lengths)
    if sum(lengths) == 1 and share:
        with pytest.raises(ValueError, match="nothing can be held out"):
            split(store, share)
        return
    parts = split(store, share)
    assert all(p.tokens for p in parts) or not share
    seen = [range(s, s + n) for p in parts for s, n in zip(p.starts, p.lengths, strict=True)]
    assert sorted(i for r in seen for i in r) == list(range(len(store.tokens)))


def test_split_of_a_single_book_holds_out_its_end():
    train, val = split(store_of([1000]), 0.05)
    assert (train.starts.tolist(), train.lengths.tolist()) == ([0], [950])
    assert (val.starts.tolist(), val.lengths.tolist()) == ([950], [50])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.floats(0.01, 0.5), st.integers(1, 4), st.data())
def test_the_share_held_out_is_that_of_the_trained_tokens(lengths, share, every, data):
    """Between half of it and twice of it, in every text that has parts so small."""
    store = store_of(lengths)
    store.mask = (np.arange(len(store.tokens)) % every == 0).astype(np.uint8)
    for start, n in zip(store.offsets, store.lengths, strict=True):
        if data.draw(st.booleans()):
            store.mask[start : start + n] = 0
    store.mask[int(store.offsets[0])] = 1
    total = store.mask.sum()
    if max(trained_tokens(store, split(store, 0)[0])) < 2:
        return
    train, val = (trained_tokens(store, part).sum() for part in split(store, share))
    assert train + val == total and train
    wanted = max(1, share * total)
    assert wanted / 2 - 1 <= val <= 2 * wanted


def test_one_long_document_among_short_ones_is_not_what_is_held_out():
    lengths = [16] * 49
    lengths.insert(int(np.random.default_rng(0).permutation(50)[0]), 20_000)  # the one that is drawn first
    train, val = split(store_of(lengths), 0.02)
    assert set(val.lengths) == {16} and 0.015 < val.tokens / sum(lengths) < 0.025
    assert train.lengths.max() == 20_000


def test_documents_are_drawn_as_ever_where_that_is_about_the_share():
    train, val = split(store_of([20] * 100), 0.05)
    drawn = np.sort(np.random.default_rng(0).permutation(100)[:5])
    assert (val.starts // 20).tolist() == drawn.tolist() and len(train) == 95


def test_the_end_of_a_document_is_measured_in_trained_tokens():
    store = store_of([100])
    store.mask = np.zeros(100, np.uint8)
    store.mask[:40] = 1
    train, val = split(store, 0.1)
    assert (train.lengths.tolist(), val.starts.tolist(), val.lengths.tolist()) == ([36], [36], [64])


def test_a_part_that_trains_nothing_is_refused():
    store = store_of([5, 4])
    store.mask = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0], np.uint8)
    untrained = split(store, 0)[0].some(np.array([1]))
    for steps, what in ((None, "nothing to score"), (3, "nothing to train on")):
        with pytest.raises(ValueError, match=f"{what} in this part of memory: none of its 4 tokens is trained"):
            LaneBatches(store, untrained, tokens_per_row=4, lanes=1, steps=steps)
    store.mask[:] = 0
    with pytest.raises(ValueError, match="nothing can be held out"):
        split(store, 0.1)


def test_clear_errors():
    store = store_of([5, 2000])
    with pytest.raises(ValueError, match="does not fit the model's vocabulary of 1500"):
        batches_of(store, tokens_per_row=2000, lanes=1, vocab_size=1500)[0]
    with pytest.raises(ValueError, match="no documents"):
        LaneBatches(store, Documents(np.zeros(0, int), np.zeros(0, int)), tokens_per_row=4, lanes=1)
    with pytest.raises(ValueError, match="shared evenly"):
        batches_of(store, tokens_per_row=4, lanes=3, steps=1).take(0, 2)
