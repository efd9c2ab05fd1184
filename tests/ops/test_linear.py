"""A matrix times a few vectors: the C++ kernel gives what torch gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rel
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops import build_cpu
from rwkv_train.ops.linear import MOST, linear

pytestmark = pytest.mark.skipif(build_cpu.load()[0] is None, reason="no C++ compiler")


def counted(monkeypatch):
    """The shapes that torch multiplied, the kernel did not."""
    seen, theirs = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: seen.append(tuple(x.shape)) or theirs(x, weight))
    return seen


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 16), st.sampled_from([1, 3, 4, 5, 64, 66, 131]), st.sampled_from([1, 31, 32, 33, 64, 200]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_equals_the_product_in_float64(n, rows, width, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(k, width, generator=rng).to(dtype) for k in (n, rows))
    with torch.no_grad():
        got = linear(x, weight)
    assert got.dtype == dtype
    assert_close_rel(got.double(), x.double() @ weight.double().T, 1e-6 if dtype == torch.float32 else 5e-3)


def test_neither_company_nor_threads_change_a_bit(monkeypatch):
    rng, torchs = torch.Generator().manual_seed(0), counted(monkeypatch)
    x, weight = torch.randn(5, 1, 200, generator=rng), torch.randn(3001, 200, generator=rng)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            together, alone = linear(x, weight), torch.stack([linear(part, weight) for part in x])
            torch.set_num_threads(1)
            assert torch.equal(together, alone) and torch.equal(together, linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert not torchs


def test_torch_does_the_rest(monkeypatch):
    torchs, weight = counted(monkeypatch), torch.randn(3, 4, requires_grad=True)
    x = torch.randn(MOST[torch.float32] + 1, 4)
    linear(x[:1], weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        linear(x, weight), linear(x[:1].double(), weight.double()), linear(x[:1], torch.randn(4, 3).T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x[:1], weight).dtype == torch.bfloat16
        assert linear(x[0], weight).shape == (3,) and linear(x[:0], weight).shape == (0, 3)
    assert torchs[:4] == [(1, 4), (17, 4), (1, 4), (1, 4)]
