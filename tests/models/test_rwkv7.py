"""RWKV-7 as a whole: against a checkpoint that others trained, its fresh weights, what files may lack."""

import functools
import random
from pathlib import Path

import pytest
import torch
from helpers import assert_close_rel, random_model

from rwkv_train import load_model, save_model
from rwkv_train.models import rwkv7
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.ops import build_cpu
from rwkv_train.ops.wkv7 import wkv7

NAME = "shared/data/reverse_rwkv7_L4_D32_N16.pth"  # beside the repository, not in it
REVERSE = next(filter(Path.is_file, (folder / NAME for folder in Path(__file__).parents)), None)
needs_checkpoint = pytest.mark.skipif(REVERSE is None, reason=f"{NAME} is not here")
BACKENDS = ["reference", "torch", *["cpu"] * build_cpu.available()]


def digits_right(model, backend, splits=(64,)) -> tuple[int, int]:
    """Of 600 numbers of 1 to 60 digits, each after its digits in reverse: digits and ends foretold, and all of them."""
    rng = random.Random(42)
    numbers = [
        str(rng.randint(0 if size == 1 else 10 ** (size - 1), 10**size - 1)) for size in range(1, 61) for _ in range(10)
    ]
    texts = [f"{number},{number[::-1]}".ljust(129, "#") for number in numbers]
    ids = torch.tensor([["0123456789,#".index(c) for c in text] for text in texts])
    asked = torch.tensor([[text.index(",") <= t < text.index("#") for t in range(128)] for text in texts])
    found, state = [], None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(rwkv7, "wkv7", functools.partial(wkv7, backend=backend))
        for start, end in zip((0, *splits), (*splits, 128), strict=True):
            logits, state = model(ids[:, start:end], state)
            found.append(logits.argmax(-1))
    right = torch.cat(found, 1) == ids[:, 1:]
    return int((right & asked).sum()), int(asked.sum())


@needs_checkpoint
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("splits", [(64,), (), (1, 2, 50, 113)], ids=str)
def test_a_trained_model_reverses_every_string(backend, splits):
    assert digits_right(load_model(REVERSE), backend, splits) == (18_900, 18_900)


@needs_checkpoint
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "hf"])
def test_a_trained_model_survives_every_format(name, tmp_path):
    model = load_model(REVERSE)
    save_model(model, tmp_path / name)
    again = load_model(tmp_path / name)
    assert digits_right(again, "auto") == (18_900, 18_900)
    if name != "hf":  # which has no place for the first layer's unused weights
        assert list(again.state_dict()) == list(model.state_dict()) and again.config == model.config
    ours = again.state_dict()
    assert all(torch.equal(ours[name], p) for name, p in model.named_parameters())


def test_the_first_layers_value_residual_may_be_there_or_not(tmp_path):
    model, tokens = random_model(generation="rwkv7", first_v=True), torch.arange(9)[None]
    assert "blocks.0.att.v1" not in dict(model.named_parameters())  # nothing that optimizers or DDP would miss
    save_model(model, tmp_path / "with.pth")
    tensors = {k: v for k, v in model.state_dict().items() if ".0.att.v" not in k or "value" in k}
    assert len(tensors) == len(model.state_dict()) - 3
    torch.save(tensors, tmp_path / "without.pth")
    both = [load_model(tmp_path / name) for name in ("with.pth", "without.pth")]
    assert [m.config.first_v for m in both] == [True, False]
    assert torch.equal(*(m(tokens)[0] for m in both))


def test_initial_weights():
    model = RWKV7(RWKV7Config(vocab_size=300, n_embd=128, n_layer=3, head_size=64)).init_weights()
    first, last = model.blocks[0].att, model.blocks[2].att
    c = model.config
    assert (c.rank_w, c.rank_a, c.rank_v, c.rank_g) == (32, 32, 32, 64)
    assert first.w0[0, 0, 0] == -6 + 0.5 - 2.5 and first.w0[0, 0, -1] == 0 + 0.5 + 2.5
    assert last.w0[0, 0, 64].item() == pytest.approx(-6 + 6 * (64 / 127) ** 2 + 0.5 - 2.5)
    assert first.x_r[0, 0, 64].item() == pytest.approx(1 - 0.5**0.2)
    assert last.x_w[0, 0, 64].item() == pytest.approx(1 - 0.5**0.3)
    assert model.blocks[1].ffn.x_k[0, 0, 64].item() == pytest.approx(1 - 0.5 ** (16 / 81))
    assert last.a0[0, 0, 0].item() == pytest.approx(-0.19 - 0.3 - 0.2)
    assert last.v0[0, 0, -1].item() == pytest.approx(0.73 - 0.2) and not hasattr(first, "v0")
    assert first.k_k[0, 0, 0].item() == pytest.approx(0.76) and last.ln_x.weight[0] == 1
    assert_close_rel(last.g2 @ last.g2.T, 0.01 * torch.eye(64), 1e-5, "rows of g2")
    assert_close_rel(first.key.weight.T @ first.key.weight, 0.01 * torch.eye(128), 1e-5, "key")
    head = model.head.weight
    assert_close_rel(head.T @ head, 0.25 * 300 / 128 * torch.eye(128), 1e-5, "head")
    for block in model.blocks:
        for zero in (block.att.output.weight, block.ffn.value.weight, block.att.w1, block.att.g1):
            assert zero.abs().max() == 0
    with pytest.raises(ValueError, match=r"n_embd \(100\) must be a multiple of head_size \(64\)"):
        RWKV7Config(vocab_size=5, n_embd=100, n_layer=1)
