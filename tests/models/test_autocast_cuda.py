"""What reaches the CUDA kernels under autocast, by fake tensors of a GPU that is not here."""

import pytest
import torch
from host_gpu import cuda_autocast
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.ops import build_cuda


class Calls(TorchDispatchMode):
    """Keeps the dtypes of the tensors that each of our operators is given."""

    def __init__(self):
        super().__init__()
        self.given = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rwkv_train":
            dtypes = [str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, torch.Tensor)]
            self.given.setdefault(function._opname, set()).add(" ".join(dtypes))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def given(monkeypatch):
    """given(model, config): what each operator is given in a forward of a batch, under autocast to bfloat16."""

    def forward(model, config):
        monkeypatch.setattr(build_cuda, "available", lambda *asked: True)
        for drawn in (torch.nn.Linear, torch.nn.Embedding):  # there is no generator to draw from
            monkeypatch.setattr(drawn, "reset_parameters", lambda self: None)
        with FakeTensorMode(), torch.device("cuda"), cuda_autocast(), torch.no_grad():
            model = model(config)
            tokens, reset = (torch.zeros(2, 40, dtype=dtype) for dtype in (torch.int64, torch.bool))
            with Calls() as calls:
                model.hidden(tokens, None, reset)
        return calls.given

    return forward


def test_rwkv7(given):
    half, wide = "bfloat16", "float32"
    assert given(RWKV7, RWKV7Config(11, 128, 2, rank_w=8, rank_a=8, rank_v=8, rank_g=8)) == {
        "token_shift_mix": {f"{wide} {wide} bool {wide}"},
        "decay": {f"{half} {wide}"},
        "value_residual": {f"{half} {half} {half} {wide}"},
        "keys": {f"{half} {half} {wide} {wide} {wide}"},
        "wkv7": {f"{half} {wide} {half} {half} {wide} {wide} {wide} bool"},  # r, w, k, v, a, b, state, reset
        "head_output": {" ".join([half] * 5 + [wide] * 3)},
        "squared_relu": {half},
    }


def test_rwkv4(given, monkeypatch):
    monkeypatch.setattr(RWKV4, "zero_wkv", lambda self, batch, **like: torch.empty(batch, 2, 3, 128, **like))
    assert given(RWKV4, RWKV4Config(11, 128, 2)) == {
        "token_shift_mix": {"float32 float32 bool float32"},
        "wkv4": {"float32 float32 bfloat16 bfloat16 float32 bool"},  # w, u, k, v, state, reset
        "gate": {"bfloat16 bfloat16"},
        "squared_relu": {"bfloat16"},
    }
