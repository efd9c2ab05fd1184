"""Bytes that a layer's forward and backward move on a GPU, counted without one: `python tests/tools/traffic.py`.

A model runs on fake tensors under autocast, and each operation is taken to read its inputs and to write its results
once. Matrix products and WKV stand apart: they are bound by other things. What a layer costs is the difference between
models of two and three layers.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.ops import elementwise, wkv4, wkv7

LANES, TOKENS, CHANNELS = 8, 4096, 2048
UNMOVED = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "prim::")  # besides views
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm"}
KERNELS = ("rwkv_train::wkv4", "rwkv_train::wkv7")


class Traffic(TorchDispatchMode):
    """Counts bytes and calls of each operation that runs under it."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        schema, name = function._schema, function._schema.name
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not views and not name.startswith(UNMOVED):
            moved = sum(map(_bytes, tree_leaves((args, kwargs)))) + sum(map(_bytes, tree_leaves(result)))
            self.bytes[name] += moved
            self.calls[name] += 1
        return result

    def between(self) -> int:
        """Bytes of whatever is neither a product nor WKV."""
        return sum(n for name, n in self.bytes.items() if name not in PRODUCTS and not name.startswith(KERNELS))


def _bytes(x: object) -> int:
    """Of a tensor, those that differ: an expanded one is read where it lies."""
    if not isinstance(x, Tensor) or not x.numel():
        return 0
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return int(torch.Size(sizes).numel()) * x.element_size()


def traffic(model: RWKV, lanes: int, tokens: int) -> Traffic:
    """Of the blocks' forward and backward under bfloat16 autocast; the model's tensors are fake."""
    x = torch.empty(lanes, tokens, model.config.n_embd, requires_grad=True)
    with unset_fake_temporarily():
        sizes = model.zero_wkv(lanes, device="meta").shape
    shift = torch.empty(lanes, 2, model.config.n_embd)
    wkv = torch.empty(lanes, *sizes[2:])
    with Traffic() as counted:
        y, carry = x, None
        with torch.autocast("cpu", torch.bfloat16):
            for block in model.blocks:
                y, _, _, carry = block(y, shift, wkv, None, carry)
        y.backward(torch.empty_like(y))
    return counted


def fake_model(generation: str, channels: int, layers: int) -> RWKV:
    """Whose weights are fake tensors; under FakeTensorMode."""
    kind, config = {"RWKV-4": (RWKV4, RWKV4Config), "RWKV-7": (RWKV7, RWKV7Config)}[generation]
    with unset_fake_temporarily(), torch.device("meta"):
        model = kind(config(256, channels, layers))
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, torch.nn.Parameter(torch.empty(p.shape)))
    return model


@contextmanager
def cuda_kernels(fused: bool = True):
    """CPU tensors go where CUDA's would: torch without CUDA has no autograd for those, not even for fake ones.

    fused: False for WKV alone.
    """
    with ExitStack() as stack:
        patch = lambda *a: stack.enter_context(mock.patch.object(*a))  # noqa: E731
        for operator in (wkv4, wkv7):
            patch(operator, "pick", lambda name, backends, *_: backends["cuda"])
        patch(elementwise, "kernels_for", lambda x, operator, cpu, cuda: cuda if fused else None)
        yield


def of_a_layer(
    generation: str, channels=CHANNELS, lanes=LANES, tokens=TOKENS, fused=True
) -> tuple[Counter, Counter, int]:
    """(bytes, calls, bytes between products and WKV) by operation, of one layer in the middle of a model."""
    with cuda_kernels(fused), FakeTensorMode():
        two, three = (traffic(fake_model(generation, channels, layers), lanes, tokens) for layers in (2, 3))
    three.bytes.subtract(two.bytes), three.calls.subtract(two.calls)
    return three.bytes, three.calls, three.between()


if __name__ == "__main__":
    for generation in ("RWKV-4", "RWKV-7"):
        moved, calls, between = of_a_layer(generation)
        print(f"\n{generation}: a layer at {LANES} x {TOKENS} tokens of {CHANNELS} channels, forward and backward")
        for name, n in moved.most_common():
            if n:
                print(f"  {n / 1e9:7.2f} GB {calls[name]:5} x {name}")
        print(f"  {between / 1e9:7.2f} GB between products and WKV")
        print(f"  {of_a_layer(generation, fused=False)[2] / 1e9:7.2f} GB by torch's own operations")
