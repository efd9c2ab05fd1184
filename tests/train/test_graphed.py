"""A recorded step is the plain one: its losses, state and gradients, and the weights of a run. Rehearsed on a CPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model
from runs import config_of, losses_of, model_of, weights
from torch.utils._pytree import tree_leaves

from rwkv_train.config import TrainConfig
from rwkv_train.train import fit as fitting
from rwkv_train.train import graphed
from rwkv_train.train.fit import fit


def rehearse(call):
    """A recording, of which a replay runs the call again and puts its results where the recorded run left them."""
    step = call.__self__
    for _ in range(3):
        call()
    kept = step.results, step.gradients

    def replay():
        call()
        for place, new in zip(tree_leaves(kept), tree_leaves((step.results, step.gradients)), strict=True):
            place.copy_(new)
        step.results, step.gradients = kept

    return replay


@pytest.mark.parametrize(("accumulate", "horizon"), [(1, 1), (2, 2)])
def test_a_run_of_recorded_steps_is_the_run_of_plain_ones(
    store, tmp_path, monkeypatch, generation, accumulate, horizon
):
    monkeypatch.setattr(fitting, "_check_machine", lambda config: None)
    monkeypatch.setattr(graphed, "capture", rehearse)
    found = {}
    for cuda_graph in (False, True):
        train = TrainConfig(
            steps=4, accumulate=accumulate, precision="bf16", log_every=1, val_every=2, cuda_graph=cuda_graph
        )
        config = config_of(store, tmp_path / str(cuda_graph), model=model_of(generation), train=train)
        assert fit(replace(config, data=replace(config.data, horizon=horizon))) == 0
        run = tmp_path / str(cuda_graph) / "run"
        found[cuda_graph] = weights(run), losses_of(run)
    (plain, losses), (ours, our_losses) = found.values()
    assert our_losses == losses
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_a_step_that_cannot_be_recorded_ends_in_one_line(monkeypatch):
    def fails(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed, "capture", fails)
    with pytest.raises(ValueError, match=r"train.cuda_graph.*not permitted.*drop it"):
        graphed.GraphedStep(lambda x: None, [])(torch.zeros(1))


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({}, {"device": "cpu"}, "train.device: cpu"),
        ({}, {"devices": 2}, "several devices"),
        ({}, {"strategy": "fsdp"}, "train.strategy: fsdp"),
        ({"dropout": 0.1}, {}, "model.dropout"),
    ],
)
def test_where_a_step_cannot_be_a_graph_it_is_refused(store, tmp_path, model, train, message):
    with pytest.raises(ValueError, match=f"train.cuda_graph and {message} contradict"):
        config_of(store, tmp_path, model=model_of(**model), train=TrainConfig(steps=1, cuda_graph=True, **train))


def test_a_model_that_begins_in_a_state_of_its_own_is_refused():
    model = random_model()
    config = SimpleNamespace(train=SimpleNamespace(cuda_graph=True), model=SimpleNamespace(init="a.pth"))
    graphed.refuse_graph(config, model)
    model.initial_wkv = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"train.cuda_graph: model.init \(a.pth\) begins documents"):
        graphed.refuse_graph(config, model)
