"""Ways to choose tokens by name, and the one that settings ask for."""

import sys
from collections.abc import Iterable
from dataclasses import fields, replace

from rwkv_train.command_config import SamplingConfig
from rwkv_train.files import unescaped
from rwkv_train.generation.sampling import Sampling

PRESETS = {
    "chat": Sampling(0.8, 0.5),
    "text": Sampling(1.0, 0.9),
    "greedy": Sampling(0.0),
    # As the makers of RWKV-7 "G" advise for replies after a thought, and after an empty one.
    "thinking": Sampling(0.96, 0.76, 32, presence_penalty=1.0, frequency_penalty=0.1, penalty_decay=0.988),
    "fake-thinking": Sampling(1.0, 0.28, 32),
}


def sampling_of(config: SamplingConfig) -> Sampling:
    """The preset of a command's settings, with the values that they give in place of its own.

    Those are told on standard error, if the preset is not the one that the command takes by itself.
    """
    preset = PRESETS[config.preset]
    found = with_given(preset, config)
    if config.preset != type(config).preset and found != preset:
        changed = [f.name for f in fields(Sampling) if getattr(found, f.name) != getattr(preset, f.name)]
        given = ", ".join(f"{name} {getattr(found, name):g}, not {getattr(preset, name):g}" for name in changed)
        print(f"note: the preset {config.preset} with {given}", file=sys.stderr)
    return found


def with_given(sampling: Sampling, given: object) -> Sampling:
    """The same with the attributes of `given` that are not None in place of its own."""
    asked = {f.name: getattr(given, f.name) for f in fields(Sampling)}
    return replace(sampling, **{name: value for name, value in asked.items() if value is not None})


def described(sampling: Sampling) -> str:
    """The temperature, and whatever else changes something, as "temperature 0.8, top_p 0.5"."""
    values = {f.name: getattr(sampling, f.name) for f in fields(Sampling)}
    changing = {"temperature"} | {f.name for f in fields(Sampling) if values[f.name] != f.default}
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if name in changing)


def stop_texts(typed: Iterable[str]) -> tuple[str, ...]:
    """The texts before which a text ends, of --stop. ValueError for an empty one."""
    found = tuple(map(unescaped, typed))
    if "" in found:
        raise ValueError("--stop needs a text before which to end, found an empty one")
    return found
