"""The CUDA kernels of WKV-7 on a GPU: against the reference, to the bit, and without waiting for the device."""

import pytest
import torch
from test_wkv7 import NAMES, assert_close, cotangents, draw, resets_at, run

from rwkv_train.ops import wkv7_cuda
from rwkv_train.ops.wkv7 import wkv7

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 33, 2, 7), (2, 300, 3, 64), (1, 1025, 2, 128)])
def test_equals_reference(monkeypatch, rows, dtype, shape):
    monkeypatch.setattr(wkv7_cuda, "MANY", 0 if rows == 2 else 1 << 40)
    check(dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_heads_as_auto_runs_them(dtype):
    shape = (8, 70, 64, 64)
    assert wkv7_cuda.Variant.of(torch.empty(*shape, dtype=dtype, device="meta")).rows == 2
    check(dtype, shape)


def check(dtype, shape):
    B, T, _, _ = shape
    args, (gy, gstate), reset = draw(*shape), cotangents(*shape), resets_at(B, T, 7, 8, 60, 64, 300, -1)
    r, w, k, v, a, b, state = args if dtype == torch.float64 else [x.float() for x in args]
    r, k, v, gy = (x.to(dtype) for x in (r, k, v, gy))
    args = (r, w, k, v, a, b, state)
    want = run("reference", [x.double() for x in args], reset, gy.double(), gstate)
    there = [x.cuda() for x in args], reset.cuda(), gy.cuda(), gstate.cuda()
    got, again = run("cuda", *there), run("cuda", *there)
    assert all(torch.equal(again[name], got[name]) for name in NAMES), "not the same to the bit"
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 4e-3, torch.float16: 6e-4}.get(dtype, 1e-4)
    assert_close({name: x.cpu() for name, x in got.items()}, want, tolerance, floor=1e-2)


def test_auto_compiles_without_a_break_and_waits_for_nothing():
    leaves = [x.float().cuda().requires_grad_() for x in draw(1, 200, 2, 64)]
    want = wkv7(*leaves, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(want, torch.compile(wkv7, fullgraph=True)(*leaves), strict=True))
    torch.cuda.set_sync_debug_mode(2)
    try:
        y, _ = wkv7(*leaves)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(0)
