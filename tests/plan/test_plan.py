"""Plans against what happens: tensors alive in a step, peaks of processes, steps of a run; and the command."""

import json

import pytest
import torch
from helpers import GENERATIONS, random_model, run
from plan_check import CASES, config_of, measured, predicted
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_train import save_model
from rwkv_train.bptt import chunked_loss
from rwkv_train.config import DataConfig, FitConfig, ModelConfig, OptimConfig, TrainConfig
from rwkv_train.models import loss
from rwkv_train.models.fresh import fresh_sizes
from rwkv_train.ops import build_cpu
from rwkv_train.plan import card
from rwkv_train.plan import command as planning
from rwkv_train.plan import formulas as plan
from rwkv_train.plan.settings import PlanConfig
from rwkv_train.plan.sizes import Sizes
from rwkv_train.train.fit import make_model
from rwkv_train.train.optim import make_optimizer


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, after every operation; `peak` is the most."""

    def __init__(self, tensors):
        super().__init__()
        self.storages, self.bytes, self.peak = {}, 0, 0  # bytes: of all that were seen, gone or not
        self.add(tensors)

    def add(self, tensors):
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)):
            ref = StorageWeakRef(storage)
            self.bytes += storage.nbytes() - self.storages.get(ref, 0)
            self.storages[ref] = storage.nbytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        inside = args[0].nbytes if function is torch.ops.aten.logsumexp.default else 0  # a copy that it makes
        if self.bytes + inside > self.peak:  # else it is no peak with those that are gone, nor without them
            self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
            self.bytes = sum(self.storages.values())
            self.peak = max(self.peak, self.bytes + inside)
        return out


def held(config: FitConfig) -> int:
    """Bytes of tensors at the fullest moment of the second step."""
    m, d = config.model, config.data
    model = make_model(config.model, None)
    optimizer, _ = make_optimizer(model, OptimConfig(), 2)
    state = None
    with Alive(model.parameters()) as alive:
        for _ in range(2):
            alive.peak = 0
            for _ in range(config.train.accumulate):
                text = torch.randint(0, m.vocab_size, (d.lanes, d.chunk_len * d.horizon + 1))
                reset = torch.zeros(d.lanes, d.chunk_len * d.horizon, dtype=torch.bool)
                bf16 = config.train.precision == "bf16"
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):  # as Lightning does
                    total, n, state = chunked_loss(
                        *(model, text[:, :-1], text[:, 1:], state, reset, d.chunk_len),
                        z_loss=1e-4,
                        checkpoint_blocks=config.train.checkpoint_blocks,
                    )
                (total / n).backward()
                del total
                state = state.detach()
            optimizer.step()
            optimizer.zero_grad()
    return alive.peak


SIZES = {  # n_embd, n_layer, vocab_size, lanes, chunk_len, n_att, n_ffn, head_size: what is large differs
    "activations": (64, 4, 64, 2, 129, None, None, 16),
    "odd": (48, 2, 301, 3, 100, 80, 112, 16),
    "two slices of logits": (16, 1, 8192, 1, 128, None, None, 16),
    "many slices of logits": (48, 1, 8192, 1, 230, None, None, 48),
    "vocabulary": (64, 2, 9001, 1, 33, None, None, 64),
    "weights": (192, 2, 100, 1, 16, None, None, 64),
}


def model_of(generation: str, n_embd: int, n_layer: int, vocab_size: int, n_att=None, head_size=None, **other):
    """Settings of a fresh model; of n_att and head_size the one that the generation has."""
    own = {"n_att": n_att} if generation == "rwkv4" else {"head_size": head_size}
    sizes = {"n_embd": n_embd, "n_layer": n_layer, "vocab_size": vocab_size}
    return ModelConfig(architecture=generation, **sizes, **own, **other)


def sizes_of(model: ModelConfig) -> Sizes:
    return planning.sizes_of(fresh_sizes(model, 0))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("horizon", "accumulate", "precision", "checkpoint_blocks", "kernel"),
    [
        (1, 1, "fp32", False, True),
        (1, 1, "bf16", True, True),
        (3, 1, "fp32", True, True),
        (3, 1, "bf16", False, True),
        (1, 2, "bf16", False, True),
        (2, 2, "bf16", True, True),
        (1, 1, "fp32", False, False),
        (1, 1, "bf16", True, False),
    ],
)
def test_what_a_step_holds_is_what_the_formulas_say(
    horizon, accumulate, precision, checkpoint_blocks, kernel, generation, monkeypatch
):
    monkeypatch.setattr(build_cpu, "available", lambda: kernel)
    for module in (plan, loss):
        monkeypatch.setitem(module.SLICE, "cpu", 1 << 19)
    for name, (n_embd, n_layer, vocab_size, lanes, chunk_len, n_att, n_ffn, head_size) in SIZES.items():
        more = {"n_ffn": n_ffn, "dropout": 0.1 * (horizon == 1)}
        model = model_of(generation, n_embd, n_layer, vocab_size, n_att, head_size, **more)
        data = DataConfig("store", lanes=lanes, chunk_len=chunk_len, horizon=horizon)
        train = TrainConfig(steps=2, accumulate=accumulate, precision=precision, checkpoint_blocks=checkpoint_blocks)
        config = FitConfig("run", model, data, train)
        parts = plan.memory(config, sizes_of(model), "cpu", kernel)
        expected = sum(parts.values()) - parts["process"] - parts["heap"]
        assert expected == pytest.approx(held(config), rel=0.05), name


def test_slices_are_those_of_the_loss():
    assert plan.SLICE == loss.SLICE


@pytest.mark.parametrize("generation", GENERATIONS)
def test_parameters_are_counted(generation):
    model = random_model(generation=generation, n_embd=16, n_layer=3, vocab_size=17, n_att=20, n_ffn=28)
    assert planning.sizes_of(model.config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "mapped"), [("one-chunk", False), ("horizon", False), ("checkpoint_blocks", True)])
def test_peaks_of_processes_are_predicted_within_a_tenth(name, mapped, tmp_path):
    """With checkpoint_blocks the heap's waste varies from run to run: there only what torch holds is compared."""
    config = config_of(CASES[name], tmp_path)
    parts = predicted(config)
    expected = sum(parts.values()) - parts["heap"] * mapped
    assert expected == pytest.approx(measured(config, tmp_path, mapped), rel=0.1)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_operations_are_those_of_the_matrix_products(generation):
    """Counted by torch as a step runs; a horizon reads every chunk twice, checkpoint_blocks every block."""
    from torch.utils.flop_counter import FlopCounterMode

    for horizon, checkpoint_blocks in [(1, False), (1, True), (3, False), (3, True)]:
        data = DataConfig("store", lanes=2, chunk_len=16, horizon=horizon)
        train = TrainConfig(steps=1, checkpoint_blocks=checkpoint_blocks)
        config = FitConfig("run", model_of(generation, 32, 2, 50, head_size=16), data, train)
        model = make_model(config.model, None)
        text = torch.randint(0, 50, (2, 16 * horizon + 1))
        with FlopCounterMode(display=False) as counter:
            total, _, _ = chunked_loss(
                model, text[:, :-1], text[:, 1:], None, None, 16, checkpoint_blocks=checkpoint_blocks
            )
            total.backward()
        tokens = text[:, 1:].numel()
        assert plan.operations(config, sizes_of(config.model)) * tokens == pytest.approx(
            counter.get_total_flops(), rel=1e-9
        )


def test_pieces_shrink_with_more_devices_and_wholes_do_not():
    model, data = ModelConfig(n_layer=8, n_embd=2048, vocab_size=50277), DataConfig("store", lanes=32)
    sizes = sizes_of(model)

    def parts(strategy, devices):
        train = TrainConfig(steps=1, devices=devices, strategy=strategy)
        step = plan.Step(FitConfig("run", model, data, train), sizes, "cuda")
        return step.weights(), step.gradients()[1], step.optimizer()

    assert parts("ddp", 4) == parts("ddp", 32)
    for strategy in ("fsdp", "deepspeed_stage_3"):
        assert all(many < few for many, few in zip(parts(strategy, 32), parts(strategy, 4), strict=True))
    assert parts("deepspeed_stage_2", 4)[2] == 12 * sizes.parameters / 4
    assert parts("deepspeed_stage_2_offload", 4)[2] == 0


SMALL = ["--name=x", "--model.n_layer=2", "--model.n_embd=64", "--train.epochs=1", "--model.vocab_size=100"]


def test_a_run_that_fits(capsys, store):
    code, out, _ = run("plan", *SMALL, "--data.path", store, "--speed=0.1", "--memory=4", capsys=capsys)
    assert code == 0 and "It fits in 4.0 GB" in out and "python train.py fit" in out


def test_steps_are_those_of_fit(capsys, store, finished):
    """The settings of a finished run, with its store."""
    code, out, _ = run("plan", "--config", finished / "config.yaml", "--speed=0.1", capsys=capsys)
    assert code == 0 and "8 steps of 256 tokens" in out


def test_a_checkpoint_is_measured_by_its_shapes(capsys, tmp_path):
    for name in ("m.pth", "m.safetensors", "hf/"):
        save_model(random_model(n_embd=12, n_layer=3, vocab_size=17, n_att=20, n_ffn=28), tmp_path / name)
        argv = ["--name=x", "--model.init", tmp_path / name, "--train.steps=5", "--speed=1", "--memory=1"]
        code, out, err = run("plan", *argv, capsys=capsys)
        assert code == 0 and "3 layers x 12, vocabulary 17" in out, err


def test_what_to_turn_is_told_with_what_it_gives(capsys):
    argv = ["--model.n_layer=32", "--model.n_embd=4096", "--train.device=cuda", "--train.devices=8", "--data.lanes=64"]
    argv = [*SMALL, *argv, "--tokens=1e9", "--speed=400", "--memory=24"]
    code, out, _ = run("plan", *argv, capsys=capsys)
    assert code == 0 and "does NOT fit in 24.0 GB" in out and "--train.checkpoint_blocks true" in out
    together = out.split("fits: ")[1].split()
    assert together, out
    code, out, _ = run("plan", *argv, *together, capsys=capsys)
    assert code == 0 and "It fits in 24.0 GB" in out, out


def test_a_table_for_numbers_of_gpus(capsys):
    argv = [*SMALL, "--data.lanes=8", "--tokens=1e6", "--gpus", "2", "4"]
    code, out, _ = run("plan", *argv, "--speed=100", "--memory=80", capsys=capsys)
    assert code == 0 and "deepspeed_stage_3" in out and "    4           2" in out
    assert "with 3 TB/s: estimated from counts, not measured on a card." in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--tokens"),
        (["--tokens=1e6", "--gpus", "3"], "data.lanes (8) must be a multiple"),
        (["--tokens=1e6", "--memory=0"], "memory must be above 0"),
        (["--tokens=1e6", "--model.vocab_size=null"], "model.vocab_size"),
    ],
)
def test_mistakes_get_one_line(argv, message, capsys):
    code, _, err = run("plan", *SMALL, *argv, capsys=capsys)
    assert code == 1 and message in err and err.count("\n") == 1


GPU = [*SMALL, "--tokens=1e6", "--train.device=cuda", "--train.precision=bf16", "--memory=80"]


def report_of(rows: list[dict], gpu: str = "Card 1") -> str:
    limits = [{"limit": "copy, bytes/s", "found": 2e12}, {"limit": "bf16 products, FLOP/s", "found": 5e14}]
    found = {"sections": {"limits": limits, "training": rows}}
    return json.dumps({"machine": {"gpu": gpu} if gpu else {}, "results": found})


def test_a_measured_step_goes_before_counts(tmp_path, monkeypatch, capsys):
    """The nearest of the same generation and precision; --bandwidth goes before both."""

    def found(generation="rwkv4", precision="bf16", bandwidth=None):
        model, train = model_of(generation, 64, 2, 100), TrainConfig(steps=1, precision=precision)
        config = PlanConfig("run", model, DataConfig("store"), train, bandwidth=bandwidth)
        return card.find_card(config, sizes_of(model), here=False)

    file = tmp_path / "gpu.json"
    monkeypatch.setattr(card, "MEASURED", file)
    assert found() == card.Card()
    step = {"generation": "RWKV-4", "precision": "bf16", "tokens": 4096, "step": "step a, 8 x 512"}
    near, far = step | {"channels": 768, "over them": 2.5}, step | {"channels": 2048, "over them": 1.5}
    file.write_text(report_of([{"step": "step b", "tokens/s": "out of memory"}, far, near]))
    assert found() == card.Card(over=2.5, speed=5e14, source="measured on Card 1 (a, 8 x 512)")
    for other, speed in ((found(precision="fp32"), None), (found("rwkv7"), 5e14)):
        assert (other.bandwidth, other.over, other.speed) == (2e12, None, speed)
        assert "estimated from counts and a copy's bandwidth on Card 1" in other.source
    assert found(bandwidth=1) == card.Card(1e12, speed=5e14)
    out = run("plan", *GPU, capsys=capsys)[1]
    assert "at 500 TFLOP/s a device" in out and "2.50 x its matrix products: measured on Card 1 (a, 8 x 512)." in out
    file.write_text(report_of([near], gpu=""))  # a rehearsal on a CPU
    assert found() == card.Card()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": null}', '{"machine": {"gpu": "Card"}}'])
def test_a_broken_report_of_a_gpu_is_named(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(card, "MEASURED", tmp_path / "gpu.json")
    card.MEASURED.write_text(text)
    code, _, err = run("plan", *GPU, capsys=capsys)
    assert code == 1 and f"{card.MEASURED} is no report of `bench gpu`" in err and err.count("\n") == 1


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bytes_of_a_step_follow_its_settings(generation):
    def moved(**train):
        model = model_of(generation, 64, 2, 100, head_size=16)
        data = DataConfig("store", horizon=train.pop("horizon", 1))
        config = FitConfig("run", model, data, TrainConfig(steps=1, **train))
        return plan.moved(config, sizes_of(model))

    s = sizes_of(model_of(generation, 64, 2, 100, head_size=16))
    assert moved(precision="bf16") == 2 * 64 * (s.between + s.wkv) + 6 * 100
    assert moved() == 2 * moved(precision="bf16")
    assert moved() < moved(checkpoint_blocks=True) == moved(horizon=2) < moved(checkpoint_blocks=True, horizon=2)
