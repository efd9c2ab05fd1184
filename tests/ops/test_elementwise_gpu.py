"""The elementwise CUDA kernels on a GPU: against torch in float64, to the bit, beyond 2^31 numbers, without waiting."""

import pytest
import torch
from helpers import assert_close_rel
from test_elementwise_cuda import OPERATIONS, TOLERANCES, draw, in_torch, results

from rwkv_train.ops.elementwise import IGNORE_INDEX, cross_entropy_, squared_relu, token_shift_mix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 33, 2, 7), (3, 301, 3, 64), (2, 1025, 16, 128), (1, 40, 2, 512)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_torch(operation, shape, dtype):
    function, tensors = draw(operation, shape, dtype, 1)
    there = draw(operation, shape, dtype, 1, "cuda")
    got, arriving = results(*there)
    again, _ = results(*there, arriving)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not the same to the bit"
    want = in_torch(function, tensors, [g.cpu() for g in arriving])
    for ours, right in zip(got, want, strict=True):
        assert_close_rel(ours.cpu(), right, 2 * TOLERANCES[dtype] if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_a_break_and_waits_for_nothing(operation):
    function, tensors = draw(operation, (2, 300, 2, 64), torch.float32, 1, "cuda")
    want, arriving = results(function, tensors)
    got, _ = results(torch.compile(function, fullgraph=True), tensors, arriving)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.cuda.set_sync_debug_mode(2)
    try:
        results(function, tensors, arriving)
    finally:
        torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [(3, 7), (70, 2001), (300, 65536)])
def test_cross_entropy(size, dtype):
    rng = torch.Generator().manual_seed(0)
    logits, targets = (5 * torch.randn(size, generator=rng)).to(dtype), torch.randint(size[1], size[:1], generator=rng)
    targets[1] = IGNORE_INDEX
    ours, right = logits.cuda(), logits.double()
    assert_close_rel(cross_entropy_(ours, targets.cuda(), 1e-3).cpu(), cross_entropy_(right, targets, 1e-3), 1e-5)
    assert_close_rel(ours.cpu(), right, max(2 * TOLERANCES[dtype], 1e-5))


def test_beyond_two_to_the_31(request):
    request.addfinalizer(torch.cuda.empty_cache)
    rows, C = (1 << 20) + 3, 2048
    x = torch.zeros(1, rows, C, dtype=torch.bfloat16, device="cuda")
    x[0, -40:] = end = torch.randn(40, C, device="cuda").bfloat16()
    assert torch.equal(squared_relu(x)[0, -40:], squared_relu(end))
    last, mix = end.new_zeros(1, C), torch.rand(C, device="cuda")
    y, _ = token_shift_mix(x, last, None, mix)
    assert torch.equal(y[:, -40:], token_shift_mix(end[None], last, None, mix)[0])
    del y
    targets = torch.arange(rows, device="cuda") % C
    alone = end.clone()
    nll = cross_entropy_(alone, targets[-40:])
    assert torch.equal(cross_entropy_(x[0], targets)[-40:], nll) and torch.equal(x[0, -40:], alone)
