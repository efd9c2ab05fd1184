"""Products of two number formats: as in float64 of the same numbers, with the gradients of that product."""

import pytest
import torch
from helpers import assert_close_rel

from rwkv_train.models.base import Linear
from rwkv_train.models.loss import head_loss
from rwkv_train.models.quantised import BITS, quantise_layer
from rwkv_train.ops import products
from rwkv_train.ops.linear import linear, times

HALVES = (torch.bfloat16, torch.float16)
PAIRS = [(a, b) for a in (*HALVES, torch.float32) for b in (*HALVES, torch.float32) if {a, b} != set(HALVES)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(products, "PIECE", 100)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("dtypes", PAIRS)
def test_results_and_gradients_are_those_of_the_exact_product(dtypes, count, turned):
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 33, generator=rng).to(t) for n, t in zip((count, 21), dtypes, strict=True))
    weight = weight.t().contiguous() if turned else weight
    both = [t.double().requires_grad_() for t in (x, weight)]
    exact = both[0] @ (both[1] if turned else both[1].t())
    g = torch.randn(exact.shape, generator=rng).to(torch.promote_types(*dtypes))
    exact.backward(g.double())
    product = (lambda x, weight: times((x, weight))[0]) if turned else linear
    with torch.no_grad():
        few = product(x, weight)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = product(x, weight)
    y.backward(g)
    within = max(torch.finfo(t).eps for t in dtypes)
    for ours in (few, y):
        assert ours.dtype == torch.promote_types(*dtypes)
        assert_close_rel(ours.double(), exact, 3 * within)
    for ours, theirs in zip((x, weight), both, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_close_rel(ours.grad.double(), theirs.grad, 3 * within)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_loss_of_a_head_in_another_format_is_that_of_its_numbers(dtypes):
    rng = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, 33, generator=rng).to(t).requires_grad_() for n, t in zip((20, 21), dtypes, strict=True)
    )
    targets = torch.randint(0, 21, (20,), generator=rng)
    both = [t.detach().double().requires_grad_() for t in (x, weight)]
    torch.nn.functional.cross_entropy(both[0] @ both[1].t(), targets, reduction="sum").backward()
    head_loss(x, weight, targets).backward()
    for ours, theirs in zip((x, weight), both, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_close_rel(ours.grad.double(), theirs.grad, 10 * max(torch.finfo(t).eps for t in dtypes))
    plain = torch.nn.functional.cross_entropy(x.double() @ weight.double().t(), targets, reduction="sum")
    with torch.no_grad():
        assert head_loss(x, weight, targets).item() == pytest.approx(plain.item(), rel=1e-2)


def test_a_frozen_weight_leaves_no_copy_for_the_backward():
    weight = torch.randn(64, 33).bfloat16()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(40, 33, requires_grad=True), weight)
    assert max(t.numel() * t.element_size() for t in saved) <= weight.numel() * 2


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BITS)
def test_a_weight_in_few_bits_multiplies_as_what_it_stands_for(kind, dtype, turned):
    pytest.importorskip("torchao")
    layer = Linear(48, 20).to(dtype)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    plain = layer.weight.detach().clone()
    quantise_layer(layer, kind)
    whole = products.dequantised(layer.weight)
    assert_close_rel(whole.float(), plain.float(), {"int8": 0.02, "nf4": 0.15}[kind])
    if kind == "nf4":
        assert torch.equal(whole, layer.weight.get_original_weight())
    x = torch.randn(3, 20 if turned else 48, dtype=dtype, requires_grad=True)
    y = products.product(x, layer.weight, turned)
    y.float().sum().backward()
    exact = whole.double() if turned else whole.double().t()
    assert_close_rel(y.double(), x.double() @ exact, 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert_close_rel(x.grad.double(), exact.sum(1).expand(3, -1), 1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_an_odd_matrix_has_no_place_in_4_bits():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"a matrix of \[5, 3\] has an odd one; use int8"):
        quantise_layer(Linear(3, 5), "nf4")
