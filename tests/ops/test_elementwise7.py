"""What lies between the products of RWKV-7's time mix: the C++ kernels do what torch does, with all gradients."""

import pytest
import torch
from helpers import assert_close_rel
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.ops import build_cpu, elementwise7
from rwkv_train.ops.elementwise7 import decay, head_output, keys, value_residual

pytestmark = pytest.mark.skipif(build_cpu.load()[0] is None, reason="no C++ compiler")

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
TOLERANCES = {F64: 1e-12, F32: 1e-5, BF16: 1e-2}
# Of each operation: the number of its sequences [B,T,C], and of its parameters of C numbers.
OPERATIONS = {decay: (1, 1), value_residual: (3, 1), keys: (2, 3), head_output: (5, 3)}


def inputs(operation, B, T, H, N, dtype, parameters=F32, seed=0):
    """Random sequences and parameters, and what else the operation takes."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=F64)  # noqa: E731
    n_sequences, n_parameters = OPERATIONS[operation]
    tensors = [draw(B, T, H * N).to(dtype) for _ in range(n_sequences)]
    shapes = [(1, 1, H * N)] * n_parameters
    if operation is head_output:
        shapes = [(H, N), (H * N,), (H * N,)]
    tensors += [draw(*shape).to(F64 if dtype == F64 else parameters) for shape in shapes]
    return tensors, ((H,) if operation is keys else ())


def results(operation, tensors, more, in_torch=False):
    """What comes out, and the gradients of all tensors for random ones that arrive."""
    with pytest.MonkeyPatch.context() as patch:
        if in_torch:
            patch.setattr(elementwise7, "_kernels_for", lambda *x: None)
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = operation(*leaves, *more)
        out = out if isinstance(out, tuple) else (out,)
        rng = torch.Generator().manual_seed(1)
        arriving = [torch.randn(o.shape, generator=rng, dtype=F64).to(o.dtype) for o in out]
        return [*out, *torch.autograd.grad(out, leaves, arriving)]


def check(operation, tensors, more, tolerance):
    pairs = zip(results(operation, tensors, more), results(operation, tensors, more, in_torch=True), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert_close_rel(ours, theirs, tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(OPERATIONS)), st.integers(1, 3), st.sampled_from([1, 5, 31, 32, 33, 70]), st.integers(1, 3),
    st.sampled_from([3, 7, 8, 16, 35, 64]), st.sampled_from([F64, F32]), st.integers(0, 99),
)  # fmt: skip
def test_results_and_gradients(operation, B, T, H, N, dtype, seed):
    tensors, more = inputs(operation, B, T, H, N, dtype, seed=seed)
    check(operation, tensors, more, 1e-11 if dtype == F64 else 1e-4)  # heads of 3 channels magnify rounding


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_at_the_sizes_of_models(operation, dtype):
    check(operation, *inputs(operation, 1, 40, 3, 64, dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_in_bf16_beside_sequences_in_bf16(operation):
    check(operation, *inputs(operation, 2, 33, 2, 16, BF16, parameters=BF16), TOLERANCES[BF16])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sequences_that_do_not_lie_in_one_piece(operation):
    tensors, more = inputs(operation, 3, 5, 2, 8, F64)
    n = OPERATIONS[operation][0]
    tensors[:n] = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[:n]]
    check(operation, tensors, more, 1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_thread_and_two_agree_to_the_bit(operation):
    case = inputs(operation, 2, 300, 4, 64, F32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(operation, *case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_where_no_gradient_is_wanted(operation):
    tensors, more = inputs(operation, 2, 3, 2, 16, F32)
    wanted = results(operation, tensors, more)
    with torch.no_grad():
        out = operation(*tensors, *more)
    for one, other in zip(out if isinstance(out, tuple) else (out,), wanted, strict=False):
        assert torch.equal(one, other)


def test_a_key_of_zeros_has_no_direction():
    tensors, more = inputs(keys, 1, 2, 2, 16, F64)
    tensors[0][0, 1] = 0
    check(keys, tensors, more, 1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_no_number_stays_none(operation, dtype, value):
    tensors, more = inputs(operation, 1, 3, 2, 16, dtype)
    tensors[0][0, 1, 5] = value
    ours, theirs = (results(operation, tensors, more, in_torch) for in_torch in (False, True))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@pytest.mark.parametrize("operation", [value_residual, keys, head_output])
def test_sequences_of_two_dtypes_are_left_to_torch(operation):
    tensors, more = inputs(operation, 1, 3, 2, 16, F32)
    tensors[1] = tensors[1].bfloat16()
    check(operation, tensors, more, 1e-6)
