"""A tape runs what a call did: the same numbers as another call, whatever lies in its inputs by then."""

import pytest
import torch

from rwkv_train.ops import build_cpu, tape
from rwkv_train.ops.elementwise import squared_relu, token_shift_mix
from rwkv_train.ops.linear import linear, times


def filled(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def taped_and_called(call, *shapes):
    """The results of a tape that is run on other inputs than it was made with, and those of a call on them."""
    inputs, found = [filled(shape, i) for i, shape in enumerate(shapes)], {}
    run = tape.capture(lambda: found.setdefault("results", call(*inputs)))
    for i, x in enumerate(inputs):
        x.copy_(filled(x.shape, 10 + i))
    expected = call(*(x.clone() for x in inputs))
    with torch.inference_mode():
        run()
    return found["results"], expected


def torchs(x, weight):
    y = torch.stack([torch.tanh(x), 1 - x, torch.cat((x[:1], x[1:] * 2))]).unbind()
    y[0][1] = x[0]  # a part of it is changed
    z = torch.nn.functional.layer_norm(x.t().contiguous().t(), x.shape[1:], weight[0])
    return *y, z, torch.zeros_like(x) + 1, torch.addmm(x, x, weight), x.view(-1)[2:5].clone()


def kernels(x, weight):
    *ys, last = token_shift_mix(x[None], x[:1], None, weight[0], weight[1])
    return *ys, last, linear(ys[0], weight), *times((ys[1], weight), (last, weight)), squared_relu(x.t())


@pytest.mark.parametrize("call", [torchs, kernels])
def test_a_tape_does_what_the_call_does(call):
    found, expected = taped_and_called(call, (5, 5), (5, 5))
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_tape_carries_on_what_it_changes_in_place():
    x = torch.ones(3)
    run = tape.capture(lambda: x.mul_(2))
    run()
    run()
    assert x.tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    "call",
    [lambda x: x * x.sum().item(), torch.rand_like, lambda x: torch.nn.functional.dropout(x, 0.5), torch.nonzero],
    ids=["asks", "draws", "drops", "counts"],
)
def test_what_is_not_always_the_same_is_refused(call):
    with pytest.raises(RuntimeError, match="something else each time"):
        tape.capture(lambda: call(torch.ones(3)))


@pytest.mark.skipif(build_cpu.load()[0] is None, reason="no C++ compiler")
def test_the_kernels_of_a_tape_are_heard_only_while_it_is_made():
    x, heard = torch.ones(4, 8), []
    with build_cpu.recorded(lambda function, arguments: heard.append(arguments)):
        squared_relu(x)
    squared_relu(x)
    assert len(heard) == 1
