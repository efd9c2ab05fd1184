"""The CUDA kernels of WKV-7, as in test_wkv4_cuda.py: compiled for GPUs that are not here, and run on the CPU."""

import itertools

import pytest
import torch
from host_gpu import check_compiles, needs_compiler, needs_cuda_core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_wkv7 import NAMES, assert_close, cotangents, draw, resets_at
from test_wkv7 import run as run_backend
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_train.ops import build_cuda, wkv7_cuda
from rwkv_train.ops.wkv7 import BACKENDS, wkv7

pytestmark = needs_compiler


@needs_cuda_core
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_kernels_compile_and_stay_in_registers(arch):
    for dtype, size in itertools.product((torch.bfloat16, torch.float32, torch.float64), (64, 128)):
        for variant in variants(dtype, size):
            check_compiles(variant, arch)
    check_compiles(wkv7_cuda.Variant(torch.float16, 64, 2), arch)


@needs_cuda_core
def test_the_largest_heads_fit_into_shared_memory():
    for dtype in (torch.float32, torch.float64):  # 16 bits are float32 there
        for variant in variants(dtype, wkv7_cuda.LARGEST):
            assert build_cuda.build(variant, "sm_80")[:4] == b"\x7fELF"


def variants(dtype, size):
    """Those that few heads take and many."""
    return {wkv7_cuda.Variant.of(torch.empty(lanes, 1, 1, size, dtype=dtype, device="meta")) for lanes in (1, 1 << 13)}


def test_many_heads_take_two_rows_a_thread_but_for_long_ones():
    counts = {(dtype, size): len(variants(dtype, size)) for dtype in build_cuda.TYPES for size in (64, 128, 256)}
    ones = {(torch.float64, 128), *((dtype, 256) for dtype in build_cuda.TYPES)}
    assert {key for key, n in counts.items() if n == 1} == ones
    assert wkv7_cuda.Variant.of(torch.empty(8, 1, 16, 64, device="meta")).rows == 2


@pytest.fixture
def run(on_cpu, monkeypatch):
    """As test_wkv7's, with the kernels in the place of the "torch" backend, and 1 or 2 rows a thread."""

    def run(args, reset, gy, gstate, splits=(), rows=1):
        with monkeypatch.context() as patch:
            patch.setitem(BACKENDS, "torch", wkv7_cuda.wkv7)
            patch.setattr(wkv7_cuda, "MANY", 0 if rows == 2 else 1 << 40)
            return run_backend("torch", args, reset, gy, gstate, splits)

    return run


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("N", [1, 16, 20, 64])
@pytest.mark.parametrize("T", [1, 2, 15, 33, 129])
@pytest.mark.parametrize("positions", [None, (0,), (7, 8, 15, 16, 63, 64, 65), (-1,), (0, 1, 31, -2)])
def test_equals_reference(run, rows, T, N, positions):
    B, H = 2, 2
    args, given = draw(B, T, H, N), tuple(cotangents(B, T, H, N))
    reset = None if positions is None else resets_at(B, T, *positions)
    want = run_backend("reference", args, reset, *given)
    assert_close(run(args, reset, *given, rows=rows), want, 1e-11)


@pytest.mark.parametrize(("slowest", "fastest"), [(0, -0.6065), (0, 0), (-0.6065, -0.6065), (-4.9, -5)])
@pytest.mark.parametrize("positions", [None, (20, 21, 50)])
def test_float32(run, slowest, fastest, positions):
    shape = 2, 200, 2, 64
    args = [x.float() for x in draw(*shape, slowest=slowest, fastest=fastest)]
    given, reset = tuple(cotangents(*shape)), None if positions is None else resets_at(2, 200, *positions)
    want = run_backend("reference", [x.double() for x in args], reset, *given)
    got = run(args, reset, *given)
    assert all(x.dtype == torch.float32 for x in got.values())
    assert_close(got, want, 1e-5 if fastest > -1 else 3e-4)  # gw is a difference, small where decays are strong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 7])
def test_16_bits_are_read_and_written_but_not_computed_with(run, dtype, size):
    shape = 2, 70, 2, size
    r, w, k, v, a, b, state = (x.float() for x in draw(*shape))
    r, k, v = (x.to(dtype) for x in (r, k, v))
    gy, gstate = cotangents(*shape)
    gy, reset = gy.to(dtype), resets_at(2, 70, 40)
    got = run((r, w, k, v, a, b, state), reset, gy, gstate)
    want = run_backend("reference", [x.double() for x in (r, w, k, v, a, b, state)], reset, gy.double(), gstate)
    assert {n for n in NAMES if got[n].dtype == dtype} == {"y", "gr", "gk", "gv"}
    rounded = {name: want[name].to(got[name].dtype).double() for name in NAMES}
    assert_close(got, rounded, 1e-3)
    assert_close({n: got[n] for n in NAMES}, {**got, **{n: want[n] for n in ("S", "gw", "ga", "gb", "gS")}}, 1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_order_of_threads_changes_no_bit(run, on_cpu, rows):
    shape = 2, 70, 2, 64
    args, given, reset = draw(*shape), tuple(cotangents(*shape)), resets_at(2, 70, 30)
    plain = run(args, reset, *given, rows=rows)
    on_cpu["descending"] = True
    turned = run(args, reset, *given, rows=rows)
    assert all(torch.equal(plain[name], turned[name]) for name in NAMES)
    assert on_cpu["launched"][-4:] == ["forward", "gradients", "reads", "writes"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_nobody_gives_equals_zeros(on_cpu, which):
    args, given = draw(2, 20, 2, 16), list(cotangents(2, 20, 2, 16))
    leaves = [x.requires_grad_() for x in args]
    results = wkv7_cuda.wkv7(*leaves, resets_at(2, 20, 9))
    got = torch.autograd.grad(results[which], leaves, given[which], retain_graph=True)
    given[1 - which] = torch.zeros_like(given[1 - which])
    assert all(torch.equal(x, y) for x, y in zip(got, torch.autograd.grad(results, leaves, given), strict=True))


def test_tensors_may_begin_anywhere_in_memory(on_cpu):
    """The kernels read 16 bytes at a time."""

    def moved(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    shape = 2, 20, 2, 16
    r, w, k, v, a, b, state, gy, gend = (x.float() for x in (*draw(*shape), *cotangents(*shape)))
    args, given = (r.bfloat16(), w, k.bfloat16(), v.bfloat16(), a, b, state, None), (gy.bfloat16(), gend)
    odd = [x if x is None else moved(x) for x in args]
    want, got = (torch.ops.rwkv_train.wkv7(*x, True) for x in (args, odd))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    want = torch.ops.rwkv_train.wkv7_backward(*args, *want[1:], *given)
    got = torch.ops.rwkv_train.wkv7_backward(*odd, *map(moved, got[1:]), *map(moved, given))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_long_sequences_stay_exact(run):
    """The gradient of w is found anew every ANCHOR tokens; in between rounding errors add up."""
    shape = 1, 3001, 1, 16
    for fastest in (0, -0.6065):
        args = [x.float() for x in draw(*shape, slowest=fastest, fastest=fastest)]
        args[2] = args[2] / 8  # without decay the state grows with every token
        given = tuple(cotangents(*shape))
        want = run_backend("cpu", [x.double() for x in args], None, *given)
        assert_close(run(args, None, *given), want, 1e-4)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_size_any_reset_any_split(run, data):
    sizes = zip((3, 150, 3, 33), "BTHN", strict=True)
    B, T, H, N = (data.draw(st.integers(1, most), name) for most, name in sizes)
    flags = data.draw(st.lists(st.integers(0, 9), min_size=B * T, max_size=B * T), "resets where 0")
    reset = torch.tensor(flags).view(B, T) == 0
    splits = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=2), "splits")) if T > 1 else ()
    args, given = draw(B, T, H, N), tuple(cotangents(B, T, H, N))
    want = run_backend("reference", args, reset, *given)
    assert_close(run(args, reset, *given, splits), want, 1e-10, floor=1e-3)


@pytest.mark.parametrize("with_reset", [False, True])
def test_operators_keep_what_torch_expects_of_them(on_cpu, with_reset):
    shape = 2, 40, 2, 16
    r, w, k, v, a, b, state = (x.float() for x in draw(*shape))
    r, k, v = (x.bfloat16() for x in (r, k, v))
    reset = resets_at(2, 40, 7) if with_reset else None
    leaves = [x.requires_grad_() for x in (r, w, k, v, a, b, state)]
    torch.library.opcheck(torch.ops.rwkv_train.wkv7.default, (*leaves, reset, True))
    _, end, removed = torch.ops.rwkv_train.wkv7(*leaves, reset, True)
    args = (*leaves, reset, end, removed, torch.randn_like(r), torch.randn_like(state))
    args = tuple(x if x is None else x.detach() for x in args)
    torch.library.opcheck(torch.ops.rwkv_train.wkv7_backward.default, args)


def test_torch_compile_takes_it_whole(run, monkeypatch):
    shape = 2, 40, 2, 16
    args, given, reset = draw(*shape), tuple(cotangents(*shape)), resets_at(2, 40, 9)
    want = run_backend("reference", args, reset, *given)
    monkeypatch.setitem(BACKENDS, "torch", wkv7_cuda.wkv7)
    compiled = torch.compile(lambda *a: wkv7(*a, reset, backend="torch"), backend="aot_eager", fullgraph=True)
    leaves = [x.requires_grad_() for x in args]
    y, state = compiled(*leaves)
    gradients = torch.autograd.grad((y, state), leaves, given)
    assert_close(dict(zip(NAMES, (y, state, *gradients), strict=True)), want, 1e-10)


def test_once_not_twice_and_inference_keeps_nothing(on_cpu):
    args = draw(1, 3, 1, 16)
    y, _ = wkv7_cuda.wkv7(*(x.requires_grad_() for x in args))
    (gk,) = torch.autograd.grad(y.square().sum(), args[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gk.sum().backward()
    assert torch.ops.rwkv_train.wkv7(*args, None, False)[2].numel() == 0
    with torch.no_grad():
        assert not wkv7_cuda.wkv7(*args)[0].requires_grad


def test_fake_tensors_have_the_shapes_and_dtypes():
    with FakeTensorMode():
        half = [torch.empty(2, 40, 3, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        full = [torch.empty(2, 40, 3, 16, device="meta") for _ in range(3)]
        (r, k, v), (w, a, b) = half, full
        y, end = wkv7_cuda.wkv7(r, w, k, v, a, b, torch.empty(2, 3, 16, 16, device="meta"))
        assert (y.shape, y.dtype, end.shape, end.dtype) == (r.shape, r.dtype, (2, 3, 16, 16), torch.float32)
        (gk,) = torch.autograd.grad(y.sum(), k)
        assert gk.shape == k.shape and gk.dtype == torch.bfloat16


def test_heads_that_are_too_large():
    with pytest.raises(ValueError, match="heads of 513 are too large for the CUDA kernels"):
        wkv7_cuda.wkv7(*(torch.zeros(1, 1, 1, 513) for _ in range(6)), torch.zeros(1, 1, 513, 513))
