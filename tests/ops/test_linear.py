"""Matrices times a few vectors: the C++ kernels give what torch gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rel
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops import build_cpu
from rwkv_train.ops.linear import MOST, linear, most_vectors, times

pytestmark = pytest.mark.skipif(build_cpu.load()[0] is None, reason="no C++ compiler")
WITHIN = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def counted(monkeypatch):
    """The shapes that torch multiplied, the kernel did not."""
    seen, theirs, plain = [], F.linear, torch.matmul
    monkeypatch.setattr(F, "linear", lambda x, weight: seen.append(tuple(x.shape)) or theirs(x, weight))
    monkeypatch.setattr(torch, "matmul", lambda x, weight: seen.append(tuple(x.shape)) or plain(x, weight))
    return seen


@pytest.fixture
def threads():
    """Sets their number; afterwards it is as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, MOST), st.sampled_from([1, 3, 4, 5, 17, 64, 66, 131]), st.sampled_from([1, 31, 32, 33, 64, 200]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_equals_the_product_in_float64(n, rows, width, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(k, width, generator=rng).to(dtype) for k in (n, rows))
    with torch.no_grad():
        got = linear(x, weight)
    assert got.dtype == dtype
    assert_close_rel(got.double(), x.double() @ weight.double().T, WITHIN[dtype])


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, MOST), st.sampled_from([1, 7, 32, 67, 255, 300]), st.sampled_from([1, 3, 4, 33, 66]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_times_equals_the_products_in_float64(n, columns, width, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.randn(n, 1, w, generator=rng).to(dtype), torch.randn(w, c, generator=rng).to(dtype))
        for w, c in ((width, columns), (2 * width, 5), (columns, width))
    ]
    with torch.no_grad():
        results = times(*pairs)
    for got, (x, weight) in zip(results, pairs, strict=True):
        assert got.dtype == dtype
        assert_close_rel(got.double(), x.double() @ weight.double(), WITHIN[dtype])


@pytest.mark.parametrize("n", [2, 5, 12, MOST])
@pytest.mark.parametrize("turned", [False, True])
def test_neither_company_nor_threads_change_a_bit(n, turned, monkeypatch, threads):
    rng, torchs = torch.Generator().manual_seed(0), counted(monkeypatch)
    x, weight = torch.randn(n, 1, 205, generator=rng), torch.randn(1505, 205, generator=rng)
    weight = weight.T.contiguous() if turned else weight
    product = (lambda x: times((x, weight), (x[:1], weight))[0]) if turned else (lambda x: linear(x, weight))
    with torch.no_grad():
        threads(3)
        together, alone = product(x), torch.stack([product(part) for part in x])
        threads(1)
        assert torch.equal(together, alone) and torch.equal(together, product(x))
    assert not torchs


def test_vectors_may_lie_anyhow():
    rng = torch.Generator().manual_seed(0)
    weight, turned, x = torch.randn(9, 40, generator=rng), torch.randn(40, 9), torch.randn(40, 6, generator=rng).T
    with torch.no_grad():
        assert torch.equal(linear(x, weight), linear(x.contiguous(), weight))
        assert torch.equal(times((x, turned))[0], times((x.contiguous(), turned))[0])


def test_torch_does_the_rest(monkeypatch):
    torchs, weight = counted(monkeypatch), torch.randn(3, 4, requires_grad=True)
    x = torch.randn(MOST + 1, 4)
    linear(x[:1], weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        linear(x, weight), linear(x[:1].double(), weight.double()), linear(x[:1], torch.randn(4, 3).T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x[:1], weight).dtype == torch.bfloat16
        assert linear(x[0], weight).shape == (3,) and linear(x[:0], weight).shape == (0, 3)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(x[:1, :3], weight)
        times((x[:1], weight.T), (x[:, :3], weight))
    times((x[:1, :3], weight))[0].sum().backward()
    assert torchs == [(1, 4), (17, 4), (1, 4), (1, 4), (1, 4), (0, 4), (1, 3), (1, 4), (17, 3), (1, 3)]


def test_where_the_cpu_multiplies_bfloat16_torch_soon_does_it():
    assert most_vectors(torch.float32) == MOST and most_vectors(torch.float64) == 0
    assert most_vectors(torch.bfloat16) in (2, MOST)
