"""A tape: what a call did on the CPU, recorded once and run again without the Python in between.

Half of the time of a small model's token is not arithmetic: it is finding out, layer by layer, what to compute. For one
number of lanes that is always the same.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_train.ops import build_cpu

Call = Callable[[], object]
CHANGING = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def capture(call: Call) -> Call:
    """Run a call, and return what runs it again: our kernels and torch's operations, on the same addresses.

    As with `graph.capture` the call must take its inputs from tensors that stay, and what it leaves behind is what
    every run fills again, without gradients. RuntimeError where the call asks for a number, or draws one: what it does
    then is not always the same. `tolist` and `numpy` are not seen: the call must do without them.
    """
    tape = _Tape()
    with torch.inference_mode(False), torch.no_grad(), build_cpu.recorded(tape.add_kernel), tape:
        call()
    return tape.run


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, bool]] = []  # what to call, and whether it is a kernel of ours
        self.kept = []  # all tensors that were made: the kernels know addresses only

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import torch's compiler, which takes seconds

    def add_kernel(self, function: Callable, arguments: tuple) -> None:
        self.calls.append((functools.partial(function, *arguments), True))

    @torch.no_grad()
    def run(self) -> None:
        threads = torch.get_num_threads()
        for call, is_kernel in self.calls:
            if is_kernel:
                call(threads)
            else:
                call()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = _listed(result)
        if CHANGING & set(func.tags) or not _are_tensors(results):
            raise RuntimeError(f"{func} gives something else each time")
        self.kept.append(results)
        if call := _again(func, args, kwargs, results):
            self.calls.append((call, False))
        return result


def _are_tensors(results) -> bool:
    return isinstance(results, (list, tuple)) and all(isinstance(x, Tensor) for x in results)


def _again(func, args: tuple, kwargs: dict, results: list[Tensor]) -> Call | None:
    """What puts an operation's results once more where they lie; None for views and for memory that is not filled."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    if any(alias is not None and alias.is_write for alias in aliases):
        return functools.partial(func, *args, **kwargs)
    if any(alias is not None for alias in aliases):
        if results[0].untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
            raise RuntimeError(f"{func} made a copy where a view was expected")
        return None
    if "empty" in func._schema.name:
        return None
    if variant := _with_out(func):
        into, names = variant
        return functools.partial(into, *args, **kwargs, **dict(zip(names, results, strict=True)))

    def run():
        for old, new in zip(results, _listed(func(*args, **kwargs)), strict=True):
            old.copy_(new)

    return run


def _listed(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else result


@functools.cache
def _with_out(func):
    """The form of an operation that writes where it is told, and the names of those arguments; None without one."""
    form = lambda schema: [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]  # noqa: E731
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        names = tuple(a.name for a in other._schema.arguments if a.is_out)
        if len(names) == len(func._schema.returns) and form(other._schema) == form(func._schema):
            return other, names
    return None
