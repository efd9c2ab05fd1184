"""What other programs make of our files, and we of theirs: transformers and the PyPI package rwkv.

And the case this project began with: training on a CPU from a carried state, which transformers cannot.
"""

import functools

import pytest
import torch
from helpers import assert_close_rel, random_model
from torch.nn import functional as F

from rwkv_train import load_model, save_model
from rwkv_train.checkpoints.states import from_rwkv
from rwkv_train.models import rwkv4, rwkv7
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7

T = 20


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def random_tokens(*shape, seed=0):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def to_transformers(transformers, model, folder):
    save_model(model, folder)
    return transformers.RwkvForCausalLM.from_pretrained(folder, torch_dtype="auto")


@pytest.mark.parametrize("n_layer", [2, 7])  # at 7, transformers halves activations after the sixth (rescale_every)
def test_logits_and_state_equal_transformers(transformers, tmp_path, n_layer):
    model, tokens = random_model(n_layer=n_layer), random_tokens(2, T)
    theirs = to_transformers(transformers, model, tmp_path / "hf").eval()
    with torch.no_grad():
        logits, state = model(tokens)
        plain = theirs(tokens, use_cache=False).logits
        cached = theirs(tokens, use_cache=True)
    assert (logits - plain).abs().max() <= 1e-4
    assert (logits - cached.logits).abs().max() <= 1e-4
    # theirs: channel mix, time mix, numerator, denominator, exponent, each [B,C,L]
    ffn, att, a, b, e = (t.transpose(1, 2) for t in cached.state)
    assert_close_rel(state.shift, torch.stack([att, ffn], 2), 1e-5, "shift")
    assert_close_rel(state.wkv, torch.stack([a, b, e], 2), 1e-5, "wkv")


def test_transformers_files_survive_us(transformers, tmp_path):
    """save_pretrained -> load_model -> .pth -> load_model -> directory -> from_pretrained, bit by bit."""
    config = transformers.RwkvConfig(
        vocab_size=31, hidden_size=12, num_hidden_layers=3, attention_hidden_size=16, intermediate_size=20
    )
    theirs = transformers.RwkvForCausalLM(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10kB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    save_model(load_model(tmp_path / "theirs"), tmp_path / "m.pth")
    back = to_transformers(transformers, load_model(tmp_path / "m.pth"), tmp_path / "ours")
    expected, found = theirs.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    for option in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "attention_hidden_size",
        "intermediate_size",
    ):
        assert getattr(back.config, option) == getattr(config, option)


def test_logits_and_state_equal_the_rwkv_package(rwkv_package, tmp_path, generation):
    sizes = {"n_embd": 16} if generation == "rwkv4" else {"n_embd": 128, "head_size": 64}
    model, tokens = random_model(n_layer=3, n_ffn=40, generation=generation, **sizes), random_tokens(1, T)
    save_model(model, tmp_path / "m.pth")
    theirs = rwkv_package(tmp_path / "m", generation)
    with torch.no_grad():
        logits, state = model(tokens)
    at_once, their_state = theirs.forward(tokens[0].tolist(), None, full_output=True)
    assert (logits[0] - at_once).abs().max() <= 1e-3
    carried = None
    for t, token in enumerate(tokens[0].tolist()):
        one, carried = theirs.forward([token], carried)
        assert (logits[0, t] - one).abs().max() <= 1e-3
    for found in (their_state, carried):
        for ours, part in zip(state, from_rwkv(found, model), strict=True):
            assert_close_rel(ours, part, 1e-5)


def loss_of(model, tokens, state):
    logits, state = model(tokens[:, :-1], state)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), state


def gradients(model, tokens, state):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model, tokens, state)[0], parameters), strict=True))


def test_training_from_a_carried_state_on_a_cpu(monkeypatch, generation):
    """Every parameter's gradient equals the reference backend's, and the slope of the loss itself."""
    model, tokens = random_model(dtype=torch.float64, generation=generation), random_tokens(2, T)
    first, second = tokens[:, : T // 2], tokens[:, T // 2 :]
    with torch.no_grad():
        state = model(first)[1]
    assert all(t.abs().min() > 0 for t in state)  # the case is a real one
    found = gradients(model, second, state)
    with monkeypatch.context() as patch:
        patch.setattr(rwkv4, "wkv4", functools.partial(wkv4, backend="reference"))
        patch.setattr(rwkv7, "wkv7", functools.partial(wkv7, backend="reference"))
        for name, expected in gradients(model, second, state).items():
            assert_close_rel(found[name], expected, 1e-10, name)
    rng, h = torch.Generator().manual_seed(1), 1e-5
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        with torch.no_grad():
            losses = []
            for step in (h, -2 * h, h):  # to p + h, p - h, and back
                p.add_(direction, alpha=step)
                losses.append(loss_of(model, second, state)[0])
        slope = (losses[0] - losses[1]) / (2 * h)
        assert_close_rel((found[name] * direction).sum(), slope, 1e-6, name)


def test_undetached_state_gives_the_gradient_of_the_whole_text(generation):
    model, tokens = random_model(dtype=torch.float64, generation=generation), random_tokens(2, T)
    half = T // 2
    parameters = list(model.parameters())
    whole = F.cross_entropy(model(tokens[:, :-1])[0][:, half:].flatten(0, 1), tokens[:, half + 1 :].flatten())
    in_two = loss_of(model, tokens[:, half:], model(tokens[:, :half])[1])[0]
    pairs = zip(torch.autograd.grad(in_two, parameters), torch.autograd.grad(whole, parameters), strict=True)
    for (name, _), (found, expected) in zip(model.named_parameters(), pairs, strict=True):
        assert_close_rel(found, expected, 1e-10, name)


@pytest.mark.parametrize("training", [True, False])
def test_transformers_cannot_train_from_a_carried_state(transformers, tmp_path, training):
    """If this fails, they have repaired it: then compare gradients with theirs."""
    model, tokens = random_model(dtype=torch.float64), random_tokens(2, T)
    theirs = to_transformers(transformers, model, tmp_path / "hf").train(training)
    with torch.no_grad():
        state = theirs(tokens[:, : T // 2], use_cache=True).state
    logits = theirs(tokens[:, T // 2 :], state=state, use_cache=True).logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.square().mean().backward()
    loss_of(model, tokens[:, T // 2 :], model(tokens[:, : T // 2])[1].detach())[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
