"""Two small trained networks of rwkv.cpp, with the logits that its own tests expect after three bytes."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GENERATIONS, save_point
from rwkv_cpp import read_rwkv_cpp

from rwkv_train import load_model, save_model
from rwkv_train.models import rwkv4, rwkv7
from rwkv_train.ops import build_cpu
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7

FOLDER = "shared/data/tiny_rwkv_cpp"  # beside the repository, not in it
HERE = next(filter(Path.is_dir, (folder / FOLDER for folder in Path(__file__).parents)), None)
pytestmark = pytest.mark.skipif(HERE is None, reason=f"{FOLDER} is not here")
NAMES = {"rwkv4": "4v0-660K", "rwkv7": "7v0-834K"}
READ, BEFORE = torch.tensor([list(b'"in')]), torch.tensor([list(b"Another text.")])


@pytest.fixture(scope="module", params=GENERATIONS)
def trained(request, tmp_path_factory):
    """(a model, its logits after READ)."""
    path, name = tmp_path_factory.mktemp("trained") / "m.pth", NAMES[request.param]
    torch.save(read_rwkv_cpp(HERE / f"tiny-rwkv-{name}-FP32.bin"), path)
    return load_model(path), torch.from_numpy(np.fromfile(HERE / f"expected-logits-{name}.bin", np.float32))


def whole(model):
    return model(READ)[0]


def token_by_token(model):
    state = None
    for token in READ[0]:
        logits, state = model(token[None, None], state)
    return logits


def in_chunks(model):
    return model(READ[:, 2:], model(READ[:, :2])[1])[0]


def packed_behind_another(model):
    """Its beginning lies inside the second chunk, into which the first one's state is carried."""
    tokens = torch.cat([BEFORE, READ], 1)
    reset = torch.arange(tokens.shape[1])[None] == BEFORE.shape[1]
    cut = BEFORE.shape[1] - 4
    return model(tokens[:, cut:], model(tokens[:, :cut], None, reset[:, :cut])[1], reset[:, cut:])[0]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "torch", *["cpu"] * build_cpu.available()])
@pytest.mark.parametrize("read", [whole, token_by_token, in_chunks, packed_behind_another])
def test_logits_are_those_of_rwkv_cpp(trained, monkeypatch, backend, read):
    model, expected = trained
    monkeypatch.setattr(rwkv4, "wkv4", functools.partial(wkv4, backend=backend))
    monkeypatch.setattr(rwkv7, "wkv7", functools.partial(wkv7, backend=backend))
    assert (read(model)[0, -1] - expected).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "hf", "run"])
def test_they_stay_so_through_every_format(trained, tmp_path, name):
    model, expected = trained
    if name == "run":
        save_point(tmp_path / name, 3, model)
    else:
        save_model(model, tmp_path / name)
    assert (load_model(tmp_path / name)(READ)[0][0, -1] - expected).abs().max() <= 1e-5
