"""What lies between the matrix products: the C++ kernels do what torch does, with all gradients."""

import pytest
import torch
from helpers import assert_close_rel
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops import build_cpu, elementwise
from rwkv_train.ops.elementwise import cross_entropy_, gate, squared_relu, token_shift_mix

pytestmark = pytest.mark.skipif(build_cpu.load()[0] is None, reason="no C++ compiler")

TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


def in_torch(function, *arguments, **settings):
    """The specification: the same function without its kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "_kernels_for", lambda x: False)
        return function(*arguments, **settings)


def both_ways(function, tensors, rng, tolerance):
    """Results and gradients of both routes, for random gradients that arrive."""
    found = []
    for route in (lambda *a: function(*a), lambda *a: in_torch(function, *a)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = route(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        arriving = [torch.randn(o.shape, generator=rng.manual_seed(1), dtype=o.dtype) for o in out]
        found.append([*out, *torch.autograd.grad(out, leaves, arriving)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close_rel(ours, theirs, tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 63, 64, 65, 130]), st.sampled_from([1, 7, 256, 300]), st.integers(1, 6),
    st.integers(0, 99), st.sampled_from([torch.float64, torch.float32]), st.booleans(),
)  # fmt: skip
def test_token_shift_mix(B, T, C, mixes, seed, dtype, resets):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    reset = torch.rand(B, T, generator=rng) < 0.2 if resets else None
    tensors = [draw(B, T, C), draw(B, C), *(draw(1, 1, C) for _ in range(mixes))]
    mixed = lambda x, last, *m: token_shift_mix(x, last, reset, *m)  # noqa: E731
    both_ways(mixed, tensors, rng, 1e-13 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("function", [squared_relu, gate])
def test_activations(function, dtype, tolerance):
    rng = torch.Generator().manual_seed(0)
    for shape in ((1,), (3, 5, 7), (2, 1 << 15)):
        tensors = [(30 * torch.randn(shape, generator=rng)).to(dtype) for _ in range(2)]
        both_ways(function, tensors[: 1 if function is squared_relu else 2], rng, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_mixes_come_in_the_dtype_of_the_products(dtype):
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 70, 9, generator=rng), torch.randn(2, 9, generator=rng), torch.rand(9, generator=rng)]
    with torch.autocast("cpu", dtype=dtype):
        both_ways(lambda x, last, m: token_shift_mix(x, last, None, m), tensors, rng, 1e-2)
        assert token_shift_mix(*tensors[:2], None, tensors[2])[0].dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("size", [(1, 1), (0, 5), (3, 63), (5, 200), (70, 2001)])
def test_cross_entropy(size, z_loss, dtype, tolerance):
    rng = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(size, generator=rng, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, size[1], (size[0], 3), generator=rng)[:, 1]  # which does not lie in one piece
    ours, theirs = logits.clone(), logits.clone()
    nll = cross_entropy_(ours, targets, z_loss)
    assert_close_rel(nll, in_torch(cross_entropy_, theirs, targets, z_loss), 1e-6 if dtype != torch.float64 else 1e-13)
    assert_close_rel(ours, theirs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_of_an_ignored_row_is_zero_and_the_others_are_as_without_it(z_loss, dtype, tolerance):
    rng = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(7, 70, generator=rng, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, 70, (7,), generator=rng)
    ignored = torch.tensor([True, False, False, True, False, False, True])
    targets[ignored] = -100
    logits[3] = float("nan")
    without, kept = logits[~ignored], targets[~ignored]
    nll = cross_entropy_(without, kept, z_loss)
    for run in (cross_entropy_, lambda *args: in_torch(cross_entropy_, *args)):
        ours = logits.clone()
        found = run(ours, targets, z_loss)
        assert not found[ignored].any() and not ours[ignored].any()
        assert_close_rel(found[~ignored], nll, 1e-6 if dtype != torch.float64 else 1e-13)
        assert_close_rel(ours[~ignored], without, tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value):
    logits = torch.zeros(2, 130)
    logits[1, 77] = value
    nll = cross_entropy_(logits, torch.tensor([0, 1]))
    assert nll.isfinite().tolist() == [True, False]
    x = torch.tensor([1.0, value])
    assert not squared_relu(x)[1].isfinite() and not gate(torch.ones(2), x)[1].isfinite()
    bf16 = gate(torch.ones(2, dtype=torch.bfloat16), x.bfloat16())
    assert not bf16[1].isfinite() and bf16[0].isfinite()
