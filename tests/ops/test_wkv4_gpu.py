"""The CUDA kernels on a GPU: against the reference, to the bit, in CUDA graphs, under torch.compile."""

import functools

import pytest
import torch
from test_wkv4 import assert_close, cotangents, draw, resets_at, run

from rwkv_train.ops import wkv4_cuda
from rwkv_train.ops.backends import pick
from rwkv_train.ops.wkv4 import BACKENDS, wkv4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on(device, args):
    return [x.to(device) for x in args]


def to_cpu(values):
    return {name: x.cpu() for name, x in values.items()}


@pytest.mark.parametrize("path", ["serial", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 7), (3, 300, 66), (1, 1025, 130), (4, 301, 2050)])
def test_equals_reference(path, dtype, shape):
    B, T, C = shape
    args, (gy, gstate), reset = draw(B, T, C), cotangents(B, T, C), resets_at(B, T, 7, 8, 60, 300, -1)
    if dtype != torch.float64:
        args = [x.to(dtype).float() for x in args]
        gy = gy.to(dtype)
    want = run("reference", [x.double() for x in args], reset, gy.double(), gstate)
    w, u, k, v, state = on("cuda", args)
    args = (w, u, k.to(dtype), v.to(dtype), state)
    op = functools.partial(wkv4_cuda.wkv4, path=path)
    got = to_cpu(run(op, args, reset.cuda(), gy.cuda(), gstate.cuda()))
    if dtype == torch.float64:
        assert_close(got, want, 1e-10, floor=1e-3)
    else:
        stored = {torch.bfloat16: 4e-3, torch.float16: 6e-4}.get(dtype, 2e-4)
        assert_close(got, want, 2e-4, floor=1e-2, ge=1e-2, gw=5e-4, y=stored, gk=stored, gv=stored)
    again = to_cpu(run(op, args, reset.cuda(), gy.cuda(), gstate.cuda()))
    assert all(torch.equal(again[name], got[name]) for name in got), "not the same to the bit"


def test_auto_is_the_kernels():
    device = torch.device("cuda", torch.cuda.current_device())
    assert pick("wkv4", BACKENDS, "auto", device, torch.float32) is wkv4_cuda.wkv4
    args = on(device, [x.float() for x in draw(1, 40, 6)])
    with pytest.raises(ValueError, match='backend "cpu" needs tensors on the CPU'):
        wkv4(*args, backend="cpu")
    y, state = wkv4(*args)
    want = wkv4(*on("cpu", args), backend="reference")
    torch.testing.assert_close((y.cpu(), state.cpu()), want, rtol=1e-4, atol=1e-4)


def test_graph_replays_with_other_inputs():
    B, T, C = 1, 520, 66
    first, second = ([x.float().cuda() for x in draw(B, T, C, seed=seed)] for seed in (0, 1))
    leaves = [x.clone().requires_grad_() for x in first]
    gy = torch.ones(B, T, C, device="cuda")

    def step():
        y, _ = wkv4_cuda.wkv4(*leaves, path="chunked")
        return y, *torch.autograd.grad(y, leaves, gy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for inputs in (first, second):
        with torch.no_grad():
            for leaf, x in zip(leaves, inputs, strict=True):
                leaf.copy_(x)
        graph.replay()
        replayed = [x.clone() for x in recorded]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_compiles_without_a_break():
    args = [x.float().cuda() for x in draw(2, 70, 66)]
    gy, gstate = (x.float().cuda() for x in cotangents(2, 70, 66))
    want = run(wkv4, args, None, gy, gstate)
    got = run(torch.compile(wkv4, fullgraph=True), args, None, gy, gstate)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_waits_for_nothing():
    leaves = [x.float().cuda().requires_grad_() for x in draw(1, 520, 66)]
    for debug_mode in (0, 2):  # the first time loads the kernels
        torch.cuda.set_sync_debug_mode(debug_mode)
        try:
            y, _ = wkv4_cuda.wkv4(*leaves)
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode(0)
