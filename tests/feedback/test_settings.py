"""Settings of corrections: their names of before are read, and what is no setting is refused."""

from dataclasses import asdict, replace

import pytest
from feedback_toys import CONFIG, open_learner

from rwkv_train.feedback import FeedbackConfig
from rwkv_train.feedback.settings import RENAMED, renamed

OLD = {"scope": "lora", "rate": 0.25, "steps": 7, "pull": 2.0, "talks": 3}


def test_old_names_are_read_wherever_settings_are_given(tmp_path):
    config = FeedbackConfig(**OLD)
    assert config == FeedbackConfig(trainable="lora", step_factor=0.25, steps=7, kl_weight=2.0, free_running=3)
    assert FeedbackConfig(**asdict(config)) == config == replace(config)
    assert set(RENAMED.values()) <= asdict(config).keys() and not RENAMED.keys() & asdict(config).keys()
    with open_learner(tmp_path) as learner:
        learner.configure(rate=0.25, reach=9)
        assert learner.config == replace(CONFIG, step_factor=0.25, truncation=9)
    with open_learner(tmp_path) as learner:
        assert learner.config == replace(CONFIG, step_factor=0.25, truncation=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.0, "step_factor": 1.0}, "rate is the old name of step_factor"),
        ({"velocity": 1.0}, "no setting velocity of corrections; there are: trainable, "),
        ({"scope": "all"}, "trainable must be one of"),
        ({"budget": -1.0}, "max_kl must not be negative"),
        ({"kl_weight": float("inf")}, "kl_weight must be finite"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_what_is_no_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FeedbackConfig(**settings)


def test_no_more_layers_are_trained_than_there_are(tmp_path):
    with open_learner(tmp_path) as learner, pytest.raises(ValueError, match="layers must be at most 1"):
        learner.configure(layers=2)


def test_no_rank_is_more_than_a_matrix_has(tmp_path):
    with open_learner(tmp_path) as learner, pytest.raises(ValueError, match="rank must be at most "):
        learner.configure(rank=9999)


def test_names_of_today_stay():
    assert renamed({"steps": 1, "rate": 2}) == {"steps": 1, "step_factor": 2}
