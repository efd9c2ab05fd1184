"""`train.py plan`: settings and a machine -> will it fit, how long will it take, and what to change."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_train.config import FitConfig, ModelConfig
from rwkv_train.plan.card import SPEED, Card, find_card, measure_speed
from rwkv_train.plan.formulas import memory, seconds
from rwkv_train.plan.settings import PlanConfig
from rwkv_train.plan.sizes import RWKV4Sizes, RWKV7Sizes, Sizes
from rwkv_train.program import command

GB = 2**30
SHARED = ["ddp", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp"]  # the columns of the table


@dataclass(frozen=True)
class Machine:
    """One device of those that would train, and the model's sizes. memory in bytes, speed in operations/s, link in B/s;
    None where nobody knows. card: of a GPU."""

    sizes: Sizes
    device: str
    kernel: bool
    memory: float | None
    speed: float | None
    link: float
    card: Card | None = None

    def needs(self, config: FitConfig) -> float:
        return sum(memory(config, self.sizes, self.device, self.kernel).values())

    def fits(self, config: FitConfig) -> bool:
        return self.memory is not None and self.needs(config) <= self.memory

    def step_time(self, config: FitConfig) -> float:
        """Seconds; with an H100's speed where it is not known, to compare with."""
        return sum(seconds(config, self.sizes, self.card, self.speed or SPEED, self.link))


def plan(config: PlanConfig, gpus: list[int] | None = None) -> None:
    """Print whether the run fits; with numbers of gpus, a table of strategies for the same run on as many."""
    bad = [n for n in gpus or [] if n < 1 or config.data.lanes % n]
    if bad:
        raise ValueError(f"data.lanes ({config.data.lanes}) must be a multiple of each number of GPUs, found {bad[0]}")
    tokens, vocab_size = _text(config)
    machine = _machine(config, vocab_size, "cuda" if gpus else _device(config))
    s, count = machine.sizes, machine.sizes.parameters
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    t, d = config.train, config.data
    print(f"{config.name}: {s.name}, {s.n_layer} layers x {s.n_embd}, vocabulary {s.vocab_size:,}: {size} parameters")
    print(
        f"{t.precision}, {d.lanes} lanes, chunks of {d.chunk_len} tokens, horizon {d.horizon}"
        + f", accumulate {t.accumulate}" * (t.accumulate > 1)
        + ", checkpoint_blocks" * config.checkpoint_blocks
    )
    if config.model.tune != "all":
        print(f"An upper bound: training all weights is counted, model.tune: {config.model.tune} trains fewer.")
    if gpus:
        _table(config, machine, gpus, tokens)
    else:
        _one(config, machine, tokens)


def _one(config: PlanConfig, machine: Machine, tokens: int) -> None:
    """Parts, verdict, time, what to change or do next."""
    devices = config.train.devices * config.train.nodes
    where = "this process" if machine.device == "cpu" else "a GPU"
    print(f"\n{f'{config.train.strategy} on {devices} {machine.device}':<24}GB of {where}")
    parts = memory(config, machine.sizes, machine.device, machine.kernel)
    for name, size in parts.items():
        print(f"{name:<24}{size / GB:8.2f}")
    total = sum(parts.values())
    print(f"{'at the fullest moment':<24}{total / GB:8.2f}\n")
    if machine.memory is None:
        print("Give --memory, the GB of one device, to hear whether that fits.")
    else:
        word, spare = ("fits", "free") if total <= machine.memory else ("does NOT fit", "missing")
        print(f"It {word} in {machine.memory / GB:.1f} GB: {abs(machine.memory - total) / GB:.2f} GB {spare}.")
    print(_time(config, machine, tokens))
    if config.train.strategy.endswith("offload"):
        host = 16 * machine.sizes.parameters / config.train.nodes / GB
        print(f"The optimizer is in the host's memory: {host:.1f} GB a machine. Its time there is not counted.")
    if machine.memory is not None and total > machine.memory:
        _advise(config, machine)
    elif machine.memory is not None:
        print(f"Next: the same settings with `{command('fit')}`.")


def _time(config: FitConfig, machine: Machine, tokens: int) -> str:
    steps = config.steps(tokens)
    read = config.data.lanes * config.data.chunk_len * config.data.horizon * config.train.accumulate
    line = f"{steps:,} steps of {read:,} tokens: {steps * read:,} tokens"
    if machine.speed is None:
        return f"{line}. Give --speed, the TFLOP/s of one device, for an estimate of the time."
    products, rest, wires = seconds(config, machine.sizes, machine.card, machine.speed, machine.link)
    work = products + rest
    exchange = f" and {wires:.2f} s of exchange at {machine.link / 1e9:g} GB/s" if wires else ""
    rate = read / (work + wires)
    return (
        f"{line} in about {_span(steps * (work + wires))} ({rate:,.0f} tokens/s).\n"
        f"A step: {work:.3g} s of work at {machine.speed / 1e12:.3g} TFLOP/s a device{exchange}."
        + (f"\n{_source(machine.card, work / products)}" if machine.card else "")
    )


def _source(card: Card, over: float | None = None) -> str:
    """Where a GPU's times are from."""
    times = f"{over:.2f} x its matrix products" if over else "Times of a step"
    bandwidth = "" if card.over else f", with {card.bandwidth / 1e12:.3g} TB/s"
    return f"{times}{bandwidth}: {card.source}."


def _advise(config: PlanConfig, machine: Machine) -> None:
    """What to change: each knob alone, the ones that suffice first, the fastest first; then as many as are needed."""
    need, now = machine.needs(config), machine.step_time(config)
    helpful = [(flags, changed) for flags, changed in _knobs(config, machine) if machine.needs(changed) < need]
    helpful.sort(
        key=lambda knob: (0, machine.step_time(knob[1])) if machine.fits(knob[1]) else (1, machine.needs(knob[1]))
    )
    print("\nWhat to turn                                                          GB   time of a step")
    for flags, changed in helpful:
        mark = "  fits" if machine.fits(changed) else ""
        same = changed.train.precision == config.train.precision  # the speed is that of one precision
        slower = f"x {machine.step_time(changed) / now:.2f}" if same else "less"
        print(f"{flags:<64}{machine.needs(changed) / GB:8.2f}   {slower}{mark}")
    if helpful and not machine.fits(helpful[0][1]):
        print(_together(config, machine))
    if heap := memory(config, machine.sizes, machine.device)["heap"]:
        print(
            f"On Linux MALLOC_MMAP_THRESHOLD_=262144 in front of the command saves the heap's {heap / GB:.2f} GB, x 1.4"
        )
    if not helpful:
        print("nothing: take a smaller model or a larger device")


def _together(config: PlanConfig, machine: Machine) -> str:
    """The knob that saves most, then the one that saves most after it, until it fits or none saves anything."""
    turned = []
    while not machine.fits(config):
        flags, best = min(_knobs(config, machine), key=lambda knob: machine.needs(knob[1]), default=("", config))
        if machine.needs(best) > 0.99 * machine.needs(config):
            return f"\nNot even all of these together: {machine.needs(config) / GB:.2f} GB. Take more devices."
        turned, config = [*turned, flags], best
    flags = {flag: value for change in turned for flag, value in _pairs(change)}  # the last value counts
    line = " ".join(f"{flag} {value}" for flag, value in flags.items())
    return f"\nTogether, {machine.needs(config) / GB:.2f} GB, fits: {line}"


def _pairs(flags: str) -> list[tuple[str, str]]:
    words = flags.split()
    return list(zip(words[::2], words[1::2], strict=True))


def _knobs(config: PlanConfig, machine: Machine) -> list[tuple[str, PlanConfig]]:
    """Changes that leave the tokens of an optimizer step as they are: (flags, settings)."""
    data, train = config.data, config.train
    ranks = train.devices * train.nodes
    knobs = []

    def turn(**changes):
        flags, parts = [], {"data": data, "train": train}
        for name, value in changes.items():
            section = "data" if hasattr(data, name) else "train"
            parts[section] = replace(parts[section], **{name: value})
            flags.append(f"--{section}.{name} {str(value).lower()}")
        knobs.append((" ".join(flags), replace(config, **parts)))

    if not config.checkpoint_blocks:
        turn(checkpoint_blocks=True)
    if train.precision == "fp32":
        turn(precision="bf16")
    if data.chunk_len >= 64:
        turn(chunk_len=data.chunk_len // 2, horizon=2 * data.horizon)
    if data.lanes % (2 * ranks) == 0:
        turn(lanes=data.lanes // 2, accumulate=2 * train.accumulate)
    wholes = ["fsdp"] if ranks > 1 else []
    if machine.device == "cuda":
        wholes += ["deepspeed_stage_2", "deepspeed_stage_3"] if ranks > 1 else []
        wholes += ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
    for strategy in wholes:
        if strategy != train.strategy and not (train.save_async and strategy.startswith("deepspeed")):
            turn(strategy=strategy)
    if ranks > 1 and data.lanes % (2 * ranks) == 0 and (train.strategy == "fsdp" or "deepspeed" in train.strategy):
        turn(devices=2 * train.devices)
    return knobs


def _table(config: PlanConfig, machine: Machine, gpus: list[int], tokens: int) -> None:
    """GB of a GPU and time of the run, for each number of GPUs and each strategy."""
    print(f"\nGB of a GPU, and time of {config.steps(tokens):,} steps" + " (* does not fit)" * bool(machine.memory))
    print(f"{'GPUs':>5}{'lanes each':>12}" + "".join(f"{name:>24}" for name in SHARED))
    for n in gpus:
        cells = []
        for strategy in SHARED:
            run = replace(config, train=replace(config.train, devices=n, nodes=1, strategy=strategy, save_async=False))
            mark = "*" if machine.memory and not machine.fits(run) else ""
            span = f", {_span(config.steps(tokens) * machine.step_time(run))}" if machine.speed else ""
            cells.append(f"{mark}{machine.needs(run) / GB:.1f}{span}")
        print(f"{n:>5}{config.data.lanes // n:>12}" + "".join(f"{cell:>24}" for cell in cells))
    memory = f"{machine.memory / GB:g} GB" if machine.memory else "(--memory)"
    speed = f"{machine.speed / 1e12:g} TFLOP/s" if machine.speed else "(--speed)"
    print(f"A GPU with {memory}, {speed} in matrix products, {machine.link / 1e9:g} GB/s to the others.")
    if machine.speed:
        print(_source(machine.card))


def _text(config: PlanConfig) -> tuple[int, int | None]:
    """(tokens to train on, vocabulary of their tokenizer) of the store, as far as there is one."""
    path, vocab_size, tokens = config.data.path, None, config.tokens
    if path and (Path(path).expanduser().exists() or Path(path).expanduser().with_suffix(".idx").exists()):
        from rwkv_train.data.lanes import split
        from rwkv_train.data.store import Store

        store = Store.open(path)
        tokenizer = store.tokenizer(config.data.tokenizer)
        vocab_size = tokenizer.vocab_size if tokenizer else None
        if tokens is None:
            tokens = split(store, 0 if config.data.val else config.data.val_share)[0].tokens
    if tokens is None and config.train.steps is None:
        there = f"there is no token store in {path} yet" if path else "no data.path is given"
        raise ValueError(f"{there}, and the run is train.epochs long: say how many tokens it has with --tokens")
    return int(tokens or 0), vocab_size


def _machine(config: PlanConfig, vocab_size: int | None, device: str) -> Machine:
    sizes = _sizes(config.model, vocab_size)
    here = device == "cpu" or (not (config.memory and config.speed) and _gpu())
    memory = config.memory * GB if config.memory else _memory(device, config.train.devices) if here else None
    speed = config.speed * 1e12 if config.speed else measure_speed(config, sizes, device) if here else None
    kernel, card = False, None
    if device == "cpu":
        from rwkv_train.ops import build_cpu

        kernel = build_cpu.available()
    else:
        card = find_card(config, sizes, here)
        speed = speed or card.speed
    return Machine(sizes, device, kernel, memory, speed, config.link * 1e9, card)


def _sizes(model: ModelConfig, vocab_size: int | None) -> Sizes:
    """Of a fresh model, or of a checkpoint, whose weights are not loaded."""
    if model.init:
        from rwkv_train.checkpoints.modelfile import model_sizes

        return sizes_of(model_sizes(model.init))
    from rwkv_train.models.fresh import fresh_sizes

    vocab_size = model.vocab_size or vocab_size
    if vocab_size is None:
        raise ValueError("without a token store the vocabulary is not known: give model.vocab_size, as 50277 or 65536")
    return sizes_of(fresh_sizes(model, vocab_size))


def sizes_of(c) -> Sizes:
    """From the config of a model of either generation."""
    common = (c.n_layer, c.n_embd, c.n_ffn, c.vocab_size)
    if hasattr(c, "n_att"):
        return RWKV4Sizes(*common, c.n_att)
    return RWKV7Sizes(*common, c.head_size, c.rank_w, c.rank_a, c.rank_v, c.rank_g)


def _device(config: PlanConfig) -> str:
    """Where the run would be: as `fit` decides, but GPUs that are named need not be here."""
    train = config.train
    if train.device != "auto":
        return train.device
    return "cuda" if train.strategy.startswith("deepspeed") or _gpu() else "cpu"


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _memory(device: str, devices: int) -> float:
    """Bytes of a GPU here, or of this machine's memory for each of its processes."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices


def _span(seconds: float) -> str:
    """A time in its largest two units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
