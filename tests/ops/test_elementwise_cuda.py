"""The elementwise CUDA kernels, as in test_wkv4_cuda.py: compiled for GPUs that are not here, and run on the CPU.

What torch does with the same numbers in float64 is right.
"""

import pytest
import torch
from helpers import assert_close_rel
from host_gpu import check_compiles, cuda_autocast, needs_compiler, needs_cuda_core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_train.ops import build_cuda, elementwise, elementwise7, elementwise7_cuda, elementwise_cuda
from rwkv_train.ops.elementwise import IGNORE_INDEX, cross_entropy_, gate, squared_relu, token_shift_mix
from rwkv_train.ops.elementwise7 import decay, head_output, keys, value_residual

pytestmark = needs_compiler
# Of each operation the arguments behind `reset`: sequences [B,T,C], [B,C] "before" and parameters of C "channels" or
# [H,N] "heads".
OPERATIONS = {
    "mix of 2": (lambda reset, x, last, *m: token_shift_mix(x, last, reset, *m), "sequence before channels channels"),
    "mix of 6": (lambda reset, x, last, *m: token_shift_mix(x, last, reset, *m), "sequence before" + " channels" * 6),
    "squared_relu": (lambda reset, x: squared_relu(x), "sequence"),
    "gate": (lambda reset, r, y: gate(r, y), "sequence sequence"),
    "decay": (lambda reset, raw, w0: decay(raw, w0), "sequence channels"),
    "value_residual": (lambda reset, *given: value_residual(*given), "sequence sequence sequence channels"),
    "keys": (lambda reset, k, raw, a0, *m: keys(k, raw, a0.flatten(), *m, len(a0)), "sequence sequence" + " heads" * 3),
    "head_output": (lambda reset, *given: head_output(*given), "sequence " * 5 + "heads channels channels"),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture
def on_gpu(on_cpu, monkeypatch):
    """Whatever device a tensor is on, the kernels do the work."""
    monkeypatch.setattr(elementwise, "_kernels_for", lambda x: elementwise_cuda)
    monkeypatch.setattr(elementwise7, "_kernels_for", lambda *x: elementwise7_cuda)
    return on_cpu


def draw(operation, shape, dtype=torch.float64, seed=0, device="cpu"):
    """The function, which takes tensors alone, and tensors of numbers that `dtype` can hold. shape: B, T, H, N."""
    function, arguments = OPERATIONS[operation]
    B, T, H, N = shape
    rng = torch.Generator().manual_seed(seed)
    shapes = {"sequence": (B, T, H * N), "before": (B, H * N), "channels": (1, 1, H * N), "heads": (H, N)}
    draw = lambda name: torch.randn(shapes[name], generator=rng, dtype=torch.float64).to(dtype)  # noqa: E731
    wide = torch.promote_types(dtype, torch.float32)
    reset = (torch.rand(B, T, generator=rng) < 0.2).to(device) if seed % 2 else None
    tensors = [draw(name) if name in ("sequence", "before") else draw(name).to(wide) for name in arguments.split()]
    return lambda *tensors: function(reset, *tensors), [x.to(device) for x in tensors]


def results(function, tensors, arriving=None):
    """Results, all gradients, and the gradients that arrived."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    rng = torch.Generator().manual_seed(1)
    arriving = arriving or [torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o) for o in out]
    return [*out, *torch.autograd.grad(out, leaves, arriving)], arriving


def in_torch(function, tensors, arriving):
    """What is right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise, "_kernels_for", lambda x: None)
        patch.setattr(elementwise7, "_kernels_for", lambda *x: None)
        return results(function, [x.double() for x in tensors], [g.double() for g in arriving])[0]


def check(operation, shape, dtype, seed=0):
    function, tensors = draw(operation, shape, dtype, seed)
    got, arriving = results(function, tensors)
    assert [g.dtype for g in got[-len(tensors) :]] == [x.dtype for x in tensors]
    for ours, right in zip(got, in_torch(function, tensors, arriving), strict=True):
        assert_close_rel(ours, right, TOLERANCES[dtype])
    return got


@needs_cuda_core
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_kernels_compile_and_stay_in_registers(arch):
    for dtype in build_cuda.TYPES if arch == "sm_90" else (torch.bfloat16, torch.float32):
        for variant in {*build_cuda.VARIANTS["elementwise"](dtype), *build_cuda.VARIANTS["elementwise7"](dtype)}:
            check_compiles(variant, arch)
    check_compiles(elementwise_cuda.Variant("heads", torch.bfloat16, 4, torch.bfloat16, 512), arch)


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 37, 2, 7), (3, 5, 3, 20), (1, 65, 1, 34)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_torch(on_gpu, operation, shape):
    for seed in (0, 1):
        check(operation, shape, torch.float64, seed)
    assert on_gpu["launched"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("operation", ["keys", "head_output"])
def test_large_heads(on_gpu, operation, dtype):
    check(operation, (1, 5, 2, 130), dtype)


def test_keys_of_no_length(on_gpu):
    function, (k, *others) = draw("keys", (1, 3, 2, 8))
    k[:, 0] = 0
    k[:, 1] *= 1e-14
    got, arriving = results(function, (k, *others))
    for ours, right in zip(got, in_torch(function, (k, *others), arriving), strict=True):
        assert_close_rel(ours, right, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [7, 16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_32_bits_compute_what_16_bits_store(on_gpu, operation, N, dtype):
    got = check(operation, (2, 33, 2, N), dtype, 1)
    assert got[0].dtype == (torch.float32 if operation == "decay" else dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_order_of_threads_and_long_strips(on_gpu, monkeypatch, operation):
    function, tensors = draw(operation, (2, 150, 2, 17), torch.float32, 1)
    plain, _ = results(function, tensors)
    on_gpu["descending"] = True
    turned, _ = results(function, tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, turned, strict=True))
    monkeypatch.setattr(elementwise_cuda, "MANY", 0)
    check(operation, (2, 150, 2, 17), torch.float32, 1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(OPERATIONS)), st.tuples(*(st.integers(1, most) for most in (3, 70, 3, 20))),
    st.sampled_from([torch.float64, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
def test_any_size(on_gpu, operation, shape, dtype, seed):
    check(operation, shape, dtype, seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_mixes_are_stored_in_16_bits(on_gpu, dtype):
    function, (x, last, *mixes) = draw("mix of 2", (2, 21, 1, 12), torch.float32, 1)
    with torch.autocast("cpu", dtype=dtype):
        got, arriving = results(function, (x, last, *mixes))
    want, _ = results(function, (x, last, *mixes), [g.float() for g in arriving])
    assert [g.dtype for g in got] == [dtype, dtype, *[torch.float32] * 5]
    for ours, right in zip(got, want, strict=True):
        assert_close_rel(ours, right, TOLERANCES[ours.dtype])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_layouts_and_gradients_that_are_missing(on_gpu, operation):
    function, tensors = draw(operation, (2, 9, 2, 8), torch.bfloat16, 1)
    want, arriving = results(function, tensors)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in tensors]  # not where a pack begins
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
    for leaves in (shifted, turned):
        leaves = [x.requires_grad_() for x in leaves]
        out = function(*leaves)
        got = out if isinstance(out, tuple) else (out,)
        got = [*got, *torch.autograd.grad(out, leaves, arriving)]
        for a, b in zip(got, want, strict=True):
            assert_close_rel(a, b, 1e-6 if a.dtype == torch.float32 else 1e-2)
    out = function(*(leaves := [x.requires_grad_() for x in tensors]))
    for i, one in enumerate(out if isinstance(out, tuple) else (out,)):
        with_zeros = [g if i == j else torch.zeros_like(g) for j, g in enumerate(arriving)]
        want, _ = results(function, tensors, with_zeros)
        got = torch.autograd.grad(one, leaves, arriving[i], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want[-len(leaves) :], strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_in_nothing_out(on_gpu, operation):
    check(operation, (0, 3, 2, 8), torch.float32)


@pytest.mark.parametrize("operation", ["mix of 2", "squared_relu", "gate"])
def test_once_not_twice(on_gpu, operation):
    function, tensors = draw(operation, (1, 3, 1, 4))
    leaves = [x.requires_grad_() for x in tensors]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    (g,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        g.sum().backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_torch_compile_takes_it_whole(on_gpu, operation):
    function, tensors = draw(operation, (2, 9, 2, 8), torch.float64, 1)
    want, arriving = results(function, tensors)
    got, _ = results(torch.compile(function, backend="aot_eager", fullgraph=True), tensors, arriving)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("size", [(1, 1), (0, 5), (5, 63), (3, 2200)])
def test_cross_entropy(on_gpu, monkeypatch, size, z_loss, dtype):
    rng = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(size, generator=rng, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, size[1], (size[0], 3), generator=rng)[:, 1]  # which does not lie in one piece
    targets[1:2] = IGNORE_INDEX
    logits[1:2, :1] = float("nan")
    ours, turned, right = logits.clone(), logits.clone(), logits.double()
    nll = cross_entropy_(ours, targets, z_loss)
    on_gpu["descending"] = True
    assert torch.equal(cross_entropy_(turned, targets, z_loss), nll) and torch.equal(turned, ours)
    monkeypatch.setattr(elementwise, "_kernels_for", lambda x: None)
    assert_close_rel(nll, cross_entropy_(right, targets, z_loss), 1e-12 if dtype == torch.float64 else 1e-6)
    assert_close_rel(ours, right, TOLERANCES[dtype])


def test_cross_entropy_says_what_has_none(on_gpu):
    logits = torch.zeros(4, 30)
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    nll = cross_entropy_(logits, torch.tensor([0, 1, 2, 30]))
    assert nll.isfinite().tolist() == [True, False, False, False]


OPERATORS = {
    "token_shift_mix": lambda x, c: (x, x[:, 0].clone(), x[..., 0] > 1, torch.stack([c, c]), torch.float32),
    "token_shift_mix_backward": lambda x, c: (x, x[:, 0].clone(), None, torch.stack([c, c]), None, [x.clone(), -x]),
    "squared_relu": lambda x, c: (x,),
    "squared_relu_backward": lambda x, c: (x, -x),
    "cross_entropy_": lambda x, c: (x.flatten(0, 1), torch.arange(10) % 6, 0.1),
    "gate": lambda x, c: (x, -x),
    "gate_backward": lambda x, c: (x, -x, 2 * x),
    "decay": lambda x, c: (x, c),
    "decay_backward": lambda x, c: (x, c, -x),
    "value_residual": lambda x, c: (x, -x, 2 * x, c),
    "value_residual_backward": lambda x, c: (x, -x, 2 * x, c, 3 * x),
    "keys": lambda x, c: (x, -x, *c.view(1, 2, 3).expand(3, 2, 3).clone()),
    "keys_backward": lambda x, c: (x, -x, *c.view(1, 2, 3).expand(3, 2, 3).clone(), 2 * x, 3 * x, 4 * x),
    "head_output": lambda x, c: (x, -x, 2 * x, 3 * x, 4 * x, *c.view(1, 2, 3).expand(3, 2, 3).clone()),
    "head_output_backward": lambda x, c: (
        x,
        -x,
        2 * x,
        3 * x,
        4 * x,
        *c.view(1, 2, 3).expand(3, 2, 3).clone(),
        5 * x,
    ),
}


def test_all_operators_are_checked():
    assert OPERATORS.keys() == elementwise_cuda.IMPLEMENTATIONS.keys()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_what_torch_expects_of_them(on_gpu, name):
    given = OPERATORS[name](torch.randn(2, 5, 6), torch.randn(6))
    for argument in () if name.endswith(("_", "_backward")) else given:
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.rwkv_train, name).default, given)


def test_fake_tensors_have_the_shapes_and_dtypes(monkeypatch):
    monkeypatch.setattr(build_cuda, "available", lambda *asked: True)
    with FakeTensorMode(), cuda_autocast():
        x, last, m = (torch.empty(s, device="cuda") for s in ((2, 40, 6), (2, 6), (6,)))
        a, b, end = token_shift_mix(x, last, None, m, m)
        assert (a.shape, a.dtype, b.dtype) == (x.shape, torch.bfloat16, torch.bfloat16)
        assert (end.shape, end.dtype) == (last.shape, torch.float32)
        assert (squared_relu(a).dtype, gate(a, b).dtype) == (torch.bfloat16, torch.bfloat16)
        assert squared_relu(a).device.type == "cuda"
        monkeypatch.setattr(build_cuda, "available", lambda *asked: False)
        assert squared_relu(a).dtype == torch.bfloat16
