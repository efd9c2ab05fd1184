"""Tokens read from a tape: bit for bit those that are called."""

import pytest
import torch
from helpers import random_model

from rwkv_train.generation import reading
from rwkv_train.generation.prefill import prefill_all
from rwkv_train.generation.reading import Reader, read, size_for
from rwkv_train.models.adapters import tune

TOKENS = [3, 5, 1, 1, 8, 0, 2, 9]


def begun(model, lanes):
    return prefill_all(model, [[0, i] for i in range(lanes)], [None] * lanes)[1]


def assert_reads(model, reader, state, tokens, lanes=1):
    """As calls do, from a state on, which is not changed; the state after."""
    before = state.wkv.clone()
    with torch.no_grad():
        for token in tokens:
            token = (token + torch.arange(lanes)) % 10
            ours, (theirs, after) = reader(model, token), read(model, token, state, None)
            assert torch.equal(ours, theirs)
            assert all(map(torch.equal, reader.state, after))
            assert torch.equal(state.wkv, before)
            state, before = after, after.wkv.clone()
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_tape_reads_as_calls_do(generation, dtype, lanes):
    model = random_model(dtype=dtype, generation=generation).eval()
    state = begun(model, lanes)
    reader = Reader(state)
    assert_reads(model, reader, state, TOKENS, lanes)
    assert reader.taped


def test_adapters_are_read_from_a_tape_too(generation):
    model = random_model(dtype=torch.float32, generation=generation).eval()
    tune(model, "lora", 2)
    for name, p in model.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(p)
    state = begun(model, 1)
    reader = Reader(state)
    assert_reads(model, reader, state, TOKENS)
    assert reader.taped


@torch.no_grad()
def test_weights_that_change_or_move_are_seen(generation):
    model = random_model(dtype=torch.float32, generation=generation).eval()
    state = begun(model, 1)
    reader = Reader(state)
    state = assert_reads(model, reader, state, TOKENS)
    for p in model.parameters():
        p.mul_(0.9)
    state = assert_reads(model, reader, state, TOKENS)
    for p in model.parameters():
        p.data = p * 0.9
    assert reader.taped
    assert_reads(model, reader, state, TOKENS)
    assert reader.taped


def test_hooks_are_called_for_each_token():
    model, seen = random_model(dtype=torch.float32, generation="rwkv7").eval(), []
    state = begun(model, 1)
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    reader = Reader(state)
    assert_reads(model, reader, state, TOKENS)
    assert len(seen) == 2 * len(TOKENS) and not reader.taped


def test_where_nothing_can_be_recorded_it_is_said_and_called(monkeypatch, capsys):
    model = random_model(dtype=torch.float32, generation="rwkv7").eval()
    state = begun(model, 2)
    head = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda x: head(x) * x.new_ones(()).item())
    reader = Reader(state)
    assert_reads(model, reader, state, TOKENS, 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "something else each time" in err and not reader.taped


def test_a_tape_is_made_when_it_pays(monkeypatch):
    made = []
    capture = reading.tape.capture
    monkeypatch.setattr(reading.tape, "capture", lambda call: made.append(1) or capture(call))
    model = random_model(dtype=torch.float32, generation="rwkv4").eval()
    state = begun(model, 1)
    reader = Reader(state)
    assert_reads(model, reader, state, TOKENS[: reading.CALLED])
    assert not made
    reader = Reader(state)
    assert_reads(model, reader, state, TOKENS)
    assert len(made) == 1


def test_the_next_text_goes_on_with_the_tape_of_the_last(monkeypatch, generation):
    made = []
    capture = reading.tape.capture
    monkeypatch.setattr(reading.tape, "capture", lambda call: made.append(1) or capture(call))
    model = random_model(dtype=torch.float32, generation=generation).eval()
    for start in range(2):
        reader = Reader(begun(model, 1))
        assert_reads(model, reader, begun(model, 1), TOKENS[start:])
        reader.give_back(model)
    assert len(made) == 1
    first, second = Reader(begun(model, 1)), Reader(begun(model, 1))
    for reader in (first, second):
        assert_reads(model, reader, begun(model, 1), TOKENS)
        assert reader.taped
    assert len(made) == 2
    first.give_back(model)
    tune(model, "lora", 2)
    reader = Reader(begun(model, 1))
    assert_reads(model, reader, begun(model, 1), TOKENS[: reading.CALLED])
    assert not reader.taped


def test_sizes_serve_as_many_and_not_many_more():
    sizes = [size_for(n) for n in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(n <= size <= 1.5 * n for n, size in enumerate(sizes, 1))


@torch.no_grad()
def test_a_tape_serves_fewer_lanes_as_well(monkeypatch, generation):
    """Texts come and go at each token: after some of them there is a tape of every size, and none is made again."""
    made, rng = [], torch.Generator().manual_seed(0)
    capture = reading.tape.capture
    monkeypatch.setattr(reading.tape, "capture", lambda call: made.append(1) or capture(call))
    model = random_model(dtype=torch.float64, generation=generation).eval()
    for lanes in torch.randint(1, 9, (80,), generator=rng).tolist():
        state, token = begun(model, lanes), torch.arange(lanes) + 3
        reader = Reader(state)
        for _ in range(2):
            ours, (theirs, state) = reader(model, token).clone(), read(model, token, state, None)
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
            for part, expected in zip(reader.state, state, strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-11)
        reader.give_back(model)
    assert len(made) == 6 and reader.taped is None  # of 1, 2, 3, 4, 6 and 8 lanes
