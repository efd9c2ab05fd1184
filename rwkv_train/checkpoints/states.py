"""States in the forms of other programs: where a tuned RWKV-7 begins, and where a text has led.

A tuned state is a dict of blocks.N.att.time_state [H,N,N], alone or among a model's weights; token shifts begin at
zero. Its axes are [head, value, key], as ours: RWKV-PEFT, which trains such files, hands an RWKV-7's to its kernels so.
(The package `rwkv` turns those of RWKV-5 and 6, whose states it keeps as [head, key, value], and reads none for
RWKV-7.) Where a text has led is a list of tensors, layer by layer, that the PyPI package `rwkv` takes and gives:

RWKV-4: time mix shift [C], numerator [A], denominator [A], exponent [A], channel mix shift [C]
RWKV-7: time mix shift [C], wkv [H,N,N] as [head, value, key], channel mix shift [C]
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.weightfile import read_list, write_pth
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State

TIME_STATE = re.compile(r"blocks\.([0-9]+)\.att\.time_state")


def from_time_states(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The same tensors with initial_wkv [1,L,H,N,N] in place of time_state. Raises ValueError if a layer's is amiss."""
    layers = {int(match[1]): t for name, t in tensors.items() if (match := TIME_STATE.fullmatch(name))}
    if not layers:
        return tensors
    states = [layers.get(i) for i in range(len(layers))]
    if any(s is None or s.ndim != 3 or s.shape != states[0].shape for s in states):
        found = ", ".join(f"{i}: {list(t.shape)}" for i, t in sorted(layers.items()))
        raise ValueError(f"{source}: expected blocks.N.att.time_state [H,N,N] of every layer from 0 on, found {found}")
    others = {name: t for name, t in tensors.items() if not TIME_STATE.fullmatch(name)}
    if "initial_wkv" in others:
        raise ValueError(f"{source} holds both initial_wkv and time_state, the same state; remove one")
    return others | {"initial_wkv": torch.stack(states)[None]}


def to_time_states(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with an RWKV-7's state to begin in as others name it, if they have a place for all of it."""
    shift, wkv = tensors.get("initial_shift"), tensors.get("initial_wkv")
    if wkv is None or wkv.ndim != 5 or (shift is not None and shift.any()):
        return tensors
    others = {name: t for name, t in tensors.items() if name not in ("initial_shift", "initial_wkv")}
    return others | {f"blocks.{i}.att.time_state": s for i, s in enumerate(wkv.detach()[0])}


def told_of_beginning(written: dict[str, Tensor]) -> list[str]:
    """What is to be told of the state to begin in among tensors that were written, if there is one: who reads it."""
    if any(map(TIME_STATE.fullmatch, written)):
        return ["the state it begins in: blocks.N.att.time_state, which RWKV-Runner, ai00 and RWKV-PEFT read"]
    if "initial_wkv" not in written:
        return []
    why = "its token shifts are not zero" if written["initial_wkv"].ndim == 5 else "that of an RWKV-4 has no other form"
    return [f"the state it begins in: initial_shift and initial_wkv, which this program alone reads: {why}"]


def to_rwkv(state: State, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A state of one lane as `rwkv` takes it, on the CPU. dtype: of the shifts; there it has to be the model's."""
    listed = []
    for (att, ffn), wkv in zip(state.shift[0], state.wkv[0], strict=True):
        sums = wkv if wkv.ndim == 2 else [wkv]
        listed += [att.to(dtype), *(part.float() for part in sums), ffn.to(dtype)]
    return [part.detach().cpu().clone() for part in listed]


def from_rwkv(listed: list[Tensor], model: RWKV, source: str | Path = "the state") -> State:
    """The inverse of `to_rwkv`, in the model's dtype of states and on its device.

    Raises ValueError, which names source, if that is no state of such a model, or not all of it is finite.
    """
    like = to_rwkv(model.zero_state(1))
    n = len(like) // model.config.n_layer
    shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in listed]
    if shapes != (wanted := [list(part.shape) for part in like]):
        raise ValueError(
            f"{source} holds {len(shapes)} tensors that begin with {shapes[:n]}, expected {len(wanted)} that begin "
            f"with {wanted[:n]}, as an {model.name} of {model.config.n_layer} layers has; take the model it is of"
        )
    if not all(part.isfinite().all() for part in listed):
        raise ValueError(f"{source} holds numbers that are not finite; make it again")
    att, *sums, ffn = (torch.stack([part.to(model.state_dtype) for part in listed[i::n]]) for i in range(n))
    wkv = torch.stack(sums, 1) if len(sums) > 1 else sums[0]
    return State(torch.stack([att, ffn], 1)[None], wkv[None]).to(model.device)


def save_state(state: State, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a state of one lane to a file that `torch.load` opens for `rwkv`; see `to_rwkv`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: write_pth(to_rwkv(state, dtype), temporary))


def load_state(path: str | Path, model: RWKV) -> State:
    """Read what `save_state`, or torch.save of a state of `rwkv`, has written. Raises as `from_rwkv` does."""
    return from_rwkv(read_list(Path(path)), model, path)
