"""What several tests need: a model with random weights everywhere, comparisons, expected failures."""

from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from rwkv_train import cli, load_model
from rwkv_train.checkpoints.run_checkpoint import TRAINER, checkpoint_folder, commit, draft
from rwkv_train.models import loss
from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config

GENERATIONS = ("rwkv4", "rwkv7")


def random_model(
    n_embd: int = 16,
    n_layer: int = 2,
    vocab_size: int = 31,
    n_att: int = 0,
    n_ffn: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    generation: str = "rwkv4",
    head_size: int = 8,
    **config,
) -> RWKV:
    """A model in eval mode whose every parameter matters (`init_weights` leaves whole matrices at zero).

    n_att is of RWKV-4 alone, head_size of RWKV-7.
    """
    rng = torch.Generator().manual_seed(seed)
    if generation == "rwkv4":
        model = RWKV4(RWKV4Config(vocab_size, n_embd, n_layer, n_att, n_ffn, **config))
    else:
        config = {"rank_w": 3, "rank_a": 4, "rank_v": 5, "rank_g": 6} | config
        model = RWKV7(RWKV7Config(vocab_size, n_embd, n_layer, head_size, n_ffn, **config))
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if name.endswith("time_decay"):
                p.uniform_(-5, 2, generator=rng)
            elif "time_mix" in name or ".x_" in name:
                p.uniform_(0, 1, generator=rng)
            elif p.ndim == 1 or p.shape[:2] == (1, 1):  # layer norms around 1 and 0, other vectors around 0
                p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.2, generator=rng)
            else:
                p.normal_(0, 0.25, generator=rng)
    return model.to(dtype).eval()


def assert_close_rel(a: Tensor, b: Tensor, tol: float, name: str = "tensor") -> float:
    """Fail unless |a - b| <= tol * |b| in the 2-norm (b is the reference); returns the relative error.

    Shapes must agree exactly and both must be finite; all-zero references compare absolutely.
    """
    assert a.shape == b.shape, f"{name}: shape {list(a.shape)}, expected {list(b.shape)}"
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    assert a.isfinite().all(), f"{name}: not finite"
    assert b.isfinite().all(), f"{name}: reference not finite"
    norm = b.norm().item()
    error = (a - b).norm().item() / (norm if norm > 0 else 1.0)
    assert error <= tol, f"{name}: relative error {error:.3g}, allowed {tol:.3g}"
    return error


def head_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """The head's loss goes the way of CUDA tensors; products of 16 bits into 32, which no CPU has, are done in 32."""

    def mm(a, b, *, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total, a, b, *, out_dtype, out):
        assert out is total and total.dtype == out_dtype
        return total.add_(mm(a, b, out_dtype=out_dtype))

    patch.setattr(loss, "_on_gpu", lambda x: True)
    patch.setattr(torch, "mm", mm)
    patch.setattr(torch, "addmm", addmm)


def small_weights(generation="rwkv4", **changes):
    """A small model's tensors, some replaced (a value of None: removed); '__' in a name stands for '.'."""
    tensors = dict(random_model(n_embd=8, n_layer=2, vocab_size=11, generation=generation).state_dict())
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return tensors


def save_point(run, step, model, **facts):
    """A checkpoint of a run, with the weights of a model, as training writes it."""
    target = checkpoint_folder(Path(run), step)
    draft(target).mkdir(parents=True)
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"epoch": 0, "state_dict": weights, "optimizer_states": [{}]}, draft(target) / TRAINER)
    commit(target, step=step, **facts)
    return target


def fails_to_load(path, *parts, error=ValueError):
    """load_model(path) raises one line that holds the path's name and all the parts."""
    with pytest.raises(error) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (Path(path).name, *parts):
        assert part in message, f"{part!r} is not in: {message}"


def run(*argv, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command, run in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def hurt(file, data):
    """Damage a file in one of the ways that disks, copies and people have."""
    raw = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["cut", "empty", "flip", "append", "remove", "other"]))
    if how == "cut":
        del raw[data.draw(st.integers(1, len(raw) - 1)) :]
    elif how == "empty":
        raw.clear()
    elif how == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "append":
        raw += data.draw(st.binary(min_size=1, max_size=9))
    elif how == "other":
        raw = data.draw(st.sampled_from([b"[1, 2]", b"null", b'{"files": 3}', b"PK\x03\x04", bytes(100)]))
    file.write_bytes(raw)
    if how == "remove":
        file.unlink()
