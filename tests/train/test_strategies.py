"""FSDP in this process: what it gathers in 16 bits, gradients as without it, and what `plan` says of the exchange."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rel, random_model
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_train.bptt import chunked_loss
from rwkv_train.config import DataConfig, FitConfig, ModelConfig, TrainConfig
from rwkv_train.models.base import Linear
from rwkv_train.plan import command as planning
from rwkv_train.plan import formulas
from rwkv_train.train import strategies


@contextmanager
def sharded(model, gather_16, ranks):
    """A model in pieces; with one rank as it computes, with more as it exchanges: the others are not there."""
    group = {"backend": "gloo", "store": dist.HashStore()} if ranks == 1 else {"backend": "fake", "store": FakeStore()}
    dist.init_process_group(**group, rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data_parallel",))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strategies, "is_fsdp", lambda strategy: True)
            strategies.shard(model, SimpleNamespace(device_mesh={"data_parallel": mesh}), gather_16)
        yield model
    finally:
        dist.destroy_process_group()


class Exchanged(TorchDispatchMode):
    """Bytes of whole tensors that are gathered and scattered, by dtype."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.startswith("c10d"):
            largest = max((t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), key=torch.numel)
            self.bytes[largest.dtype] += largest.nbytes
        return function(*args, **(kwargs or {}))


def gradients(model, tokens):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss, n, _ = chunked_loss(model, tokens[:, :-1], tokens[:, 1:], None, None, 8)
    (loss / n).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def text(chunks):
    return torch.randint(0, 31, (2, 8 * chunks + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("gather_16", [True, False])
def test_a_model_in_pieces_has_the_gradients_of_a_whole_one(generation, gather_16):
    """Its layers come in 16 bits, the rest, and all gradients, in 32."""
    want, dtypes = gradients(random_model(generation=generation), text(1)), {}
    with sharded(random_model(generation=generation), gather_16, ranks=1) as model:
        for name, module in model.blocks.named_modules():
            kept = [n for n, _ in module.named_parameters(recurse=False)]
            module.register_forward_pre_hook(
                lambda m, *_, name=name, kept=kept: dtypes.update({f"{name}.{n}": getattr(m, n).dtype for n in kept})
            )
        for name, gradient in gradients(model, text(1)).items():
            assert gradient.dtype == torch.float32
            assert_close_rel(gradient.full_tensor(), want[name], 1e-5, name)
        layers = {name for name, m in model.blocks.named_modules() if isinstance(m, Linear)}
    in_16 = {name.removesuffix(".weight") for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert in_16 == (layers if gather_16 else set())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("chunks", [1, 3])
def test_what_is_exchanged_is_what_plan_says(generation, chunks):
    with sharded(random_model(generation=generation, n_embd=64), chunks == 1, ranks=2) as model, Exchanged() as seen:
        gradients(model, text(chunks))
    data = DataConfig("store", lanes=2, chunk_len=8, horizon=chunks)
    train = TrainConfig(steps=1, precision="bf16", devices=2, strategy="fsdp")
    config = FitConfig("run", ModelConfig(n_layer=2, n_embd=64), data, train)
    planned = 2 * formulas.exchanged(
        config, planning.sizes_of(model.config)
    )  # a device sends half of it; short vectors are padded
    assert sum(seen.bytes.values()) == pytest.approx(planned, rel=0.03)
    assert set(seen.bytes) == ({torch.bfloat16, torch.float32} if chunks == 1 else {torch.float32})
