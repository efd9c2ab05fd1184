"""WKV-7: every backend against the plain recurrence, results and all gradients."""

import functools
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops import build_cpu, wkv7_fla
from rwkv_train.ops.wkv7 import BACKENDS, wkv7

NAMES = ("y", "S", "gr", "gw", "gk", "gv", "ga", "gb", "gS")
needs_compiler = pytest.mark.skipif(not build_cpu.available(), reason="no C++ compiler")
KERNELS = [pytest.param("cpu", marks=needs_compiler), "torch"]
ALL = ["reference", *KERNELS]


def draw(B, T, H, N, seed=0, slowest=0.0, fastest=-0.6065):
    """r, w, k, v, a, b as a model makes them, and a state with a past, all float64."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    share = lambda: torch.rand(B, T, H, N, generator=g, dtype=torch.float64)  # noqa: E731
    kk = torch.nn.functional.normalize(normal(B, T, H, N), dim=-1)
    w = slowest + (fastest - slowest) * share()
    r, k, v = (normal(B, T, H, N) for _ in range(3))
    return r, w, k, v, -kk, kk * share(), normal(B, H, N, N)


def cotangents(B, T, H, N, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((B, T, H, N), (B, H, N, N)))


def resets_at(B, T, *positions):
    """[B, T] bool, True in the last lane at those positions (from the end if negative) that exist."""
    reset = torch.zeros(B, T, dtype=torch.bool)
    for t in positions:
        if -T <= t < T:
            reset[-1, t] = True
    return reset


def run(backend, args, reset, gy, gstate, splits=()):
    """Results and gradients by name, with the sequence cut at `splits` and the state carried across."""
    leaves = [x.detach().clone().requires_grad_() for x in args]
    *sequences, state = leaves
    T, ys = sequences[0].shape[1], []
    for start, end in zip((0, *splits), (*splits, T), strict=True):
        part = None if reset is None else reset[:, start:end]
        y, state = wkv7(*(x[:, start:end] for x in sequences), state, part, backend=backend)
        ys.append(y)
    y = torch.cat(ys, 1)
    gradients = torch.autograd.grad((y, state), leaves, (gy.to(y.dtype), gstate.to(state.dtype)))
    return dict(zip(NAMES, (y.detach(), state.detach(), *gradients), strict=True))


def assert_close(got, want, tolerance, floor=1e-30):
    """Tensor by tensor, the norm of the difference over the norm."""
    for name in NAMES:
        error = (got[name].double() - want[name].double()).norm() / want[name].double().norm().clamp(min=floor)
        assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"


def test_reference_is_the_formula_of_the_paper():
    """Written out as a product of transition matrices."""
    r, w, k, v, a, b, state = (x[0] for x in draw(1, 5, 2, 3))
    y, last = wkv7(*(x[None] for x in (r, w, k, v, a, b, state)), backend="reference")
    for h in range(2):
        S = state[h]
        for t in range(5):
            S = S @ (torch.diag(w[t, h].exp()) + torch.outer(a[t, h], b[t, h])) + torch.outer(v[t, h], k[t, h])
            torch.testing.assert_close(y[0, t, h], S @ r[t, h])
        torch.testing.assert_close(last[0, h], S)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("N", [1, 5, 16, 64])
@pytest.mark.parametrize("T", [1, 2, 15, 33])
@pytest.mark.parametrize("positions", [None, (0,), (7, 8, 15, 16), (-1,), (0, 1, 31, -2)])
def test_equals_reference(backend, T, N, positions):
    B, H = 2, 3
    args, (gy, gstate) = draw(B, T, H, N), cotangents(B, T, H, N)
    reset = None if positions is None else resets_at(B, T, *positions)
    want = run("reference", args, reset, gy, gstate)
    assert_close(run(backend, args, reset, gy, gstate), want, 1e-11)


@needs_compiler
@pytest.mark.parametrize("N", [5, 16, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_a_token_without_gradients_equals_reference_wherever_the_state_lies(N, dtype, tolerance):
    args, reset = draw(3, 1, 2, N), resets_at(3, 1, 0)
    *sequences, state = (x.to(dtype) for x in args)
    layers = torch.stack([state, 2 * state], 1)  # as in a model's state
    want = wkv7(*args, reset, backend="reference")
    for lies in (state, layers[:, 0], state.mT.contiguous().mT):
        got = wkv7(*sequences, lies, reset, backend="cpu")
        for ours, theirs in zip(got, want, strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
        alone = wkv7(*(x[:1] for x in sequences), lies[:1], None, backend="cpu")
        assert all(torch.equal(part[:1], whole) for part, whole in zip(got, alone, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("slowest", "fastest"), [(0, -0.6065), (0, 0), (-0.6065, -0.6065), (-4.9, -5)])
@pytest.mark.parametrize("positions", [None, (20, 21, 50)])
def test_float32(backend, slowest, fastest, positions):
    B, T, H, N = 2, 65, 2, 64
    args = [x.float() for x in draw(B, T, H, N, slowest=slowest, fastest=fastest)]
    gy, gstate = cotangents(B, T, H, N)
    reset = None if positions is None else resets_at(B, T, *positions)
    want = run("reference", [x.double() for x in args], reset, gy, gstate)
    got = run(backend, args, reset, gy, gstate)
    assert all(x.dtype == torch.float32 for x in got.values())
    assert_close(got, want, 1e-5 if fastest > -1 else 1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("slowest", "fastest"), [(-5, -9), (-15, -40), (0, -200)])
def test_the_cpu_kernel_takes_any_decay(slowest, fastest, dtype):
    args = [x.to(dtype) for x in draw(2, 40, 2, 16, slowest=slowest, fastest=fastest)]
    gy, gstate = cotangents(2, 40, 2, 16)
    reset = resets_at(2, 40, 3, 20, 21)
    want = run("reference", [x.double() for x in args], reset, gy, gstate)
    assert_close(run("cpu", args, reset, gy, gstate), want, 1e-4 if dtype == torch.float32 else 1e-11, floor=1)


@functools.cache
def long_sequence(fastest):
    """Arguments, cotangents, and what the reference makes of them in float64."""
    shape = 1, 6001, 1, 8
    args = [x.float() for x in draw(*shape, slowest=fastest, fastest=fastest)]
    args[2] = args[2] / 8  # without decay the state grows with every token
    given = tuple(cotangents(*shape))
    return args, given, run("reference", [x.double() for x in args], None, *given)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("fastest", [0, -0.6065])
def test_long_sequences_stay_exact(backend, fastest):
    """The state is carried, never found by running the recurrence backwards, which would divide by the decays."""
    args, given, want = long_sequence(fastest)
    assert_close(run(backend, args, None, *given), want, 1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_chunks_with_carried_state_equal_the_whole(backend):
    shape = 2, 205, 2, 5
    args, (gy, gstate) = draw(*shape), cotangents(*shape)
    reset = resets_at(2, 205, 3, 100, 101)
    whole = run(backend, args, reset, gy, gstate)
    assert_close(run(backend, args, reset, gy, gstate, splits=(1, 38, 100, 167, 204)), whole, 1e-10)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_passes_a_reset(backend):
    args = [x.requires_grad_() for x in draw(1, 20, 1, 4)]
    y, last = wkv7(*args, resets_at(1, 20, 9), backend=backend)
    alone, after = wkv7(*(x[:, 9:] for x in args[:-1]), torch.zeros_like(args[-1]), backend=backend)
    torch.testing.assert_close(y[:, 9:], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, after, rtol=1e-12, atol=1e-12)
    *sequences, gstate = torch.autograd.grad(y[:, 9:].square().sum() + last.sum(), args)
    for g in (gstate, *(g[:, :9] for g in sequences)):  # "torch" adds and subtracts the same log decays
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)
    assert all(g[:, 10:].ne(0).any() for g in sequences)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiler)])
def test_what_no_gradient_reaches_gets_exactly_zero(backend):
    """With its eps of 1e-18 Adam makes whole steps of rounding errors."""
    args, reset = draw(2, 40, 2, 16), resets_at(2, 40, 20)
    gy, gstate = cotangents(2, 40, 2, 16)
    gy[0, 5:], gy[1, 5:20], gy[1, 37:] = 0, 0, 0
    got = run(backend, [x.float() for x in args], reset, gy, torch.zeros_like(gstate))
    for name in NAMES[2:-1]:
        gradient = got[name]
        assert not gradient[0, 5:].any() and not gradient[1, 5:20].any() and not gradient[1, 37:].any(), name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(backend, dtype):
    shape = 2, 33, 2, 5
    half = [x.to(dtype) for x in draw(*shape)[:-1]] + [draw(*shape)[-1].float()]
    gy, gstate = (x.float() for x in cotangents(*shape))
    got = run(backend, half, None, gy.to(dtype), gstate)
    want = run(backend, [x.float() for x in half], None, gy.to(dtype).float(), gstate)
    assert got["y"].dtype == got["gk"].dtype == dtype and got["S"].dtype == torch.float32
    for name in NAMES:
        assert torch.equal(got[name], want[name].to(got[name].dtype)), name


@pytest.mark.parametrize("backend", ALL)
def test_autocast_changes_nothing(backend):
    args = [x.float() for x in draw(2, 33, 2, 5)]
    want = wkv7(*args, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = wkv7(*args, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_mixed_dtypes_and_layouts(backend):
    r, w, k, v, a, b, state = draw(2, 33, 2, 5)
    want_y, want_state = wkv7(r, w, k, v.float(), a, b, state, backend=backend)
    assert want_y.dtype == want_state.dtype == torch.float64
    turned = v.float().transpose(1, 3).contiguous().transpose(1, 3)
    y, after = wkv7(torch.stack((r, r), -1)[..., 1], w, k, turned, a, b, state.mT.contiguous().mT, backend=backend)
    torch.testing.assert_close(y, want_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, want_state, rtol=1e-12, atol=1e-12)


@needs_compiler
def test_threads_do_not_change_the_result():
    shape = 2, 300, 4, 32  # enough work for several threads
    args, (gy, gstate) = [x.float() for x in draw(*shape)], cotangents(*shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run("cpu", args, None, gy, gstate)
        torch.set_num_threads(3)
        three = run("cpu", args, None, gy, gstate)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], three[name]) for name in NAMES)


@pytest.mark.parametrize("backend", ALL)
def test_gradcheck(backend):
    args = [x.requires_grad_() for x in draw(2, 5, 1, 2)]
    reset = resets_at(2, 5, 3)
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, reset, backend=backend), args)


@pytest.mark.parametrize("backend", ALL)
def test_a_gradient_on_one_result_only(backend):
    leaves, given = [x.requires_grad_() for x in draw(2, 9, 2, 3)], tuple(cotangents(2, 9, 2, 3))
    results = wkv7(*leaves, backend=backend)
    one, other, both = (
        torch.autograd.grad(out, leaves, g, retain_graph=True, materialize_grads=True)
        for out, g in ((results[0], given[0]), (results[1], given[1]), (results, given))
    )
    sums = [x + y for x, y in zip(one, other, strict=True)]
    torch.testing.assert_close(sums, list(both), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_size_any_reset_any_split(data):
    sizes = zip((3, 50, 3, 9), "BTHN", strict=True)
    B, T, H, N = (data.draw(st.integers(1, most), name) for most, name in sizes)
    flags = data.draw(st.lists(st.integers(0, 9), min_size=B * T, max_size=B * T), "resets where 0")
    reset = torch.tensor(flags).view(B, T) == 0
    splits = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=3), "splits")) if T > 1 else ()
    seed = data.draw(st.integers(0, 1000), "seed")
    args, (gy, gstate) = draw(B, T, H, N, seed), cotangents(B, T, H, N, seed + 1)
    want = run("reference", args, reset, gy, gstate)
    for backend in ("cpu", "torch") if build_cpu.available() else ("torch",):
        assert_close(run(backend, args, reset, gy, gstate, splits), want, 1e-10, floor=1e-3)


@pytest.mark.parametrize("positions", [None, (0,), (7, 8, 15), (-1,)])
def test_fla_is_given_documents_as_sequences(monkeypatch, positions):
    """fla-core needs a GPU: what its documentation says is here the plain recurrence, one sequence after the other."""

    def chunk_rwkv7(*sequences, initial_state, cu_seqlens=None, scale, output_final_state, safe_gate, **more):
        assert scale == 1 and output_final_state and safe_gate and len({x.dtype for x in sequences}) == 1
        if cu_seqlens is None:
            y, state = wkv7(*sequences, initial_state.mT, backend="reference")
            return y, state.mT
        parts = [
            wkv7(*(x[:, begin:end] for x in sequences), initial_state[i : i + 1].mT, backend="reference")
            for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
        ]
        ys, states = zip(*parts, strict=True)
        return torch.cat(ys, 1), torch.cat(states).mT

    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", SimpleNamespace(chunk_rwkv7=chunk_rwkv7))
    monkeypatch.setattr(wkv7_fla, "available", lambda: True)
    monkeypatch.setitem(BACKENDS, "torch", wkv7_fla.wkv7)  # on a CPU "fla" is refused
    shape = 3, 20, 2, 4
    args, given = draw(*shape), tuple(cotangents(*shape))
    reset = None if positions is None else resets_at(3, 20, *positions)
    assert_close(run("torch", args, reset, *given), run("reference", args, reset, *given), 1e-11)


def test_fla_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(wkv7_fla, "available", lambda: False)
    with pytest.raises(RuntimeError, match="needs fla-core: pip install 'rwkv_train"):
        wkv7_fla.wkv7(*draw(1, 2, 1, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": torch.zeros(5, 3)}, r"r has shape \[5, 3\], expected \[B, T, H, N\] with T >= 1"),
        ({"r": torch.zeros(2, 0, 1, 3)}, r"r has shape \[2, 0, 1, 3\], expected \[B, T, H, N\] with T >= 1"),
        ({"a": torch.zeros(2, 5, 3)}, r"a has shape \[2, 5, 3\], expected \[B, T, H, N\] = \[2, 5, 1, 3\]"),
        ({"state": torch.zeros(2, 3, 3)}, r"state has shape \[2, 3, 3\], expected \[B, H, N, N\] = \[2, 1, 3, 3\]"),
        ({"v": torch.zeros(2, 5, 1, 3, dtype=torch.long)}, r"v is torch.int64, expected a floating dtype"),
        ({"w": torch.zeros(2, 5, 1, 3, device="meta")}, r"w is on meta, expected cpu, where r is"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset has shape \[2, 4\], expected \[B, T\] = \[2, 5\]"),
        ({"backend": "cdua"}, r"unknown backend 'cdua', expected one of \"auto\", \"reference\""),
        ({"backend": "fla"}, r"wkv7: backend \"fla\" needs tensors on a CUDA device, found cpu; use \"auto\""),
        ({"backend": "cuda"}, r"wkv7: backend \"cuda\" needs tensors on a CUDA device, found cpu; use \"auto\""),
    ],
)
def test_errors_name_the_argument(change, message):
    good = dict.fromkeys("rwkvab", torch.zeros(2, 5, 1, 3)) | {"state": torch.zeros(2, 1, 3, 3)}
    with pytest.raises(ValueError, match=message):
        wkv7(**{**good, **change})
