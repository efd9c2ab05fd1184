"""Going on with a run: from which checkpoint, with which settings, over which text.

What may change and what may not stands in `resume_rules`; here a checkpoint is compared with what is asked.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from rwkv_train.checkpoints.modelfile import model_sizes
from rwkv_train.checkpoints.run_checkpoint import TRAINER, facts_of, newest_sound, run_checkpoints, step_of, verify
from rwkv_train.config import FitConfig, renamed
from rwkv_train.data.identity import identity
from rwkv_train.data.store import Store
from rwkv_train.models.rwkv7 import RWKV7Config
from rwkv_train.run_config import whole_paths
from rwkv_train.train.resume_rules import IGNORES, RULES

UNKNOWN = object()
NO_FACTORS = ("all", "state")  # what model.tune says where there are no ranks
WORDS = {
    "tokenizer": "as many documents and tokens, by another tokenizer",
    "places": "as many documents and tokens, of other lengths",
    "contents": "as many documents and tokens, but other ones, or others of them are trained",
}


@dataclass(frozen=True)
class Resumed:
    """A run that is to go on. settings: flat, {} where none are known; texts: None where they are not known."""

    run: Path
    checkpoint: Path | None  # none for a run that was stopped before it had saved one
    step: int
    settings: dict[str, object]
    texts: dict[str, dict | None] | None

    @property
    def layout(self) -> dict[str, object]:
        """What the optimizer's groups were made of."""
        return {"weight_decay": self.settings["optim.weight_decay"]} if "optim.weight_decay" in self.settings else {}


def find_run(config: FitConfig, resume: str) -> Path:
    """The folder of the run to go on with. resume: "newest" or the path of one of its checkpoints."""
    run = Path(config.runs) / config.name
    if not run.is_dir():
        raise ValueError(f"no run to resume in {run}; without --resume a new run begins")
    if resume != "newest":
        path = _given(resume)
        if not path.is_dir():
            raise ValueError(f"no checkpoint to resume from in {resume}; name a folder runs/NAME/checkpoints/step=N")
        if path.resolve().parent.parent != run.resolve():
            raise ValueError(
                f"{resume} is no checkpoint of {run}, the run that name and runs say; change them to go on with its "
                f"run, or start a new run with model.init: {resume}"
            )
    return run


def open_run(run: Path, resume: str) -> Resumed:
    """The checkpoint of a run to go on from, and what it says of itself."""
    checkpoint = newest_sound(run) if resume == "newest" else _given(resume)
    if checkpoint is None:
        if run_checkpoints(run):
            raise ValueError(f"no sound checkpoint in {run}; without --resume a new run begins")
        return Resumed(run, None, 0, _read_config(run), None)
    if resume != "newest" and (wrong := verify(checkpoint)):
        raise ValueError(f"{checkpoint} is damaged ({wrong}); --resume without a path takes the newest sound one")
    facts = facts_of(checkpoint)
    settings = flat(renamed(facts["settings"])) if facts else _read_config(run)
    return Resumed(run, checkpoint, step_of(checkpoint), settings, facts and facts["texts"])


def texts_of(config: FitConfig, store: Store) -> dict[str, dict | None]:
    """What a checkpoint keeps of the texts of its run."""
    val = config.data.val
    return {"data.path": identity(store), "data.val": identity(Store.open(val)) if val else None}


def compare(then: Resumed, config: FitConfig, sizes, steps: int, texts: dict) -> list[str]:
    """What to tell of a resume: a line for each change. sizes: those of the model that is to be trained on.

    Raises ValueError for what must not change; the model.* sizes are compared as they are, not as they were asked for.
    """
    now = flat(whole_paths(asdict(config)))
    if then.checkpoint is None:
        return _changes(then, now)
    asked, was = _decisive(now), _decisive(then.settings)
    refuse_changes(was | _named(model_sizes(then.checkpoint)), asked | _named(sizes), then.run)
    if steps < then.step:
        raise ValueError(
            f"the run would have {steps} steps, and {then.checkpoint} is of step {then.step}; give more train.steps "
            "or train.epochs, or resume from an earlier checkpoint"
        )
    told = []
    if then.texts is None:
        if now["train.strategy"] == "fsdp" != then.settings.get("train.strategy", "fsdp"):
            raise ValueError(
                f"{then.checkpoint} was written before checkpoints could be read by train.strategy: fsdp; resume it "
                f"with {then.settings['train.strategy']} once, and go on with fsdp from the checkpoint of that"
            )
        told.append(
            f"{then.checkpoint} was written before checkpoints kept settings and checksums of the text: settings are "
            "compared with config.yaml, and whether the text is the same is not known"
        )
    else:
        told += _compare_texts(then, texts, config)
    told += _changes(then, now)
    if steps == then.step:
        told.append(f"step {steps} is the last of this run; more train.steps or train.epochs make it go on")
    return told


def refuse_changes(then: dict, now: dict, run: Path) -> None:
    """ValueError for the first setting whose value is another one. What is not known of both is not compared."""
    for name, value in now.items():
        was = then.get(name, UNKNOWN)
        if UNKNOWN not in (was, value) and was != value:
            why = RULES.get(name.split(" ")[0], ("", "it decides what a batch reads"))[1]
            raise ValueError(
                f"{name} is {value}, and was {was} when the checkpoint was written ({why}); resume with the old value, "
                f"or start a new run with model.init: {run}"
            )


def flat(settings: dict, before: str = "") -> dict[str, object]:
    """Nested settings by their dotted names."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _given(resume: str) -> Path:
    path = Path(resume).expanduser()
    return path.parent if path.name == TRAINER else path


def _read_config(run: Path) -> dict[str, object]:
    """The settings in a run's config.yaml; none where it cannot be read."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return flat(whole_paths(renamed(found))) if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # no file that `fit` wrote
        return {}


def _decisive(settings: dict[str, object]) -> dict[str, object]:
    """What batches, weights and the optimizer's state are made of, as it is in force, under the settings' names."""

    def when(names: str, value):
        found = [settings.get(name, UNKNOWN) for name in names.split()]
        return UNKNOWN if UNKNOWN in found else value(*found)

    return {
        "seed": when("seed", int),
        "data.lanes": when("data.lanes", int),
        "data.chunk_len * data.horizon": when("data.chunk_len data.horizon", lambda chunk, n: chunk * n),
        "data.val_share": when("data.val data.val_share", lambda val, share: 0.0 if val else share),
        "train.accumulate": when("train.accumulate", int),
        "model.tune": when("model.tune", str),
        "model.rank": when("model.tune model.rank", lambda tune, rank: None if tune in NO_FACTORS else rank or 16),
        "model.ranks": when("model.tune", lambda _: settings.get("model.ranks") or []),
        "model.base": when("model.base", str),
    } | _of_deepspeed(settings, when)


def _of_deepspeed(settings: dict[str, object], when) -> dict[str, object]:
    """Its checkpoints hold a piece for each rank, laid out by stage, precision and groups of parameters."""
    strategy = settings.get("train.strategy", UNKNOWN)
    if strategy is UNKNOWN:
        return {}
    if not strategy.startswith("deepspeed"):
        return {"train.strategy": "none of DeepSpeed's"}
    return {
        "train.strategy": strategy,
        "train.devices * train.nodes": when("train.devices train.nodes", lambda devices, nodes: devices * nodes),
        "train.precision": when("train.precision", str),
        "optim.weight_decay above 0": when("optim.weight_decay", lambda decay: decay > 0),
    }


def _named(sizes) -> dict[str, object]:
    """A model's sizes under the names of their settings."""
    found = {f"model.{name}": size for name, size in asdict(sizes).items() if name not in ("dropout", "first_v")}
    return {"model.architecture": "rwkv7" if isinstance(sizes, RWKV7Config) else "rwkv4"} | found


def _changes(then: Resumed, now: dict[str, object]) -> list[str]:
    told = []
    for name, value in now.items():
        was = then.settings.get(name, value)
        if was != value:
            kind, why = RULES[name]
            effect = f": {why}" if kind == IGNORES else f", from step {then.step + 1} on"
            if name == "data.path":
                effect = ": the same text" if then.texts else ""
            told.append(f"{name}: {was} -> {value}{effect}")
    return told


def _compare_texts(then: Resumed, texts: dict, config: FitConfig) -> list[str]:
    if differs := _difference(then.texts["data.path"], texts["data.path"]):
        raise ValueError(
            f"data.path: {config.data.path} holds other text than {then.checkpoint} was trained on ({differs}); "
            f"prepare it again as it was, or start a new run with model.init: {then.run}"
        )
    old, new = then.texts["data.val"], texts["data.val"]
    if old and new and (differs := _difference(old, new)):
        return [
            f"data.val: {config.data.val} holds other text than before ({differs}): losses of validation up to step "
            f"{then.step} do not compare with those after it"
        ]
    return []


def _difference(old: dict, new: dict) -> str:
    """In a few words; empty where there is none."""
    for name in ("documents", "tokens", "eod"):
        if old.get(name) != new[name]:
            return f"{name}: {old.get(name)} -> {new[name]}"
    if ("tokenizer" in old) != ("tokenizer" in new):
        return "one is a store, the other a plain binidx, and these cannot be compared"
    return next((words for name, words in WORDS.items() if old.get(name) != new.get(name)), "")
