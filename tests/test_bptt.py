"""Chunked = whole, packed documents = one at a time, sweep = plain backprop: losses, states and every gradient."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import GENERATIONS, assert_close_rel, head_as_on_a_gpu, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_train.bptt import chunked_loss
from rwkv_train.models.state import State

T = 37


def text(model, lanes=2, length=T, seed=0, resets=(9, 10, 20)):
    """tokens, targets with gaps, a carried state, and document starts in the middle."""
    rng = torch.Generator().manual_seed(seed)
    v = model.config.vocab_size
    tokens = torch.randint(0, v, (lanes, length), generator=rng)
    targets = torch.randint(0, v, (lanes, length), generator=rng)
    targets[0, 3:8] = -100
    reset = torch.zeros(lanes, length, dtype=torch.bool)
    reset[0, [r for r in resets if r < length]] = True
    warm = torch.randint(0, v, (lanes, 5), generator=rng)
    with torch.no_grad():
        state = model(warm)[1]
    return tokens, targets, State(*(s.requires_grad_() for s in state)), reset


def gradients(model, data, state_weight=True, **kwargs):
    """(loss, state, gradients to every parameter and to the incoming state), with cotangents on the state too."""
    tokens, targets, state, reset = data
    loss, _, out = chunked_loss(model, tokens, targets, state, reset, **kwargs)
    rng = torch.Generator().manual_seed(1)
    total = loss * 0.3
    if state_weight:
        for part in out:
            total = total + (torch.randn(part.shape, generator=rng, dtype=part.dtype) * part).sum()
    names = [n for n, _ in model.named_parameters()] + list(State._fields)
    grads = torch.autograd.grad(total, [*model.parameters(), *state])
    return loss, out, dict(zip(names, grads, strict=True))


def assert_same(ours, theirs, tol):
    assert_close_rel(ours[0], theirs[0], tol, "loss")
    for name, a, b in zip(State._fields, ours[1], theirs[1], strict=True):
        assert_close_rel(a, b, tol, f"state.{name}")
    for name, g in theirs[2].items():
        assert_close_rel(ours[2][name], g, tol, f"gradient of {name}")


@pytest.mark.parametrize("chunk_len", [1, 7, 16, T])
@pytest.mark.parametrize("recompute", [True, False])
def test_chunked_is_whole(chunk_len, recompute, generation):
    model = random_model(dtype=torch.float64, generation=generation)
    data = text(model)
    whole = gradients(model, data, chunk_len=T, recompute=False)
    assert_same(gradients(model, data, chunk_len=chunk_len, recompute=recompute), whole, 1e-10)


def test_logits_in_chunks_are_the_whole_logits(generation):
    model = random_model(dtype=torch.float64, generation=generation)
    tokens, _, state, reset = text(model)
    whole, end = model(tokens, state, reset)
    for chunk_len in (1, 7, 16):
        parts, s = [], state
        for i in range(0, T, chunk_len):
            logits, s = model(tokens[:, i : i + chunk_len], s, reset[:, i : i + chunk_len])
            parts.append(logits)
        assert_close_rel(torch.cat(parts, 1), whole, 1e-10, "logits")
        for a, b in zip(s, end, strict=True):
            assert_close_rel(a, b, 1e-10, "state")


def test_checkpointed_blocks_change_nothing(generation):
    model = random_model(dtype=torch.float64, generation=generation)
    data = text(model)
    for chunk_len in (T, 8):
        ours = gradients(model, data, chunk_len=chunk_len, checkpoint_blocks=True)
        assert_same(ours, gradients(model, data, chunk_len=chunk_len), 1e-12)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 99))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_packed_documents_are_the_documents_one_at_a_time(generation, lengths, chunk_len, seed):
    model = random_model(dtype=torch.float64, generation=generation)
    rng = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, 31, (1, n), generator=rng) for n in lengths]
    targets = [torch.randint(0, 31, (1, n), generator=rng) for n in lengths]
    reset = torch.cat([torch.arange(n)[None] == 0 for n in lengths], 1)
    start = text(model, lanes=1)[2].detach()  # what an earlier document left behind, to be forgotten
    packed, n, state = chunked_loss(model, torch.cat(documents, 1), torch.cat(targets, 1), start, reset, chunk_len)
    packed.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    single, last = 0, None
    for tokens, target in zip(documents, targets, strict=True):
        loss, _, last = chunked_loss(model, tokens, target, None, None, chunk_len=99)
        loss.backward()
        single += loss.detach()
    assert n == sum(lengths)
    assert_close_rel(packed, single, 1e-10, "loss")
    for a, b in zip(state, last, strict=True):
        assert_close_rel(a, b, 1e-10, "state")
    for name, p in model.named_parameters():
        assert_close_rel(ours[name], p.grad, 1e-10, name)


def test_detached_steps_lose_only_the_gradient_through_the_state(generation):
    """Truncated BPTT is the sum of its chunks' losses, each with a detached state."""
    model = random_model(dtype=torch.float64, generation=generation)
    tokens, targets, state, _ = text(model)
    whole, _, _ = chunked_loss(model, tokens, targets, state, None, chunk_len=8)
    s, total = state.detach(), 0
    for i in range(0, T, 8):
        loss, _, s = chunked_loss(model, tokens[:, i : i + 8], targets[:, i : i + 8], s, None, chunk_len=8)
        s = s.detach()
        total += loss.detach()
    assert_close_rel(total, whole, 1e-12)


def test_dropout_and_autocast_are_the_same_in_the_recomputation(generation):
    """The sweep's second forward must draw the same dropout and cast the same way as its first."""
    model = random_model(dropout=0.3, generation=generation).train()
    tokens, targets, state, reset = text(model)
    results = []
    for recompute in (True, False):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(gradients(model, (tokens, targets, state, reset), chunk_len=8, recompute=recompute))
    assert_same(results[0], results[1], 2e-2)  # bfloat16 sums the weights' gradients in another order
    assert results[0][0] == results[1][0]  # the losses agree to the bit


class Operations(TorchDispatchMode):
    """Calls `see` with each operation, its arguments and its result."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.see(function, args, result)
        return result


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_weights_are_cast_once_a_step_and_gradients_add_up_in_32_bits(generation, checkpoint_blocks):
    """As if every chunk had cast them."""
    model = random_model(generation=generation)
    names, cast = {p.data_ptr(): name for name, p in model.named_parameters()}, Counter()

    def see(function, args, result):
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            cast.update([names[args[0].data_ptr()]] if args[0].data_ptr() in names else [])

    data = text(model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with Operations(see):
            ours = gradients(model, data, chunk_len=5, checkpoint_blocks=checkpoint_blocks)
        theirs = gradients(model, data, chunk_len=5, recompute=False)
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and "emb" not in name and "r_k" not in name}
    assert set(cast) == matrices and set(cast.values()) == {1}
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_never_waits_for_it(monkeypatch, generation, precision):
    """No operation whose result the program has to know: on a CPU only the head asks which rows are trained."""
    waits = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
    model, found = random_model(generation=generation, dropout=0.1).train(), Counter()

    def see(function, args, result):
        masks = function is torch.ops.aten.index.Tensor and any(i.dtype == torch.bool for i in args[1] if i is not None)
        found.update([function._schema.name.removeprefix("aten::")] if masks else [])
        found.update({function._schema.name.removeprefix("aten::")} & waits)

    tokens, targets, state, reset = text(model)

    def step():
        with Operations(see), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss, n, _ = chunked_loss(model, tokens, targets, state, reset, 8, z_loss=1e-4)
            (loss / n).backward()

    step()
    assert found == {"_local_scalar_dense": 10, "index": 4}  # twice a chunk; the first of five has rows without target
    found.clear()
    head_as_on_a_gpu(monkeypatch)
    step()
    assert not found


def test_autocast_leaves_no_cast_weights_behind(generation):
    """Weights cast during the sweep's forward, outside any graph, must not serve a later loss."""
    model = random_model(generation=generation)
    tokens, targets, _, _ = text(model, resets=())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked_loss(model, tokens, targets, None, None, chunk_len=8)
        loss, _, _ = chunked_loss(model, tokens, targets, None, None, chunk_len=T)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters())


def test_hooks_fire_once_a_step(generation):
    """DDP and DeepSpeed count on it."""
    model = random_model(dtype=torch.float64, generation=generation)
    fired = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    chunked_loss(model, *text(model), chunk_len=5)[0].backward()
    assert sorted(fired) == sorted(n for n, _ in model.named_parameters())


def test_frozen_parameters_stay_without_gradient(generation):
    model = random_model(dtype=torch.float64, generation=generation)
    for name, p in model.named_parameters():
        p.requires_grad_("ffn.value" in name)
    data = text(model)
    chunked_loss(model, *data, chunk_len=5)[0].backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {n for n, p in model.named_parameters() if "ffn.value" in n}
    model.zero_grad()
    chunked_loss(model, *data, chunk_len=T, recompute=False)[0].backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close_rel(ours[name], p.grad, 1e-10, name)


def test_clear_errors():
    model = random_model()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="chunk_len"):
        chunked_loss(model, tokens, tokens, None, None, 0)
    with pytest.raises(ValueError, match="one shape"):
        chunked_loss(model, tokens, tokens[:, 1:], None, None, 2)
    with pytest.raises(ValueError, match="lanes"):
        model(tokens, model.empty_state(3))


@pytest.mark.parametrize(("generation", "long"), [("rwkv4", 16384), ("rwkv7", 16384)])
def test_peak_memory_is_that_of_one_chunk(generation, long):
    """256 x 4 layers, chunks of 512: a horizon of 16,384 tokens takes at most 1.05 times the memory of 2,048."""
    argv = [sys.executable, Path(__file__).parent / "tools" / "peak_memory.py"]
    outputs = [subprocess.check_output([*argv, str(n), generation], timeout=3000) for n in (2048, long)]
    short, peak = map(float, outputs)
    assert peak <= 1.05 * short
