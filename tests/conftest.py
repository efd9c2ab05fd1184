"""Fixtures that several files use."""

import pytest
from helpers import GENERATIONS
from runs import config_of, store_in

from rwkv_train.fit import fit


@pytest.fixture(params=GENERATIONS)
def generation(request):
    """What `random_model` takes: both generations of models, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return store_in(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="session")
def finished(store, tmp_path_factory):
    """An uninterrupted run."""
    runs = tmp_path_factory.mktemp("runs")
    assert fit(config_of(store, runs)) == 0
    return runs / "run"
