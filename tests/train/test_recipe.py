"""The recipe as the design notes have it: fresh values, parameter groups, and steps of a model written plainly."""

import math
from dataclasses import replace

import plain_rwkv4
import plain_rwkv7
import pytest
import torch
from helpers import assert_close_rel, random_model
from runs import config_of
from torch.nn import functional as F

from rwkv_train import load_model, save_model
from rwkv_train.bptt import chunked_loss
from rwkv_train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from rwkv_train.data.batches import make_batches
from rwkv_train.data.store import Store
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.train.fit import fit
from rwkv_train.train.optim import make_optimizer, parameter_groups

PLAIN = {"rwkv4": plain_rwkv4, "rwkv7": plain_rwkv7}
Z_LOSS, CHUNK = 1e-4, 7


class Plain:
    """The plain model in training: its parameters, and where its lanes stand."""

    def __init__(self, generation, model, lanes):
        self.read, self.zero = PLAIN[generation].read, PLAIN[generation].zero_state
        self.p = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.states = [self.zero(self.p)] * lanes

    def backward(self, tokens, targets, reset):
        """Gradients of the mean cross entropy, and of z_loss / 2 max^2, which gives z_loss max at the largest logit."""
        total, after = 0.0, []
        for lane, state in enumerate(self.states):
            for token, target, begins in zip(tokens[lane], targets[lane], reset[lane], strict=True):
                logits, state = self.read(self.p, token, self.zero(self.p) if begins else state)
                if target >= 0:
                    total = total + F.cross_entropy(logits, target) + Z_LOSS / 2 * logits.max() ** 2
            after.append([tuple(part.detach() for part in layer) for layer in state])
        (total / (targets >= 0).sum()).backward()
        self.states = after

    def optimizer(self, generation, lr, weight_decay):
        """Two or three times the rate for some, decay for matrices: groups by hand."""
        faster = {"rwkv4": {"att.time_decay": 2, "att.time_first": 3}, "rwkv7": {"att.w0": 2}}[generation]
        groups = []
        for name, p in self.p.items():
            times = next((n for end, n in faster.items() if name.endswith(end)), 1)
            decays = name.endswith(".weight") and "ln" not in name
            groups.append({"params": [p], "lr": lr * times, "weight_decay": weight_decay if decays else 0.0})
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps={"rwkv4": 1e-8, "rwkv7": 1e-18}[generation])

    def step(self, optimizer, share):
        """One step at a share of each group's rate, with the gradient's norm clipped to 1."""
        torch.nn.utils.clip_grad_norm_(self.p.values(), 1.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= share
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def batch(seed):
    """Two lanes of two chunks, with documents that begin in the first chunk and in the second."""
    rng = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(31, (2, 2 * CHUNK), generator=rng) for _ in range(2))
    targets[:, ::5], reset = -100, torch.zeros(2, 2 * CHUNK, dtype=torch.bool)
    reset[0, 4] = reset[1, 9] = True
    return tokens, targets, reset


def backward(model, tokens, targets, reset, state=None):
    loss, n, state = chunked_loss(model, tokens, targets, state, reset, CHUNK, z_loss=Z_LOSS)
    (loss / n).backward()
    return state.detach()


def test_gradients_are_those_of_the_plain_model(generation):
    """In float64 to the rounding. In float32, ours are as far from these as the plain model's are in float32."""
    ours, plain = {}, {}
    for dtype in (torch.float64, torch.float32):
        model = random_model(generation=generation, dtype=dtype)
        theirs = Plain(generation, model, lanes=2)
        backward(model, *batch(3))
        theirs.backward(*batch(3))
        ours[dtype] = {name: p.grad for name, p in model.named_parameters()}
        plain[dtype] = {name: p.grad for name, p in theirs.p.items()}
    exact, rounding = plain[torch.float64], 0.0
    for name, gradient in exact.items():
        assert gradient.any(), name
        assert_close_rel(ours[torch.float64][name], gradient, 1e-12, name)
        rounding = max(rounding, assert_close_rel(plain[torch.float32][name], gradient, 1e-5, name))
    for name, gradient in exact.items():
        assert_close_rel(ours[torch.float32][name], gradient, max(1e-6, 3 * rounding), name)


def test_steps_are_those_of_the_plain_model(generation):
    """Values after each of three steps, the state carried from one to the next: groups, decay, clipping, moments."""
    model = random_model(generation=generation, dtype=torch.float64)
    plain, state = Plain(generation, model, lanes=2), None
    config = OptimConfig(lr=1e-2, weight_decay=0.1, schedule="constant", warmup=2)
    optimizer, scheduler = make_optimizer(model, config, steps=3)
    by_hand = plain.optimizer(generation, 1e-2, 0.1)
    for n, share in enumerate((1 / 3, 2 / 3, 1)):
        state = backward(model, *batch(n), state)
        plain.backward(*batch(n))
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        plain.step(by_hand, share)
        for name, p in model.named_parameters():
            assert_close_rel(p, plain.p[name], 1e-10, name)


def test_a_run_trains_as_the_plain_model_does(store, tmp_path, generation):
    """The whole of `fit` in float32: how far each parameter has come in three steps."""
    base = random_model(generation=generation, vocab_size=257)
    save_model(base, tmp_path / "base.pth")
    config = config_of(
        store,
        tmp_path,
        model=ModelConfig(init=str(tmp_path / "base.pth")),
        data=DataConfig(path=str(store), lanes=2, chunk_len=16, horizon=2, val_share=0),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, schedule="constant", warmup=2, z_loss=Z_LOSS),
        train=TrainConfig(steps=3, save_every=3, log_every=1, device="cpu"),
    )
    config = replace(config, samples=replace(config.samples, prompts=[]))
    assert fit(config) == 0
    plain = Plain(generation, base, lanes=2)
    by_hand = plain.optimizer(generation, 1e-3, 0.1)
    batches = make_batches(config, Store.open(str(store)), vocab_size=257)[0]
    for n, share in enumerate((1 / 3, 2 / 3, 1)):
        plain.backward(*(batches[n][name] for name in ("tokens", "targets", "reset")))
        plain.step(by_hand, share)
    before = dict(base.named_parameters())
    for name, p in load_model(tmp_path / "run").named_parameters():
        assert_close_rel(p - before[name], plain.p[name] - before[name], 1e-4, name)


# A part of a block, by name: (times the learning rate, whether it decays).
NORMS = {f"{norm}.{kind}": (1, False) for norm in ("ln1", "ln2") for kind in ("weight", "bias")}
BLOCK4 = NORMS | {
    "att.time_decay": (2, False),
    "att.time_first": (3, False),
    "att.time_mix_k": (1, False),
    "att.time_mix_v": (1, False),
    "att.time_mix_r": (1, False),
    "att.key.weight": (1, True),
    "att.value.weight": (1, True),
    "att.receptance.weight": (1, True),
    "att.output.weight": (1, True),
    "ffn.time_mix_k": (1, False),
    "ffn.time_mix_r": (1, False),
    "ffn.key.weight": (1, True),
    "ffn.receptance.weight": (1, True),
    "ffn.value.weight": (1, True),
}
BLOCK7 = NORMS | {
    **{f"att.x_{letter}": (1, False) for letter in "rwkvag"},
    "att.w0": (2, False),
    **{f"att.{vector}": (1, False) for vector in ("a0", "v0", "k_k", "k_a")},
    **{f"att.{letter}{n}": (1, False) for letter in "wavg" for n in (1, 2)},  # matrices, and no `.weight`
    "att.r_k": (1, False),
    "att.receptance.weight": (1, True),
    "att.key.weight": (1, True),
    "att.value.weight": (1, True),
    "att.output.weight": (1, True),
    "att.ln_x.weight": (1, False),
    "att.ln_x.bias": (1, False),
    "ffn.x_k": (1, False),
    "ffn.key.weight": (1, True),
    "ffn.value.weight": (1, True),
}


def test_the_group_of_every_parameter(generation):
    expected = {"emb.weight": (1, True), "head.weight": (1, True)}
    expected |= {f"{norm}.{kind}": (1, False) for norm in ("blocks.0.ln0", "ln_out") for kind in ("weight", "bias")}
    for layer in range(2):
        block = {"rwkv4": BLOCK4, "rwkv7": BLOCK7}[generation]
        none = ("att.v0", "att.v1", "att.v2") if layer == 0 else ()
        expected |= {f"blocks.{layer}.{name}": of for name, of in block.items() if name not in none}
    model = random_model(generation=generation)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.1)):
        found |= {names[id(p)]: (group["lr"], group["weight_decay"] == 0.1) for p in group["params"]}
    assert found == expected


def row(count, value):
    return torch.tensor([value(n) for n in range(count)])


def fresh4(c, layers, layer):
    """What a block of an RWKV-4 begins as: values, or (gain,) of an orthogonal matrix."""
    r01, r10 = layer / (layers - 1), 1 - layer / layers
    share = lambda power, more=0.0: row(c, lambda i: (i / c) ** power + more)  # noqa: E731
    return {
        "att.time_decay": row(c, lambda h: -5 + 8 * (h / (c - 1)) ** (0.7 + 1.3 * r01)),
        "att.time_first": row(c, lambda i: math.log(0.3) + 0.5 * ((i + 1) % 3 - 1)),
        "att.time_mix_k": share(r10),
        "att.time_mix_v": share(r10, 0.3 * r01),
        "att.time_mix_r": share(0.5 * r10),
        "ffn.time_mix_k": share(r10),
        "ffn.time_mix_r": share(r10),
        **{f"{zero}.weight": 0.0 for zero in ("att.key", "att.receptance", "att.output", "ffn.value")},
        "ffn.receptance.weight": 0.0,
        "att.value.weight": (1.0,),
        "ffn.key.weight": (2.0,),  # the root of 4c / c
    }


def fresh7(c, layers, layer, size=64):
    """The same of an RWKV-7."""
    r01, r10 = layer / (layers - 1), 1 - layer / layers
    share = lambda power: row(c, lambda n: 1 - (n / c) ** power)  # noqa: E731
    tilt = lambda start, slope: row(c, lambda n: start + slope * (n / (c - 1) - 0.5))  # noqa: E731

    def z(n):
        z = (n % size - (size - 1) / 2) / ((size - 1) / 2)
        return z * abs(z)

    shares = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    first_v = layer == 0
    return {
        **{f"att.x_{letter}": share(power * r10) for letter, power in shares.items()},
        "ffn.x_k": share(r10**4),
        "att.w0": row(c, lambda n: -6 + 6 * (n / (c - 1)) ** (1 + r01**0.3) + 0.5 + 2.5 * z(n)),
        "att.a0": row(c, lambda n: -0.19 + 0.3 * z(n) + 0.4 * (n / (c - 1) - 0.5)),
        **({} if first_v else {"att.v0": tilt(0.73, -0.4), "att.v1": 0.0, "att.v2": (0.1,)}),
        "att.k_k": tilt(0.71, -0.1),
        "att.k_a": 1.02,
        "att.r_k": -0.04,
        **{f"att.{letter}1": 0.0 for letter in "wag"},
        **{f"att.{letter}2": (0.1,) for letter in "wag"},
        "att.receptance.weight": (1.0,),
        "att.key.weight": (0.1,),
        "att.value.weight": (1.0,),
        "att.output.weight": 0.0,
        "ffn.key.weight": (1.0,),
        "ffn.value.weight": 0.0,
        "att.ln_x.weight": ((1 + layer) / layers) ** 0.7,
        "att.ln_x.bias": 0.0,
    }


@pytest.mark.parametrize("vocab_size", [300, 40])  # the head's gain is that of a matrix that widens, or not
def test_the_fresh_values_of_every_parameter(generation, vocab_size):
    c, layers = 128, 3
    config, fresh = {
        "rwkv4": (RWKV4Config(vocab_size, c, layers), fresh4),
        "rwkv7": (RWKV7Config(vocab_size, c, layers), fresh7),
    }[generation]
    found = dict((RWKV7 if generation == "rwkv7" else RWKV4)(config).init_weights().named_parameters())
    emb = found.pop("emb.weight")
    assert 0.9e-4 < emb.abs().max() <= 1e-4 and emb.mean().abs() < 1e-5
    expected = {"head.weight": (0.5 * max(1.0, math.sqrt(vocab_size / c)),)}
    for norm in ("blocks.0.ln0", "ln_out", *(f"blocks.{i}.ln{n}" for i in range(layers) for n in (1, 2))):
        expected |= {f"{norm}.weight": 1.0, f"{norm}.bias": 0.0}
    for layer in range(layers):
        expected |= {f"blocks.{layer}.{name}": value for name, value in fresh(c, layers, layer).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, tuple):
            matrix = found[name] if found[name].shape[0] <= found[name].shape[1] else found[name].t()
            found[name], value = matrix @ matrix.t(), value[0] ** 2 * torch.eye(len(matrix))
        value = torch.as_tensor(value).expand(found[name].shape) if isinstance(value, float) else value
        torch.testing.assert_close(found[name].reshape(value.shape), value.float(), rtol=1e-5, atol=1e-5, msg=name)
