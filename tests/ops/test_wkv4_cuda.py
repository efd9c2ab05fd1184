"""The CUDA kernels: without a GPU they are compiled for three architectures, and run on the CPU against the reference.

wkv_host.h runs the kernels' own source thread by thread; build_cuda.py drives it as it drives a GPU.
"""

import functools
import sys

import platformdirs
import pytest
import torch
from host_gpu import check_compiles, needs_compiler, needs_cuda_core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_wkv4 import assert_close, cotangents, draw, resets_at, run
from torch._subclasses.fake_tensor import FakeTensorMode

import rwkv_train.ops.wkv4
import rwkv_train.ops.wkv7
from rwkv_train.ops import build_cuda, cache, reference, wkv4_cuda
from rwkv_train.ops.backends import pick
from rwkv_train.ops.wkv4 import BACKENDS, wkv4

VARIANTS = [
    wkv4_cuda.Variant(backward, dtype, vector)
    for backward in (False, True)
    for dtype in build_cuda.TYPES
    for vector in ({1, wkv4_cuda.VECTOR[backward]} if dtype.itemsize == 2 else {1})
]


# ---- compiled for GPUs that are not here


@needs_cuda_core
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_kernels_compile_and_stay_in_registers(arch):
    for variant in VARIANTS:
        check_compiles(variant, arch)


# ---- run on the CPU


def cut(monkeypatch, stretched: bool):
    """As the plan for a large batch would, walk every lane in one piece; or cut it into as many as there can be."""
    monkeypatch.setattr(wkv4_cuda, "FULL", 1 << 20 if stretched else 0)


@needs_compiler
@pytest.mark.parametrize("path, stretched", [("serial", False), ("chunked", False), ("chunked", True)])
@pytest.mark.parametrize("C", [1, 7, 40])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 129])
@pytest.mark.parametrize("positions", [None, (0,), (7, 8, 60), (-1,), (0, 1, 31, 32, -2, -1)])
def test_equals_reference(on_cpu, monkeypatch, path, stretched, C, T, positions):
    cut(monkeypatch, stretched)
    B = 2
    args, (gy, gstate) = draw(B, T, C), cotangents(B, T, C)
    reset = None if positions is None else resets_at(B, T, *positions)
    want = run("reference", args, reset, gy, gstate)
    got = run(functools.partial(wkv4_cuda.wkv4, path=path), args, reset, gy, gstate)
    assert_close(got, want, 1e-10)
    assert ("scan" in on_cpu["launched"]) == (stretched and T > 32)


@needs_compiler
@pytest.mark.parametrize("path, stretched", [("serial", False), ("chunked", False), ("chunked", True)])
@pytest.mark.parametrize("key_std", [1, 5, 40])
def test_float32(on_cpu, monkeypatch, path, stretched, key_std):
    cut(monkeypatch, stretched)
    B, T, C = 2, 517, 35
    args, (gy, gstate) = draw(B, T, C, key_std), cotangents(B, T, C)
    args = [x.float() for x in args]
    for reset in (None, resets_at(B, T, 20, 21, 50, 200, -3)):
        want = run("reference", [x.double() for x in args], reset, gy, gstate)
        got = run(functools.partial(wkv4_cuda.wkv4, path=path), args, reset, gy, gstate)
        assert all(x.dtype == torch.float32 for x in got.values())
        assert_close(got, want, 2e-4, ge=1e-2, gw=4e-4)  # the plain loop in float32: gk 8e-5, gw 1.7e-4


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [6, 7, 66])
@pytest.mark.parametrize("path, stretched", [("serial", False), ("chunked", False), ("chunked", True)])
def test_16_bits_are_read_and_written_but_not_computed_with(on_cpu, monkeypatch, dtype, C, path, stretched):
    cut(monkeypatch, stretched)
    B, T = 2, 300
    w, u, k, v, state = (x.float() for x in draw(B, T, C))
    k, v, (gy, gstate), reset = k.to(dtype), v.to(dtype), cotangents(B, T, C), resets_at(B, T, 40, 41, 256)
    gy = gy.to(dtype)
    got = run(functools.partial(wkv4_cuda.wkv4, path=path), (w, u, k, v, state), reset, gy, gstate)
    want = run("reference", [x.double() for x in (w, u, k, v, state)], reset, gy.double(), gstate)
    assert got["y"].dtype == got["gk"].dtype == got["gv"].dtype == dtype and got["a"].dtype == torch.float32
    rounded = {name: want[name].to(dtype).double() for name in ("y", "gk", "gv")}
    assert_close(got, {**want, **rounded}, 1e-4, ge=1e-2, y=2e-4, gk=2e-3, gv=2e-3)


@needs_compiler
@pytest.mark.parametrize("stretched", [False, True])
def test_order_of_threads_and_channels_of_a_thread_change_no_bit(on_cpu, monkeypatch, stretched):
    cut(monkeypatch, stretched)
    B, T, C = 2, 290, 70
    args, (gy, gstate), reset = draw(B, T, C), cotangents(B, T, C), resets_at(B, T, 100, 140)
    args = [x.bfloat16() if x.dim() == 3 and x.shape[1] == T else x.float() for x in args]
    plain = run(wkv4_cuda.wkv4, args, reset, gy, gstate)
    on_cpu["descending"] = True
    turned = run(wkv4_cuda.wkv4, args, reset, gy, gstate)
    monkeypatch.setattr(wkv4_cuda, "VECTOR", {False: 1, True: 2})  # the other way round than usual
    other = run(wkv4_cuda.wkv4, args, reset, gy, gstate)
    assert all(torch.equal(plain[name], turned[name]) and torch.equal(plain[name], other[name]) for name in plain)


@needs_compiler
def test_chunks_with_carried_state_equal_the_whole(on_cpu):
    B, T, C = 1, 300, 5
    args, (gy, gstate), reset = draw(B, T, C), cotangents(B, T, C), resets_at(B, T, 3, 50, 51)
    want = run("reference", args, reset, gy, gstate)
    assert_close(run(wkv4_cuda.wkv4, args, reset, gy, gstate, splits=(1, 38, 167, 299)), want, 1e-10)


@needs_compiler
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_size_any_reset(on_cpu, data):
    B, T, C = (data.draw(st.integers(1, most), name) for most, name in ((3, "B"), (150, "T"), (40, "C")))
    positions = data.draw(st.sets(st.tuples(st.integers(0, B - 1), st.integers(0, T - 1)), max_size=8), "resets")
    reset = torch.zeros(B, T, dtype=torch.bool)
    for b, t in positions:
        reset[b, t] = True
    seed, stretched = data.draw(st.integers(0, 1000), "seed"), data.draw(st.booleans(), "stretched")
    args, (gy, gstate) = draw(B, T, C, seed=seed), cotangents(B, T, C, seed=seed + 1)
    want = run("reference", args, reset, gy, gstate)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, stretched)
        got = run(functools.partial(wkv4_cuda.wkv4, path="chunked"), args, reset, gy, gstate)
    assert_close(got, want, 1e-10, floor=1e-3)


@needs_compiler
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("stretched", [False, True])
def test_a_gradient_that_nobody_gives_equals_zeros(on_cpu, monkeypatch, which, stretched):
    cut(monkeypatch, stretched)
    args, given = draw(2, 150, 5), list(cotangents(2, 150, 5))
    leaves = [x.requires_grad_() for x in args]
    results = wkv4_cuda.wkv4(*leaves, resets_at(2, 150, 9), path="chunked")
    got = torch.autograd.grad(results[which], leaves, given[which], retain_graph=True)
    given[1 - which] = torch.zeros_like(given[1 - which])
    assert all(torch.equal(x, y) for x, y in zip(got, torch.autograd.grad(results, leaves, given), strict=True))


@needs_compiler
def test_layouts_and_one_result_only(on_cpu):
    B, T, C = 2, 40, 6
    w, u, k, v, state = draw(B, T, C)
    want = wkv4(w, u, k, v, state, backend="reference")
    scattered = torch.stack((k, k), -1)[..., 1]
    turned = v.transpose(0, 2).contiguous().transpose(0, 2)
    got = wkv4_cuda.wkv4(w, u, scattered, turned, state.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(got, want)
    half = torch.zeros(B * T * C + 1, dtype=torch.bfloat16)[1:].view(B, T, C)  # not where a pair could be read
    aligned = wkv4_cuda.wkv4(w.float(), u.float(), half.clone(), half.clone(), state.float())
    torch.testing.assert_close(wkv4_cuda.wkv4(w.float(), u.float(), half, half, state.float()), aligned, rtol=0, atol=0)
    gy, gstate = cotangents(B, T, C)
    k.requires_grad_()
    outs = wkv4_cuda.wkv4(w, u, k, v, state)
    for out, gradient, expected in zip(outs, (gy, gstate), wkv4(w, u, k, v, state, backend="reference"), strict=True):
        torch.testing.assert_close(*(torch.autograd.grad(x, k, gradient, retain_graph=True) for x in (out, expected)))
    empty = wkv4_cuda.wkv4(w, u, k[:0], v[:0], state[:0])
    assert empty[0].shape == (0, T, C) and empty[1].shape == (0, 3, C)


@needs_compiler
def test_inference_keeps_no_states(on_cpu):
    w, u, k, v, state = (x.requires_grad_() for x in draw(1, 40, 3))
    states = lambda save: torch.ops.rwkv_train.wkv4(w, u, k, v, state, None, "auto", save)[2]  # noqa: E731
    assert states(True).shape == (1, 10, 3, 3) and states(False).numel() == 0
    with torch.no_grad():
        assert not wkv4_cuda.wkv4(w, u, k, v, state)[0].requires_grad


def test_size_picks_the_path():
    plan = lambda *shape: wkv4_cuda._Work.plan(torch.empty(shape, device="meta"), "auto")  # noqa: E731
    assert (plan(8, 4096, 2048).rows, plan(8, 4096, 2048).stretches) == (wkv4_cuda.ROWS, 1)
    assert (plan(1, 4096, 2048).rows, plan(1, 4096, 2048).stretches) == (wkv4_cuda.ROWS, 32)
    assert plan(1, 1, 2048).rows == plan(64, 4096, 2048).rows == 1
    for B, T, C in ((1, 10**6, 64), (3, 777, 100), (1, 129, 1)):
        work = plan(B, T, C)
        assert work.L % (work.S * wkv4_cuda.ROWS) == 0 and (work.stretches - 1) * work.L < T <= work.stretches * work.L


# ---- as an operator of torch


@needs_compiler
@pytest.mark.parametrize("with_reset", [False, True])
def test_operators_keep_what_torch_expects_of_them(on_cpu, with_reset):
    w, u, k, v, state = (x.float() for x in draw(2, 40, 5))
    k, v = k.bfloat16(), v.bfloat16()
    reset = resets_at(2, 40, 7) if with_reset else None
    leaves = [x.requires_grad_() for x in (w, u, k, v, state)]
    torch.library.opcheck(torch.ops.rwkv_train.wkv4.default, (*leaves, reset, "auto", True))
    _, end, states = torch.ops.rwkv_train.wkv4(*leaves, reset, "auto", True)
    args = (w, u, k, v, reset, states, end, torch.randn_like(k), torch.randn_like(state), "auto")
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    torch.library.opcheck(torch.ops.rwkv_train.wkv4_backward.default, args)


@needs_compiler
def test_torch_compile_takes_it_whole(on_cpu, monkeypatch):
    monkeypatch.setattr(rwkv_train.ops.wkv4, "pick", lambda *asked: wkv4_cuda.wkv4)
    B, T, C = 2, 40, 5
    args, (gy, gstate), reset = draw(B, T, C), cotangents(B, T, C), resets_at(B, T, 9)
    want = run(reference.wkv4, args, reset, gy, gstate)
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(wkv4, backend=backend, fullgraph=True, dynamic=True)
        assert_close(run(compiled, args, reset, gy, gstate), want, 1e-10)


@needs_compiler
def test_no_second_derivative(on_cpu):
    w, u, k, v, state = draw(1, 3, 2)
    y, _ = wkv4_cuda.wkv4(w, u, k.requires_grad_(), v, state)
    (gk,) = torch.autograd.grad(y.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gk.sum().backward()


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_fake_tensors_have_the_shapes_and_dtypes(device):
    differentiable = device == "meta"  # autograd asks a CUDA driver for streams
    with FakeTensorMode():
        w, u, state = (torch.empty(s, device=device) for s in ((5,), (5,), (2, 3, 5)))
        k, v = (torch.empty(2, 40, 5, device=device, dtype=torch.bfloat16) for _ in range(2))
        k.requires_grad_(differentiable)
        y, end, states = torch.ops.rwkv_train.wkv4(w, u, k, v, state, None, "auto", True)
        assert (y.shape, y.dtype, end.shape, end.dtype) == (k.shape, k.dtype, state.shape, torch.float32)
        assert states.shape == (2, 3, 3, 5) and {x.device.type for x in (y, end, states)} == {device}
        if differentiable:
            (gk,) = torch.autograd.grad(y.sum(), k)
            assert gk.shape == k.shape and gk.dtype == torch.bfloat16


# ---- which backend, and what is said when there is none


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """As on a machine with an H100 that has never built the kernels, and whose driver takes them; yields the cache."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(build_cuda, "_load", lambda variant, index: None)
    forget = lambda: [x.cache_clear() for x in (build_cuda._why_not, build_cuda._program, cache.say_once)]  # noqa: E731
    forget()
    yield tmp_path / "rwkv_train"
    forget()


def picked(operator="wkv4", backend="auto", dtype=torch.float32):
    """The backend's name."""
    backends = {"wkv4": BACKENDS, "wkv7": rwkv_train.ops.wkv7.BACKENDS}[operator]
    run = pick(operator, backends, backend, torch.device("cuda", 0), dtype)
    return next(name for name in backends if backends[name] is run)


def test_without_cuda_core_auto_is_torch_and_says_why_once(hopper, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert [picked(operator) for operator in ("wkv4", "wkv4", "wkv7")] == ["torch"] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "cuda.core" in line and "pip install 'rwkv_train[cuda]'" in line
    with pytest.raises(RuntimeError, match=r'backend "cuda" is not available: the CUDA kernels need cuda.core'):
        picked(backend="cuda")


@needs_cuda_core
def test_a_source_that_does_not_compile(hopper, monkeypatch, tmp_path, capsys):
    (tmp_path / "broken.cu").write_text("__device__ int f() { return undeclared_name; }\n")
    monkeypatch.setattr(wkv4_cuda, "SOURCE", tmp_path / "broken.cu")
    assert picked() == "torch"
    building, failed = capsys.readouterr().err.splitlines()
    assert "building CUDA kernels" in building and "undeclared_name" in failed


@pytest.fixture
def built(hopper, monkeypatch):
    """What would be compiled, each variant once; nothing is. built.fail: a condition of those that do not build."""

    class Built(list):
        fail = staticmethod(lambda variant: False)

    def build(variant, arch, logs=None):
        if built.fail(variant):
            raise RuntimeError("nvrtc: error: too much shared data")
        built.append(variant)
        return str(variant).encode()

    built = Built()
    monkeypatch.setattr(build_cuda, "build", build)
    return built


@needs_cuda_core
def test_an_operator_asks_for_all_that_it_launches_in_a_dtype(built):
    assert picked("wkv4", dtype=torch.bfloat16) == "cuda"
    assert built == [wkv4_cuda.Variant(False, torch.bfloat16, 2), wkv4_cuda.Variant(True, torch.bfloat16, 1)]
    built.clear()
    assert picked("wkv7") == picked("wkv7", "cuda") == "cuda"
    assert {variant.source.stem for variant in built} == {"wkv7"} and {v.dtype for v in built} == {torch.float32}
    assert len(built) == len(set(built)) == len(list(build_cuda.VARIANTS["wkv7"](torch.float32)))


@needs_cuda_core
@pytest.mark.parametrize("failing", ["backward", "the driver"])
def test_what_would_fail_in_training_shows_itself_at_the_choice_of_a_backend(built, monkeypatch, failing, capsys):
    def refuse(variant, index):
        raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: error: the driver is too old")

    if failing == "backward":
        built.fail = lambda variant: getattr(variant, "backward", False)
    else:
        monkeypatch.setattr(build_cuda, "_load", refuse)
    assert [picked("wkv4"), picked("wkv4")] == ["torch"] * 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "of wkv4 could not be built or loaded" in told[1]
    assert "Until then torch does their work" in told[1]
    if failing == "backward":
        assert picked("wkv7") == "cuda" and not capsys.readouterr().err


@needs_cuda_core
def test_a_cache_that_cannot_be_written_leaves_the_kernels_on(built, hopper, capsys):
    hopper.write_text("a file where the folder should be")
    assert [picked("wkv4"), picked("wkv7")] == ["cuda"] * 2
    _, kept = capsys.readouterr().err.splitlines()
    assert f"{hopper} cannot be written" in kept and "every start builds the kernels again" in kept


@needs_cuda_core
def test_builds_once_and_rebuilds_what_is_broken(built, hopper):
    for builds in (2, 0, 1):
        if builds == 1:
            path = min(hopper.iterdir())
            path.write_bytes(path.read_bytes()[:10])
        for cached in (build_cuda._why_not, build_cuda._program):
            cached.cache_clear()
        built.clear()
        assert picked() == "cuda" and len(built) == builds


@needs_cuda_core
def test_torch_compile_asks_for_the_kernels_while_tracing(built):
    compiled = torch.compile(
        lambda x: x + build_cuda.available("wkv4", torch.device("cuda", 0), x.dtype), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
