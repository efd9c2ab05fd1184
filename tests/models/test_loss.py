"""The fused head loss against torch's own linear and cross entropy."""

import pytest
import torch
from helpers import assert_close_rel, head_as_on_a_gpu
from torch.nn import functional as F

from rwkv_train.models import loss as loss_module
from rwkv_train.models.loss import head_loss, token_nll


def inputs(n=13, c=5, v=11, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, c, generator=rng, dtype=torch.float64).requires_grad_()
    weight = torch.randn(v, c, generator=rng, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, v, (2, n), generator=rng)
    targets[0, ::3] = -100
    return x, weight, targets


def plain(x, weight, targets, z_loss=0.0):
    """The same loss from whole logits; z_loss as the term 0.5 z max^2 that its gradient stands for."""
    logits = F.linear(x, weight).flatten(0, 1)
    ce = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    top = logits[targets.flatten() != -100].max(-1).values
    return ce + 0.5 * z_loss * (top**2 - (top**2).detach()).sum()


@pytest.mark.parametrize("rows", ["dropped", "zero"])
@pytest.mark.parametrize("slice_size", [1, 40, 1 << 23])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_plain_cross_entropy(monkeypatch, slice_size, z_loss, rows):
    """rows without a target: dropped, as on a CPU, or kept with a loss and a gradient of zero, as on a GPU."""
    if rows == "zero":
        head_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(loss_module, "SLICE", {"cpu": slice_size, "cuda": slice_size})
    x, weight, targets = inputs()
    scale = 0.37  # an incoming gradient that is not 1, as under accumulation or loss scaling
    ours = head_loss(x, weight, targets, z_loss)
    theirs = plain(x, weight, targets, z_loss)
    assert_close_rel(ours, theirs, 1e-12, "loss")
    got = torch.autograd.grad(ours * scale, (x, weight))
    for a, b, name in zip(got, torch.autograd.grad(theirs * scale, (x, weight)), ("x", "weight"), strict=True):
        assert_close_rel(a, b, 1e-12, name)
    with torch.no_grad():
        assert_close_rel(head_loss(x, weight, targets, z_loss), theirs, 1e-12, "loss without a gradient")
    assert_close_rel(token_nll(x, weight, targets).sum(), theirs, 1e-12, "token_nll")


@pytest.mark.parametrize("rows", ["dropped", "zero"])
def test_nothing_trained_is_a_zero_on_the_graph(monkeypatch, rows):
    if rows == "zero":
        head_as_on_a_gpu(monkeypatch)
    x, weight, targets = inputs()
    loss = head_loss(x, weight, torch.full_like(targets, -100))
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert x.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_frozen_head_still_gives_the_input_its_gradient():
    x, weight, targets = inputs()
    head_loss(x, weight.detach(), targets).backward()
    want = torch.autograd.grad(plain(x, weight, targets), x)[0]
    assert_close_rel(x.grad, want, 1e-12)


@pytest.mark.parametrize("rows", ["dropped", "zero"])
def test_the_weights_gradient_of_many_slices_adds_up_in_32_bits(monkeypatch, rows):
    """Of 16-bit products; one slice of 40 logits is three rows."""
    if rows == "zero":
        head_as_on_a_gpu(monkeypatch)
    x, weight, targets = inputs()
    x, weight = (t.detach().bfloat16().float().requires_grad_() for t in (x, weight))
    found = []
    for size in (40, 1 << 20):
        monkeypatch.setattr(loss_module, "SLICE", {"cpu": size, "cuda": size})
        with torch.autocast("cpu", torch.bfloat16):
            (gradient,) = torch.autograd.grad(head_loss(x, weight, targets), weight)
        found.append(gradient)
    assert found[0].dtype == torch.float32
    assert_close_rel(found[0], found[1], 1e-6 if rows == "zero" else 5e-3)  # a CPU rounds each slice's to 16 bits
