"""Models as a whole: numbers in bfloat16, lanes apart from each other, initial weights of RWKV-4 as in the recipe."""

import math

import pytest
import torch
from helpers import assert_close_rel, random_model

from rwkv_train.models.adapters import tune
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config


def tokens_of(model, lanes=2, length=19):
    rng = torch.Generator().manual_seed(5)
    return torch.randint(0, model.config.vocab_size, (lanes, length), generator=rng)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_with_rounded_weights(dtype, generation):
    """On the CPU too; the state stays float32."""
    model = random_model(n_layer=3, generation=generation).to(dtype)
    wide = random_model(n_layer=3, generation=generation)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    tokens = tokens_of(model)
    ours, state = model(tokens)
    theirs, wide_state = wide(tokens)
    assert ours.dtype == dtype and all(s.dtype == torch.float32 for s in state)
    assert_close_rel(ours, theirs, 0.05, "logits")
    sums = slice(2) if generation == "rwkv4" else slice(None)  # not the exponent
    assert_close_rel(state.wkv[:, 0, sums], wide_state.wkv[:, 0, sums], 0.05, "first layer's sums")
    ours.float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_lanes_do_not_see_each_other(generation):
    model = random_model(dtype=torch.float64, n_att=24, generation=generation)
    tokens = tokens_of(model, lanes=3)
    together, state = model(tokens, model.empty_state(3))
    for lane in range(3):
        alone, end = model(tokens[lane : lane + 1])
        assert_close_rel(together[lane : lane + 1], alone, 1e-12)
        for a, b in zip(state.select(lane), end, strict=True):
            assert_close_rel(a, b, 1e-12)


def test_a_reset_at_the_first_token_forgets_the_carried_state(generation):
    model = random_model(dtype=torch.float64, generation=generation)
    tokens = tokens_of(model)
    _, carried = model(tokens)
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[:, 0] = True
    assert_close_rel(model(tokens, carried, reset)[0], model(tokens)[0], 1e-12)
    assert not torch.allclose(model(tokens, carried)[0], model(tokens)[0])


@pytest.mark.parametrize("initial", [False, True])
@torch.no_grad()
def test_a_state_may_be_written_into_the_one_before(initial, generation):
    model = random_model(generation=generation)
    if initial:
        tune(model, "state", 0)
        model.initial_wkv.mul_(0.5).add_(0.1)
    tokens, reset = tokens_of(model, lanes=3), None
    if initial:
        reset = torch.zeros_like(tokens, dtype=torch.bool)
        reset[1, 4] = True
    _, carried = model(tokens)
    x, after = model.hidden(tokens, carried, reset)
    place = carried.clone()
    assert torch.equal(model.hidden(tokens, place, reset, into=place)[0], x)
    assert all(map(torch.equal, place, after))


def test_initial_weights():
    config = RWKV4Config(vocab_size=50, n_embd=8, n_layer=3)
    model = RWKV4(config).init_weights()
    first, last = model.blocks[0].att, model.blocks[2].att
    assert first.time_decay[0] == -5 and first.time_decay[-1] == 3
    assert last.time_decay[1].item() == pytest.approx(-5 + 8 * (1 / 7) ** 2)
    assert first.time_first.tolist()[:3] == pytest.approx([math.log(0.3), math.log(0.3) + 0.5, math.log(0.3) - 0.5])
    assert last.time_mix_v[0, 0, 4].item() == pytest.approx(0.5 ** (1 / 3) + 0.3)
    assert first.time_mix_r[0, 0, 4].item() == pytest.approx(0.5**0.5)
    key = model.blocks[1].ffn.key.weight
    assert_close_rel(key.T @ key, 4 * torch.eye(8), 1e-5, "orthogonal, gain 2")
    value = last.value.weight
    assert_close_rel(value.T @ value, torch.eye(8), 1e-5)
    assert model.emb.weight.abs().max() <= 1e-4
    for block in model.blocks:
        for zero in (block.att.key, block.att.receptance, block.att.output, block.ffn.value, block.ffn.receptance):
            assert zero.weight.abs().max() == 0


@pytest.mark.parametrize(
    "model",
    [RWKV4(RWKV4Config(vocab_size=3, n_embd=1, n_layer=1)), RWKV7(RWKV7Config(3, n_embd=1, n_layer=1, head_size=1))],
    ids=lambda model: model.name,
)
def test_one_layer_and_one_channel(model):
    model.init_weights()
    assert model(torch.tensor([[1, 2, 0]]))[0].isfinite().all()
