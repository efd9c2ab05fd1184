"""Fixtures that several files use."""

import functools

import host_gpu
import pytest
from helpers import GENERATIONS
from runs import config_of, store_in

from rwkv_train.ops import build_cuda
from rwkv_train.train.fit import fit


@pytest.fixture(params=GENERATIONS)
def generation(request):
    """What `random_model` takes: both generations of models, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return store_in(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="session")
def finished_of(store, tmp_path_factory):
    """finished_of(generation): the folder of an uninterrupted run."""

    @functools.cache
    def run(generation):
        runs = tmp_path_factory.mktemp("runs")
        assert fit(config_of(store, runs, generation)) == 0
        return runs / "run"

    return run


@pytest.fixture
def finished(finished_of):
    """An uninterrupted run."""
    return finished_of("rwkv4")


@pytest.fixture(scope="session")
def kernels_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def on_cpu(kernels_folder, monkeypatch):
    """CUDA kernels are run on the CPU; how: see `host_gpu.launcher`."""
    how = {"descending": False, "launched": []}
    monkeypatch.setattr(build_cuda, "_launch", host_gpu.launcher(kernels_folder, how))
    return how
