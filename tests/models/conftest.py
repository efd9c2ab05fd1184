"""The PyPI package rwkv, as it has to be imported."""

import sys

import pytest
import torch


@pytest.fixture
def rwkv_package(monkeypatch):
    """Opens a .pth with the package; it reads its options from the environment and sets torch's when imported."""
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    def open_model(path, generation):
        monkeypatch.setenv("RWKV_V7_ON", "1" if generation == "rwkv7" else "0")
        monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
        return pytest.importorskip("rwkv.model").RWKV(model=str(path), strategy="cpu fp32")

    yield open_model
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
