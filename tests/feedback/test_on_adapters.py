"""Corrections of a model with an adapter on it, kept in 4 bits: learnt by each kind of factors, kept and undone."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from feedback_toys import BYTES, CONFIG, QUICK, rehearsal_set, small_model

from rwkv_train import load_model, save_model
from rwkv_train.feedback import Learner
from rwkv_train.feedback.trainable import changed, finished, trained_twin
from rwkv_train.models.adapters import is_adapter, tune
from rwkv_train.models.factors import FACTORS, Kind
from rwkv_train.models.quantised import quantise


@pytest.fixture
def adapted(tmp_path):
    """BASE+ADAPTER, the adapter one that changes little."""
    save_model(small_model(), tmp_path / "base.pth")
    model = load_model(tmp_path / "base.pth")
    tune(model, "miss", 4)
    adapter = {n: t if n.endswith("base") else torch.full_like(t, 0.01) for n, t in model.state_dict().items()}
    torch.save({name: t for name, t in adapter.items() if is_adapter(name)}, tmp_path / "adapter.pth")
    return f"{tmp_path}/base.pth+{tmp_path}/adapter.pth"


@pytest.mark.parametrize("trainable", get_args(Kind))
def test_a_correction_is_learnt_kept_and_undone_exactly(tmp_path, adapted, trainable):
    pytest.importorskip("torchao")

    def opened() -> Learner:
        model = quantise(load_model(adapted, torch.bfloat16), "nf4")
        config = replace(CONFIG, trainable=trainable, rank=4, steps=300)
        return Learner(model, BYTES, tmp_path / "profile", config=config, rehearsal=rehearsal_set(model))

    with opened() as learner:
        before = learner.weights
        outcome = learner.learn(QUICK[0])
        assert outcome.accepted and learner.answer(QUICK[0].question) == QUICK[0].answer, outcome
        after = learner.weights
    with opened() as learner:
        assert learner.weights == after != before
        assert learner.replay() == after
        learner.undo()
        assert learner.weights == before and learner.model is learner.base


@pytest.mark.parametrize("trainable", get_args(Kind))
def test_the_change_of_a_correction_has_its_rank(trainable):
    base = small_model()
    twin, parameters = trained_twin(base, trainable, rank=3)
    assert {name.rpartition(".")[2] for name in parameters} <= set(FACTORS)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    weights = changed(finished(twin, trainable), base)
    assert weights.keys() == {f"blocks.{i}.ffn.value.weight" for i in range(len(base.blocks) // 2, len(base.blocks))}
    most = 6 if trainable == "pissa" else 3  # what it began with is taken away
    for name, weight in weights.items():
        assert torch.linalg.matrix_rank(weight - base.get_parameter(name), rtol=1e-4) == most
