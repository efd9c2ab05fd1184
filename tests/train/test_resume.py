"""A resume takes, refuses or leaves every setting as the table says; one run has one writer; other text is refused."""

import json
import re
import shutil
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import random_model
from runs import config_of, losses_of, metrics, store_in, weights

from rwkv_train.checkpoints.run_checkpoint import FACTS, TRAINER, checkpoint_folder, run_checkpoints
from rwkv_train.command_config import InspectConfig
from rwkv_train.commands import inspect
from rwkv_train.config import FitConfig, ModelConfig
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.models.fresh import fresh_sizes
from rwkv_train.train import module, resume
from rwkv_train.train.fit import fit
from rwkv_train.train.optim import make_optimizer
from rwkv_train.train.resume import flat
from rwkv_train.train.resume_rules import IGNORES, REFUSES, RULES, TAKES, resume_table

SURVIVE = Path(__file__).parents[2] / "docs" / "survive.md"

# Another value for every setting that a resume takes; all are asked for at once, at step 5 of a run of 8.
TAKEN = {
    "model.dropout": 0.3,
    "data.val": "VAL",  # and the share has to be 0 before
    "data.val_lanes": 2,
    "data.tokenizer": "bytes",
    "optim.lr": 4e-3,
    "optim.min_lr": 1e-3,
    "optim.schedule": "linear",
    "optim.warmup": 3,
    "optim.decay_share": 0.5,
    "optim.beta1": 0.8,
    "optim.beta2": 0.95,
    "optim.eps": 1e-5,
    "optim.weight_decay": 0.0,
    "optim.clip": 0.5,
    "optim.z_loss": 0.0,
    "train.steps": 7,
    "train.precision": "bf16",
    "train.checkpoint_blocks": True,
    "train.device": "auto",
    "train.strategy": "ddp",
    "train.val_every": 1,
    "train.save_every": 1,
    "train.save_async": True,
    "train.keep": 5,
    "train.keep_best": 1,
    "train.max_skips": 3,
    "train.log_every": 2,
    "log.tensorboard": True,
    "log.wandb": "off",
    "log.project": "another",
    "samples.prompts": ["one ", "two "],
    "samples.tokens": 3,
    "samples.temperature": 0.5,
    "samples.top_p": 0.5,
}
LORA = {"model.init": "x.pth", "model.tune": "lora", "model.n_layer": None, "model.n_embd": None}
MODELS = [  # settings of a run, what is asked of its resume, and what it says
    ({"model.architecture": "rwkv4"}, {"model.architecture": "rwkv7", "model.head_size": 8}, "is rwkv7, and was rwkv4"),
    ({"model.architecture": "rwkv7", "model.head_size": 8}, {"model.head_size": 12}, "is 12, and was 8"),
    (LORA | {"model.rank": 8}, {"model.rank": 4}, "is 4, and was 8"),
    (LORA, {"model.rank": 8}, "is 8, and was 16"),
    (LORA, {"model.tune": "state"}, "is state, and was lora"),
    (LORA, {"model.tune": "pissa"}, "is pissa, and was lora"),
    (LORA, {"model.ranks": ["att=8"]}, r"is \['att=8'\], and was \[\]"),
    (LORA, {"model.base": "int8"}, "is int8, and was float"),
]
DEEPSPEED = [
    ({"train.strategy": "ddp"}, r"train\.strategy is none of DeepSpeed's, and was deepspeed_stage_2"),
    ({"train.strategy": "deepspeed_stage_3"}, r"train\.strategy is deepspeed_stage_3, and was"),
    ({"train.devices": 4}, r"train\.devices \* train\.nodes is 4, and was 2"),
    ({"train.precision": "bf16"}, r"train\.precision is bf16, and was fp32"),
    ({"optim.weight_decay": 0.0}, r"optim\.weight_decay above 0 is False, and was True"),
]
ELSEWHERE = {  # settings that another test shows
    "train.epochs": "test_more_epochs_go_on_as_if_there_had_been_as_many_from_the_beginning",
    "train.cuda_graph": "test_a_run_of_recorded_steps_is_the_run_of_plain_ones",
    "train.devices": "test_one_rank_with_all_lanes_goes_on_as_two_with_half_of_them",
    "train.nodes": "the same, for torchrun",
}
REFUSED = {
    "seed": 4,
    "model.n_layer": 3,
    "model.n_embd": 32,
    "model.n_att": 48,
    "model.n_ffn": 48,
    "model.vocab_size": 300,
    "data.path": "OTHER",
    "data.val_share": 0.2,
    "data.lanes": 2,
    "data.chunk_len": 32,
    "data.horizon": 1,
    "train.accumulate": 1,
}


def changed(config: FitConfig, changes: dict) -> FitConfig:
    """With other values, by dotted names."""
    parts: dict[str, dict] = {}
    for name, value in changes.items():
        section, _, last = name.rpartition(".")
        parts.setdefault(section, {})[last] = value
    whole = parts.pop("", {})
    return replace(config, **whole, **{name: replace(getattr(config, name), **new) for name, new in parts.items()})


def copy_at(finished: Path, to: Path, step: int) -> Path:
    """A run as it was at a step."""
    run = shutil.copytree(finished, to / "run")
    for path in run_checkpoints(run):
        if path.name > f"step={step:08d}":
            shutil.rmtree(path)
    return run


def test_the_table_has_every_setting_and_no_other():
    names = [f"{f.name}.{g.name}" for f in fields(FitConfig) if is_dataclass(f.type) for g in fields(f.type)]
    assert RULES.keys() == {*names, "name", "runs", "seed"}
    taken = {name for name, (kind, _) in RULES.items() if kind == TAKES}
    assert taken == TAKEN.keys() | ELSEWHERE.keys()
    refused = {name for name, (kind, _) in RULES.items() if kind == REFUSES}
    assert refused == REFUSED.keys() | {name for _, changes, _ in MODELS for name in changes}
    assert {name for name, (kind, _) in RULES.items() if kind == IGNORES} == {"name", "runs", "model.init"}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run whose every taken setting was changed at step 5, and what its optimizer was at its first resumed step."""
    folder = tmp_path_factory.mktemp("resumed")
    store, val = store_in(folder / "store"), store_in(folder / "val")
    config = changed(config_of(store, folder), {"data.val_share": 0.0, "data.val": str(store), "train.save_every": 5})
    assert fit(config) == 0
    shutil.rmtree(checkpoint_folder(folder / "run", 8))
    new, seen, step = changed(config, TAKEN | {"data.val": str(val)}), {}, module.OnlineTrainingModule.training_step

    def see(self, *args):
        if not seen:
            groups = [{k: v for k, v in g.items() if k != "params"} for g in self.trainer.optimizers[0].param_groups]
            seen.update(groups=groups, dropout={b.dropout for b in self.model.blocks}, trainer=self.trainer)
            seen.update(precision=self.trainer.precision, clip=self.trainer.gradient_clip_val, config=self.config)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.OnlineTrainingModule, "training_step", see)
        assert fit(new, resume="newest") == 0
    return folder / "run", config, new, seen


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_is_in_config_yaml_and_in_the_next_checkpoint(resumed, name):
    run, _, new, seen = resumed
    want = flat(asdict(new))[name]
    assert flat(yaml.safe_load((run / "config.yaml").read_text()))[name] == want
    newest = json.loads((run_checkpoints(run)[-1] / FACTS).read_text())
    assert flat(newest["settings"])[name] == want and flat(asdict(seen["config"]))[name] == want


def test_what_is_taken_is_in_force_at_the_first_resumed_step(resumed):
    run, _, new, seen = resumed
    fresh, scheduler = make_optimizer(random_model(n_embd=24, vocab_size=257), new.optim, 7)
    for _ in range(5):
        fresh.step()
        scheduler.step()
    want = [{k: v for k, v in g.items() if k != "params"} for g in fresh.param_groups]
    assert seen["groups"] == want and seen["groups"][0]["weight_decay"] == 0
    assert seen["dropout"] == {0.3} and seen["precision"] == "bf16-mixed" and seen["clip"] == 0.5
    records = metrics(run)
    assert [r["step"] for r in records if "val_loss" in r] == [0, 3, 6, 7]
    assert [(r["step"], r["lr"]) for r in records if r["step"] > 5 and "lr" in r][-1][0] == 7
    assert {p.name[-1] for p in run_checkpoints(run)} == {"5", "6", "7"}
    assert (run / "tensorboard").is_dir()
    assert [json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()] == ["one ", "two "]


def test_each_change_is_told_with_both_values_and_from_where_on(finished, store, tmp_path, capsys):
    copy_at(finished, tmp_path, 5)
    config = changed(config_of(store, tmp_path), {"optim.lr": 1e-6, "train.log_every": 2, "data.chunk_len": 32})
    assert fit(changed(config, {"data.horizon": 1}), resume="newest") == 0
    told = capsys.readouterr().out.splitlines()
    assert "optim.lr: 0.01 -> 1e-06, from step 6 on" in told and "train.log_every: 1 -> 2, from step 6 on" in told
    assert sum("->" in line and line.endswith("from step 6 on") for line in told) == 4
    assert {r["lr"] <= 1e-6 for r in metrics(tmp_path / "run") if r["step"] > 5 and "lr" in r} == {True}


@pytest.fixture(scope="module")
def other_store(tmp_path_factory):
    """As many documents and tokens as the store."""
    folder = tmp_path_factory.mktemp("other")
    store_in(folder / "first")
    lines = folder / "pairs.jsonl"
    lines.write_text(lines.read_text().replace("three", "THREE"))
    prepare(PrepareConfig([str(lines)], str(folder / "store"), tokenizer="bytes"))
    return folder / "store"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_setting_both_values_and_the_remedy(finished, store, tmp_path, name, other_store):
    run = copy_at(finished, tmp_path, 5)
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    value = str(other_store) if name == "data.path" else REFUSED[name]
    with pytest.raises(ValueError, match=r"or start a new run with model\.init: .*run") as error:
        fit(changed(config_of(store, tmp_path), {name: value}), resume="newest")
    assert name in str(error.value) and "\n" not in str(error.value)
    if name not in ("data.path", "data.chunk_len", "data.horizon"):
        now, was = re.search(rf"{re.escape(name)} is (\S+), and was (\S+) when", str(error.value)).groups()
        assert now == str(value) and was != now
    assert before == ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes())


def sizes_of(config: FitConfig):
    model = config.model
    return fresh_sizes(
        ModelConfig(architecture=model.architecture, n_layer=2, n_embd=24, head_size=model.head_size), 257
    )


@pytest.mark.parametrize(("settings", "changes", "message"), MODELS)
def test_what_the_weights_are_made_of_is_refused(store, monkeypatch, settings, changes, message):
    before = changed(config_of(store, "/runs"), {"model.architecture": None} | settings)
    after = changed(before, changes)
    monkeypatch.setattr(resume, "model_sizes", lambda path: sizes_of(before))
    name = next(iter(changes))
    then = resume.Resumed(Path("runs/run"), Path("step=5"), 5, resume.flat(asdict(before)), None)
    with pytest.raises(ValueError, match=f"{re.escape(name)} {message}.*resume with the old value, or start a new run"):
        resume.compare(then, after, sizes_of(after), 8, {})
    resume.compare(then, before, sizes_of(before), 8, {})
    same = replace(then, settings=then.settings | {"model.n_att": 24, "model.rank": then.settings["model.rank"] or 16})
    resume.compare(same, before, sizes_of(before), 8, {})


@pytest.mark.parametrize(("changes", "message"), DEEPSPEED)
def test_what_deepspeeds_pieces_are_made_of_is_refused(store, monkeypatch, changes, message):
    monkeypatch.setattr(resume, "model_sizes", lambda path: sizes_of(before))
    before = changed(config_of(store, "/runs"), {"train.devices": 2, "train.strategy": "deepspeed_stage_2"})
    then = resume.Resumed(Path("runs/run"), Path("step=5"), 5, resume.flat(asdict(before)), None)
    with pytest.raises(ValueError, match=message):
        resume.compare(then, changed(before, changes), sizes_of(before), 8, {})
    more = changed(before, {"optim.weight_decay": 0.5})
    assert resume.compare(then, more, sizes_of(before), 8, {})[1:] == [
        "optim.weight_decay: 0.01 -> 0.5, from step 6 on"
    ]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_weight_decay_that_sorts_the_parameters_anew_keeps_their_moments(finished_of, store, tmp_path, decay):
    """From none to some and back; with a learning rate of almost nothing the moments alone are changed."""
    still = {"optim.weight_decay": 0.5 - decay, "optim.lr": 1e-12, "optim.warmup": 0, "train.save_every": 1}
    config = changed(config_of(store, tmp_path), still | {"train.keep": 9})
    assert fit(config) == 0
    want = moments(tmp_path / "run", 8)
    shutil.rmtree(checkpoint_folder(tmp_path / "run", 8))
    assert fit(changed(config, {"optim.weight_decay": decay}), resume="newest") == 0
    ours = moments(tmp_path / "run", 8)
    assert ours.keys() == want.keys() and all(torch.equal(ours[n], want[n]) for n in want)


def moments(run: Path, step: int) -> dict:
    """By the number of the parameter in the model."""
    content = torch.load(checkpoint_folder(run, step) / TRAINER, weights_only=True)
    return {n: m["exp_avg_sq"] for n, m in content["optimizer_states"][0]["state"].items()}


def test_more_epochs_go_on_as_if_there_had_been_as_many_from_the_beginning(store, tmp_path, capsys):
    """Also a run that was done."""
    short = changed(config_of(store, tmp_path), {"optim.schedule": "constant", "train.steps": 4})
    long = changed(short, {"train.steps": 6, "name": "long"})
    assert fit(short) == fit(long) == 0
    tokens = int(re.search(r"([\d,]+) tokens to train on", capsys.readouterr().out)[1].replace(",", ""))
    train = replace(short.train, steps=None, epochs=6 * 256 / tokens)
    assert fit(replace(short, train=train), resume="newest") == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "long")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "long")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert fit(replace(short, train=train), resume="newest") == 0
    assert "step 6 is the last of this run; more train.steps or train.epochs" in capsys.readouterr().out
    for step in (2, 6):
        inspect(InspectConfig(str(tmp_path / "run"), step))
        ours = capsys.readouterr().out
        inspect(InspectConfig(str(tmp_path / "long"), step))
        assert ours == capsys.readouterr().out
    with pytest.raises(ValueError, match=r"would have 4 steps, and .*step=00000006 is of step 6; give more"):
        fit(short, resume="newest")


def test_the_documentation_has_this_table():
    if SURVIVE.is_file():
        text = SURVIVE.read_text(encoding="utf-8")
        shown = re.search(r"<!-- resume table -->\n(.*?)<!-- end -->", text, re.DOTALL)[1]
        assert shown.strip().splitlines() == resume_table()
