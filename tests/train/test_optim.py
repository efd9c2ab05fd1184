"""Schedules at their corners, and which parameters learn how fast."""

import pytest
from helpers import random_model

from rwkv_train.config import OptimConfig
from rwkv_train.train.optim import make_optimizer, parameter_groups, rate

STEPS = 100


@pytest.mark.parametrize("schedule", ["constant", "linear", "exponential", "cosine", "wsd"])
def test_schedule_rises_stays_within_bounds_and_ends_at_its_minimum(schedule):
    config = OptimConfig(lr=1e-3, min_lr=None, schedule=schedule, warmup=10)
    rates = [rate(config, s, STEPS) for s in range(STEPS)]
    assert rates[:11] == sorted(rates[:11]) and rates[0] > 0 and rates[10] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 1e-4)


def test_schedules_halfway():
    half = {
        s: rate(OptimConfig(lr=1.0, min_lr=0.01, schedule=s, warmup=0), 50, 101)
        for s in ("linear", "exponential", "cosine", "wsd")
    }
    expected = {"linear": 0.505, "exponential": 0.1, "cosine": 0.505, "wsd": 1.0}
    assert half == pytest.approx(expected)
    assert rate(OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup=0, decay_share=0.5), 75, 101) == pytest.approx(
        0.5
    )


def test_groups_of_the_recipe(generation):
    model = random_model(generation=generation)
    config = OptimConfig(lr=1e-3, weight_decay=0.1)
    of = {id(p): g for g in parameter_groups(model, config) for p in g["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        scale = {"time_decay": 2, "time_first": 3, "w0": 2}.get(name.split(".")[-1], 1)
        assert of[id(p)]["lr"] == pytest.approx(1e-3 * scale), name
        matrix = name.endswith(".weight") and ".ln" not in name and not name.startswith("ln")
        assert of[id(p)]["weight_decay"] == (0.1 if matrix else 0.0), name


def test_optimizer_follows_the_schedule_in_every_group(generation):
    config = OptimConfig(lr=1e-3, schedule="linear", warmup=3)
    model = random_model(generation=generation)
    optimizer, scheduler = make_optimizer(model, config, STEPS)
    assert optimizer.defaults["eps"] == {"rwkv4": 1e-8, "rwkv7": 1e-18}[generation]
    assert make_optimizer(model, OptimConfig(eps=1e-6), STEPS)[0].defaults["eps"] == 1e-6
    multipliers = (1, 2, 3) if generation == "rwkv4" else (1, 2)
    for step in range(20):
        lrs = sorted({g["lr"] for g in optimizer.param_groups})
        assert lrs == pytest.approx([k * rate(config, step, STEPS) for k in multipliers])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "optim.lr must be above 0"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "optim.min_lr .* between 0 and optim.lr"),
        ({"schedule": "constant", "min_lr": 1e-5}, "constant and optim.min_lr contradict"),
        ({"schedule": "exponential", "min_lr": 0.0}, "never reaches"),
        ({"warmup": -1}, "optim.warmup"),
    ],
)
def test_contradictions_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)
