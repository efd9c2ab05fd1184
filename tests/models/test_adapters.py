"""Low-rank factors and initial states: only they change, and the model with them is what was trained."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from helpers import assert_close_rel, random_model
from runs import config_of, metrics

from rwkv_train import load_model, save_model
from rwkv_train.bptt import chunked_loss
from rwkv_train.checkpoints.modelfile import save_adapter
from rwkv_train.config import ModelConfig, TrainConfig
from rwkv_train.models.adapters import is_adapter, tune
from rwkv_train.models.factors import Kind, add_product, as_lora, begin, change
from rwkv_train.models.quantised import BITS
from rwkv_train.ops.products import quantised_bytes
from rwkv_train.train.fit import fit, make_model

WHAT = ("lora", "pissa", "miss", "state")


def tuned(generation, what, **kwargs):
    """A model whose factors or state are no longer what they begin as."""
    model = random_model(generation=generation, dtype=torch.float64, **kwargs)
    tune(model, what, rank=3)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    if what == "state":
        model.repair_initial_state()
    return model


@pytest.mark.parametrize("what", WHAT)
def test_nothing_changes_until_it_is_trained_and_then_only_the_little(generation, what):
    tokens, plain = torch.arange(20)[None], random_model(generation=generation, dtype=torch.float64)
    model = random_model(generation=generation, dtype=torch.float64)
    tune(model, what, rank=3)
    assert_close_rel(model(tokens)[0], plain(tokens)[0], 1e-12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = {name for name in filter(is_adapter, model.state_dict()) if name.endswith(("base", "up0", "down0"))}
    matrices = 2 * (7 if generation == "rwkv4" else 6)  # of two blocks
    assert len(kept) == (3 if what == "pissa" else 1) * matrices
    still = {"initial_shift"} if (what, generation) == ("state", "rwkv7") else set()  # elsewhere it is none of a state
    assert trained == set(filter(is_adapter, model.state_dict())) - kept - still
    assert len(trained) == {"state": 2 - len(still), "miss": matrices}.get(what, 2 * matrices)
    model = tuned(generation, what)
    chunked_loss(model, tokens, tokens, None, None, chunk_len=7)[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained


def test_packed_documents_begin_in_the_trained_state(generation):
    """Losses and gradients, with document starts that differ between the lanes and a state carried in."""
    model = tuned(generation, "state").requires_grad_(True)
    rng = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, 31, (2, 23), generator=rng) for _ in range(2))
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, [5, 6]] = reset[1, 11] = reset[1, 0] = True
    carried = model(tokens[:, :4])[1]
    carried = type(carried)(*(part.detach() for part in carried))
    loss, _, end = chunked_loss(model, tokens, targets, carried, reset, chunk_len=8)
    packed = torch.autograd.grad(loss, [model.initial_shift, model.initial_wkv])
    single, ends = 0, []
    for lane, cuts in enumerate([(0, 5, 6, 23), (0, 11, 23)]):
        state = carried.select(0) if lane == 0 else None
        for start, stop in pairwise(cuts):
            piece = slice(start, stop)
            part, _, state = chunked_loss(
                model, tokens[lane : lane + 1, piece], targets[lane : lane + 1, piece], state, None, chunk_len=99
            )
            single, last, state = single + part, state, None
        ends.append(last)
    assert_close_rel(loss, single, 1e-10, "loss")
    for i, part in enumerate(end):
        assert_close_rel(part, torch.cat([e[i] for e in ends]), 1e-10, "state")
    for a, b in zip(packed, torch.autograd.grad(single, [model.initial_shift, model.initial_wkv]), strict=True):
        assert_close_rel(a, b, 1e-10, "gradient of the initial state")


@pytest.mark.parametrize("what", WHAT)
def test_a_run_trains_the_adapter_alone_and_it_can_be_kept_apart(finished_of, store, tmp_path, generation, what):
    base = tmp_path / "base.pth"
    save_model(load_model(finished_of(generation)), base)
    config = config_of(
        store,
        tmp_path,
        model=ModelConfig(init=str(base), tune=what, rank=None if what == "state" else 4),
        train=TrainConfig(steps=12, val_every=12, save_every=5, log_every=1, device="cpu"),
    )
    off = replace(config.train, checkpoint_blocks=False)
    assert config.checkpoint_blocks and not replace(config, train=off).checkpoint_blocks
    assert fit(replace(config, optim=replace(config.optim, lr=3e-2))) == 0
    losses = [r["val_loss"] for r in metrics(tmp_path / "run") if "val_loss" in r]
    assert losses[-1] < losses[0]
    whole, before = load_model(tmp_path / "run"), load_model(base)
    save_adapter(tmp_path / "run", tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").stat().st_size < base.stat().st_size
    on_top = load_model(f"{base}+{tmp_path}/adapter.safetensors")
    save_model(whole, tmp_path / "merged.pth")
    unmerged = make_model(config.model, None)
    weights = torch.load(next((tmp_path / "run/checkpoints/step=00000012").glob("*.ckpt")), weights_only=True)
    unmerged.load_state_dict({k.removeprefix("model."): v for k, v in weights["state_dict"].items()})
    for name, p in unmerged.state_dict().items():
        same = what == "pissa" or is_adapter(name) or torch.equal(p, before.state_dict()[name])
        assert same, name
    tokens = torch.arange(40)[None]
    expected = unmerged.eval()(tokens)[0]
    assert not torch.allclose(expected, before(tokens)[0])
    for model in (whole, on_top, load_model(tmp_path / "merged.pth")):
        assert_close_rel(model(tokens)[0], expected, 1e-4)
    if what == "state":
        with pytest.raises(ValueError, match="no place for the state"):
            save_model(whole, tmp_path / "hf")


@pytest.mark.parametrize(("bits", "tune"), [("int8", "lora"), ("nf4", "pissa"), ("nf4", "miss")])
def test_matrices_in_few_bits(finished_of, store, tmp_path, generation, bits, tune):
    """They compute as what a state dict says they are, take few bits a number, and a run resumes to the bit."""
    base, tokens = tmp_path / "base.pth", torch.arange(40)[None]
    save_model(load_model(finished_of(generation)), base)
    config = ModelConfig(init=str(base), tune=tune, base=bits)
    model, plain = make_model(config, None), make_model(replace(config, base="float"), None)
    weight = model.blocks[0].ffn.key.weight
    assert quantised_bytes(weight) <= weight.numel() * BITS[bits] // 8 + 8 * len(weight) + 100  # and the scales
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    plain.load_state_dict(model.state_dict())
    gradients = []
    for m in (model, plain):
        loss = chunked_loss(m, tokens, tokens, None, None, chunk_len=7)[0]
        gradients.append(torch.autograd.grad(loss, [p for p in m.parameters() if p.requires_grad]))
    for a, b in zip(*gradients, strict=True):
        assert_close_rel(a, b, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_rel(model(tokens)[0], plain(tokens)[0], 5e-2)
    model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=rf"not that of model.init in {BITS[bits]} bits"):
        model.load_state_dict(make_model(replace(config, base="float"), None).state_dict())


def test_ranks_are_by_parts_of_names(generation):
    model = random_model(generation=generation)
    tune(model, "lora", 3, ranks=["blocks.1.ffn=0", "key=2", "blocks.0-1.att=5"])
    ranks = {name.removesuffix(".down"): len(p) for name, p in model.named_parameters() if name.endswith(".down")}
    assert ranks["blocks.0.ffn.key"] == ranks["blocks.1.att.key"] == 2
    assert ranks["blocks.0.ffn.value"] == 3 and ranks["blocks.1.att.output"] == 5
    assert not any(name.startswith("blocks.1.ffn") for name in ranks)
    for entry in ("blocks.2=4", "att.ke=4"):
        with pytest.raises(ValueError, match=f"model.ranks: {entry} fits no matrix"):
            tune(random_model(generation=generation), "lora", 3, ranks=[entry])
    for what in ("pissa", "miss"):
        with pytest.raises(ValueError, match="has room for, 16"):
            tune(random_model(generation=generation), what, 17)


@pytest.mark.parametrize("rank", [4, 5])  # 5 does not divide 16
def test_factors_are_what_they_add(rank):
    """Beside a weight and added to one, as a pair of factors, and as they begin."""
    weight, x = torch.randn(12, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    for kind in get_args(Kind):
        begun = begin(kind, weight, rank)
        assert kind == "pissa" or not change(begun, 16).any()
        made = {name: torch.randn_like(t) for name, t in begun.items()}
        assert_close_rel(add_product(x @ weight.t(), x, made), x @ (weight + change(made, 16)).t(), 1e-12)
        up, down = as_lora(made, 16)
        assert_close_rel(up @ down, change(made, 16), 1e-12)
    u, s, v = torch.linalg.svd(weight)
    principal = begin("pissa", weight, rank)
    assert_close_rel(change(principal, 16), u[:, :rank] * s[:rank] @ v[:rank], 1e-6)
    assert all(torch.equal(t, principal[name]) for name, t in begin("pissa", weight, rank).items())


@pytest.mark.parametrize(("bits", "tune"), [("int8", "lora"), ("nf4", "pissa")])
def test_a_run_beside_few_bits_resumes_to_the_bit(finished_of, store, tmp_path, bits, tune):
    save_model(load_model(finished_of("rwkv4")), tmp_path / "base.pth")
    config = ModelConfig(init=str(tmp_path / "base.pth"), tune=tune, base=bits, ranks=["att=4", "blocks.0.ffn=0"])
    runs = {}
    for name, steps in (("whole", [6]), ("resumed", [3, 6])):
        for last in steps:
            train = TrainConfig(steps=last, val_every=6, save_every=6, log_every=1, device="cpu")
            run = replace(config_of(store, tmp_path, model=config, train=train), name=name)
            run = replace(run, optim=replace(run.optim, lr=3e-2, schedule="constant"))
            assert fit(run, "newest" if last != steps[0] else None) == 0
        runs[name] = load_model(tmp_path / name).state_dict()
    assert all(torch.equal(runs["whole"][k], runs["resumed"][k]) for k in runs["whole"])
    losses = [r["val_loss"] for r in metrics(tmp_path / "whole") if "val_loss" in r]
    assert losses[-1] < losses[0]


def test_misfits_are_named(tmp_path, generation):
    model = tuned(generation, "lora")
    torch.save({k: v for k, v in model.state_dict().items() if is_adapter(k)}, tmp_path / "lora.pth")
    torch.save(random_model(generation=generation).state_dict(), tmp_path / "base.pth")
    torch.save(random_model(n_embd=8, generation=generation).state_dict(), tmp_path / "small.pth")
    load_model(f"{tmp_path}/base.pth+{tmp_path}/lora.pth")
    for what, name in (("lora", "blocks.0.att.key.down"), ("state", "initial_wkv")):
        adapter = {k: v for k, v in tuned(generation, what).state_dict().items() if is_adapter(k)}
        adapter[name].view(-1)[1] = float("nan")
        torch.save(adapter, tmp_path / "nan.pth")
        with pytest.raises(ValueError, match=rf"nan.pth: {name} holds numbers that are not finite"):
            load_model(f"{tmp_path}/base.pth+{tmp_path}/nan.pth")
    with pytest.raises(ValueError, match=r"lora.pth: blocks.0.att.key does not fit"):
        load_model(f"{tmp_path}/small.pth+{tmp_path}/lora.pth")
    with pytest.raises(ValueError, match=r"base.pth holds no adapter"):
        load_model(f"{tmp_path}/small.pth+{tmp_path}/base.pth")
    with pytest.raises(ValueError, match=r"small.pth holds no adapter"):
        save_adapter(tmp_path / "small.pth", tmp_path / "out.pth")
    for settings, message in (({"tune": "lora", "n_layer": 1}, "needs model.init"), ({"rank": 4}, "model.rank")):
        with pytest.raises(ValueError, match=message):
            ModelConfig(**{"init": None if "n_layer" in settings else "x.pth"} | settings)
