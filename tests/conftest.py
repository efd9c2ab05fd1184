"""How the suite is run, and fixtures that several files use."""

import functools
import os
import signal

# Tensors are so small here that threads would take longer to wait for each other than to compute. Before torch comes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import host_gpu
import hypothesis
import pytest
from helpers import GENERATIONS
from runs import config_of, store_in

from rwkv_train.ops import build_cuda

# The same examples each time, and none that an earlier run has left; a busy machine is no failure.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(optionalhook=True)  # a bare GPU machine has pytest alone
def pytest_xdist_auto_num_workers(config) -> int:
    """The whole suite is shared among processes; tests that are named run in this one (0), as do those under --pdb."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
    return min(4, os.cpu_count() or 1) if whole else 0


@pytest.fixture(params=GENERATIONS)
def generation(request):
    """What `random_model` takes: both generations of models, one after the other."""
    return request.param


@pytest.fixture
def heard_signals():
    """This process and its children take signals that the shell that started the tests may have it ignore."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):
        defaults[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return store_in(tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="session")
def finished_of(store, tmp_path_factory):
    """finished_of(generation): the folder of an uninterrupted run."""
    from rwkv_train.train.fit import fit  # here, since few tests need it and Lightning takes seconds

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
    """One for all processes of the suite."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def on_cpu(kernels_folder, monkeypatch):
    """CUDA kernels are run on the CPU; how: see `host_gpu.launcher`."""
    how = {"descending": False, "launched": []}
    monkeypatch.setattr(build_cuda, "_launch", host_gpu.launcher(kernels_folder, how))
    return how
