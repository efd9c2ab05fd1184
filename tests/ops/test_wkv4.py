"""WKV-4: every backend against the plain recurrence, results and all gradients."""

import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops import build_cpu
from rwkv_train.ops.wkv4 import empty_state, wkv4

NAMES = ("y", "a", "b", "e", "gw", "gu", "gk", "gv", "ga", "gb", "ge")
needs_compiler = pytest.mark.skipif(not build_cpu.available(), reason="no C++ compiler")
KERNELS = [pytest.param("cpu", marks=needs_compiler), "torch"]
ALL = ["reference", *KERNELS]


def draw(B, T, C, key_std=2.0, seed=0):
    """w, u, k, v and a state with a past, all float64."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    state = torch.stack((normal(B, C), normal(B, C).exp(), normal(B, C) * key_std), 1)
    return -torch.exp(normal(C) - 1), normal(C), normal(B, T, C) * key_std, normal(B, T, C), state


def resets_at(B, T, *positions):
    """[B, T] bool, True in the last lane at those positions (from the end if negative) that exist."""
    reset = torch.zeros(B, T, dtype=torch.bool)
    for t in positions:
        if -T <= t < T:
            reset[-1, t] = True
    return reset


def run(backend, args, reset, gy, gstate, splits=()):
    """Results and gradients by name, with the sequence cut at `splits` and the state carried across.

    `backend` is the name of one, or a function like wkv4.
    """
    op = functools.partial(wkv4, backend=backend) if isinstance(backend, str) else backend
    leaves = [x.detach().clone().requires_grad_() for x in args]
    w, u, k, v, state = leaves
    T, ys = k.shape[1], []
    for start, end in zip((0, *splits), (*splits, T), strict=True):
        part = None if reset is None else reset[:, start:end]
        y, state = op(w, u, k[:, start:end], v[:, start:end], state, part)
        ys.append(y)
    y = torch.cat(ys, 1)
    *grads, gstate0 = torch.autograd.grad((y, state), leaves, (gy.to(y.dtype), gstate.to(state.dtype)))
    values = (y.detach(), *state.detach().unbind(1), *grads, *gstate0.unbind(1))
    return dict(zip(NAMES, values, strict=True))


def assert_close(got, want, tolerance, floor=1e-30, **loose):
    """Tensor by tensor, the norm of the difference over the norm."""
    for name in NAMES:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm().clamp(min=floor)
        limit = loose.get(name, tolerance)
        assert error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.0e}"


def cotangents(B, T, C, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, C, generator=g, dtype=torch.float64) for n in (T, 3))


def test_reference_is_the_formula_of_the_paper():
    B, T, C = 2, 9, 3
    w, u, k, v, _ = draw(B, T, C)
    y, _ = wkv4(w, u, k, v, empty_state(B, C, dtype=torch.float64), backend="reference")
    for t in range(T):
        past = torch.exp(torch.arange(t - 1, -1, -1)[:, None] * w + k[:, :t])
        now = torch.exp(u + k[:, t])
        expected = ((past * v[:, :t]).sum(1) + now * v[:, t]) / (past.sum(1) + now)
        torch.testing.assert_close(y[:, t], expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("C", [1, 7, 40])
@pytest.mark.parametrize("T", [1, 2, 15, 63, 129])
@pytest.mark.parametrize("positions", [None, (0,), (7, 8, 60), (-1,), (0, 1, 31, 32, -2, -1)])
def test_equals_reference(backend, T, C, positions):
    B = 2
    args, (gy, gstate) = draw(B, T, C), cotangents(B, T, C)
    reset = None if positions is None else resets_at(B, T, *positions)
    want = run("reference", args, reset, gy, gstate)
    assert_close(run(backend, args, reset, gy, gstate), want, 1e-10)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("key_std", [1, 5, 40])
@pytest.mark.parametrize("positions", [None, (20, 21, 50)])
def test_float32(backend, key_std, positions):
    B, T, C = 2, 65, 270  # more than one block of channels in the kernel
    args, (gy, gstate) = draw(B, T, C, key_std), cotangents(B, T, C)
    reset = None if positions is None else resets_at(B, T, *positions)
    args = [x.float() for x in args]
    want = run("reference", [x.double() for x in args], reset, gy, gstate)
    got = run(backend, args, reset, gy, gstate)
    assert all(x.dtype == torch.float32 for x in got.values())
    assert_close(got, want, 1e-4, ge=1e-2)


@pytest.mark.parametrize("backend", KERNELS)
def test_chunks_with_carried_state_equal_the_whole(backend):
    B, T, C = 2, 1025, 5
    args, (gy, gstate) = draw(B, T, C), cotangents(B, T, C)
    reset = resets_at(B, T, 3, 500, 501)
    whole = run(backend, args, reset, gy, gstate)
    chunked = run(backend, args, reset, gy, gstate, splits=(1, 38, 167, 500, 777, 1024))
    assert_close(chunked, whole, 1e-10)


@pytest.mark.parametrize("backend", ALL)
def test_reset_separates_documents(backend):
    T, C = 41, 5
    w, u, k, v, state = draw(1, T, C)
    y, last = wkv4(w, u, k, v, state, resets_at(1, T, 17, 30), backend=backend)
    empty = empty_state(1, C, dtype=torch.float64)
    for start, end, before in ((0, 17, state), (17, 30, empty), (30, T, empty)):
        alone, after = wkv4(w, u, k[:, start:end], v[:, start:end], before, backend=backend)
        torch.testing.assert_close(y[:, start:end], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_passes_a_reset(backend):
    B, T, C = 1, 20, 3
    w, u, k, v, state = (x.requires_grad_() for x in draw(B, T, C))
    y, _ = wkv4(w, u, k, v, state, resets_at(B, T, 9), backend=backend)
    gk, gstate = torch.autograd.grad(y[:, 9:].square().sum(), (k, state))
    assert gk[:, :9].eq(0).all() and gstate.eq(0).all() and gk[:, 9:].ne(0).all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(backend, dtype):
    B, T, C = 2, 33, 7
    w, u, k, v, state = (x.float() for x in draw(B, T, C))
    gy, gstate = (x.float() for x in cotangents(B, T, C))
    half = [w, u.to(dtype), k.to(dtype), v.to(dtype), state]
    got = run(backend, half, None, gy.to(dtype), gstate)
    want = run(backend, [x.float() for x in half], None, gy.to(dtype).float(), gstate)
    assert got["y"].dtype == got["gk"].dtype == dtype and got["a"].dtype == torch.float32
    for name in NAMES:
        rounded = want[name].to(got[name].dtype)
        if backend == "cpu":  # a compiler may fuse other products and sums where bfloat16 is stored: a last bit
            rounding = 1e-6 if rounded.dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(got[name], rounded, rtol=rounding, atol=1e-6, msg=name)
        else:
            assert torch.equal(got[name], rounded), name


@pytest.mark.parametrize("backend", ALL)
def test_mixed_dtypes_and_layouts(backend):
    B, T, C = 2, 33, 7
    w, u, k, v, state = draw(B, T, C)
    want_y, want_state = wkv4(w, u, k, v.float(), state, backend=backend)
    assert want_y.dtype == want_state.dtype == torch.float64
    scattered = torch.stack((k, k), -1)[..., 1]
    turned = v.float().transpose(0, 2).contiguous().transpose(0, 2)
    y, after = wkv4(w, u, scattered, turned, state.transpose(1, 2).contiguous().transpose(1, 2), backend=backend)
    assert not scattered.is_contiguous() and torch.equal(y, want_y) and torch.equal(after, want_state)
    y, after = wkv4(w, u, k.bfloat16(), v, state.float(), backend=backend)
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float64


@pytest.mark.parametrize("backend", ALL)
def test_autocast_changes_nothing(backend):
    args, (gy, gstate) = [x.float() for x in draw(2, 17, 5)], cotangents(2, 17, 5)
    want = run(backend, args, None, gy, gstate)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(backend, args, None, gy, gstate)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


@pytest.mark.parametrize("backend", ALL)
def test_lanes_are_independent(backend):
    B, T, C = 3, 37, 5
    w, u, k, v, state = draw(B, T, C)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[1, 5] = reset[2, 0] = True
    y, after = wkv4(w, u, k, v, state, reset, backend=backend)
    for b in range(B):
        one = slice(b, b + 1)
        y1, after1 = wkv4(w, u, k[one], v[one], state[one], reset[one], backend=backend)
        torch.testing.assert_close((y[one], after[one]), (y1, after1), rtol=1e-13, atol=1e-13)


@needs_compiler
def test_threads_do_not_change_the_result():
    B, T, C = 2, 300, 512  # enough work for several threads
    args = [x.float() for x in draw(B, T, C)]
    gy, gstate = cotangents(B, T, C)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run("cpu", args, None, gy, gstate)
        torch.set_num_threads(3)
        three = run("cpu", args, None, gy, gstate)
        build_cpu.load()[0].wkv_use_team(None)
        own = run("cpu", args, None, gy, gstate)
    finally:
        torch.set_num_threads(before)
        build_cpu.load()[0].wkv_use_team(build_cpu._team())
    for name in NAMES:  # blocks of another width may round the last channels differently
        torch.testing.assert_close(three[name], one[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(own[name], three[name])
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        assert build_cpu._team(), "the kernels start threads of their own, which fight with torch's"


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend):
    args = [x.requires_grad_() for x in draw(2, 5, 2, key_std=1.0)]
    reset = resets_at(2, 5, 3)
    assert torch.autograd.gradcheck(lambda *x: wkv4(*x, reset, backend=backend), args)


@pytest.mark.parametrize("backend", ALL)
def test_a_gradient_on_one_result_only(backend):
    w, u, k, v, state = draw(2, 9, 3)
    gy, gstate = cotangents(2, 9, 3)
    k.requires_grad_()
    y, after = wkv4(w, u, k, v, state, backend=backend)
    only_y, only_state = (torch.autograd.grad(out, k, g, retain_graph=True)[0] for out, g in ((y, gy), (after, gstate)))
    both = torch.autograd.grad((y, after), k, (gy, gstate))[0]
    torch.testing.assert_close(only_y + only_state, both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
def test_no_second_derivative(backend):
    w, u, k, v, state = draw(1, 3, 2)
    y, _ = wkv4(w, u, k.requires_grad_(), v, state, backend=backend)
    (gk,) = torch.autograd.grad(y.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gk.sum().backward()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_may_be_minus_1e30(backend, dtype):
    w, u, k, v, _ = (x.to(dtype) for x in draw(2, 9, 3))
    ours, theirs = empty_state(2, 3, dtype=dtype), empty_state(2, 3, dtype=dtype)
    assert ours[0, :, 0].tolist() == [0, 0, torch.tensor(-1e38, dtype=dtype).item()]
    theirs[:, 2] = -1e30
    gy, gstate = cotangents(2, 9, 3)
    a, b = (run(backend, (w, u, k, v, state), None, gy, gstate) for state in (ours, theirs))
    assert all(torch.equal(a[name], b[name]) and a[name].isfinite().all() for name in NAMES)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_size_any_reset_any_split(data):
    B, T, C = (data.draw(st.integers(1, most), name) for most, name in ((3, "B"), (50, "T"), (9, "C")))
    flags = data.draw(st.lists(st.integers(0, 9), min_size=B * T, max_size=B * T), "resets where 0")
    reset = torch.tensor(flags).view(B, T) == 0
    splits = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=3), "splits")) if T > 1 else ()
    seed = data.draw(st.integers(0, 1000), "seed")
    args, (gy, gstate) = draw(B, T, C, seed=seed), cotangents(B, T, C, seed=seed + 1)
    want = run("reference", args, reset, gy, gstate)
    for backend in ("cpu", "torch") if build_cpu.available() else ("torch",):
        assert_close(run(backend, args, reset, gy, gstate, splits), want, 1e-10, floor=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": torch.zeros(4)}, r"w has shape \[4\], expected \[C\] = \[3\]"),
        ({"u": torch.zeros(1, 3)}, r"u has shape \[1, 3\], expected \[C\] = \[3\]"),
        ({"k": torch.zeros(5, 3)}, r"k has shape \[5, 3\], expected \[B, T, C\] with T >= 1"),
        ({"k": torch.zeros(2, 0, 3)}, r"k has shape \[2, 0, 3\], expected \[B, T, C\] with T >= 1"),
        ({"v": torch.zeros(2, 4, 3)}, r"v has shape \[2, 4, 3\], expected \[B, T, C\] = \[2, 5, 3\]"),
        ({"state": torch.zeros(2, 3)}, r"state has shape \[2, 3\], expected \[B, 3, C\] = \[2, 3, 3\]"),
        ({"v": torch.zeros(2, 5, 3, dtype=torch.long)}, r"v is torch.int64, expected a floating dtype"),
        ({"v": torch.zeros(2, 5, 3, device="meta")}, r"v is on meta, expected cpu, where k is"),
        (
            {"reset": torch.zeros(2, 4, dtype=torch.bool)},
            r"reset has shape \[2, 4\], expected \[B, T\] = \[2, 5\]",
        ),
        ({"reset": torch.zeros(2, 5)}, r"reset is torch.float32, expected torch.bool"),
        ({"backend": "cdua"}, r"unknown backend 'cdua', expected one of \"auto\", \"reference\""),
        ({"backend": "cuda"}, r"backend \"cuda\" needs tensors on a CUDA device, found cpu; use \"auto\""),
    ],
)
def test_errors_name_the_argument(change, message):
    good = dict(w=-torch.ones(3), u=torch.zeros(3), k=torch.zeros(2, 5, 3), v=torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=message):
        wkv4(**{**good, "state": empty_state(2, 3), **change})
