"""The paths in a run's config.yaml: written whole, and found again from wherever the run is opened or was moved to."""

import os
import sys
from pathlib import Path

from rwkv_train.files import read_yaml

HUB = "hf:"  # begins the name of a model on the Hugging Face hub, which is no path
PATHS = (("data", "path"), ("data", "val"), ("data", "tokenizer"), ("model", "init"))


def is_run_config(file: Path) -> bool:
    """Whether this is the config.yaml of a run, and not one that a person wrote."""
    return file.name == "config.yaml" and file.is_file() and (file.parent / "checkpoints").is_dir()


def run_settings(file: Path) -> dict[str, dict]:
    """The settings in a run's config.yaml; ValueError where it holds none, as after a disk that was full."""
    found = read_yaml(file)
    if not isinstance(found, dict) or not all(isinstance(found.get(section, {}), dict) for section, _ in PATHS):
        raise ValueError(f"{file} does not hold the settings of a run, found {found!r:.80}; restore it")
    return found


def whole_paths(config: dict) -> dict:
    """A run's settings as config.yaml has them: its paths do not depend on the current folder."""
    config = config | {"runs": _whole(config["runs"])}
    for section, key in PATHS:
        if value := config[section].get(key):
            config[section] = config[section] | {key: _each(value, lambda part: _whole(part) if _there(part) else part)}
    return config


def found_paths(file: Path, given: tuple[str, ...] = ()) -> dict[str, str]:
    """Settings of a run's config.yaml by their flag's name, as "data.path", that are other ones from here.

    The run is where the file lies, whatever the file calls it. A path is looked for where it lay beside the run, since
    both may have been moved, then as it is written, then from the folder above the runs. One that is in none of these
    is told on standard error, unless a flag in `given` replaces it.
    """
    config = run_settings(file)
    run = file.parent if file.parent.name else file.parent.absolute()
    was = Path(str(config.get("runs", "runs")), str(config.get("name", run.name)))
    found = {"runs": str(run.parent), "name": run.name}
    for section, key in PATHS:
        flag, value = f"{section}.{key}", config.get(section, {}).get(key)
        if value and flag not in given:
            found[flag] = _each(value, lambda part, flag=flag: _find(part, was, run, f"{file}: {flag}"))
    return found


def _find(path: str, was: Path, run: Path, label: str) -> str:
    if path.startswith(HUB):
        return path
    places = [path]
    if os.path.isabs(path) == was.is_absolute():
        places.insert(0, os.path.normpath(run / os.path.relpath(path, was)))
    if not os.path.isabs(path):
        places.append(str(run.parent.parent / path))
    found = next(filter(_there, places), None)
    if found is None and os.sep in path:
        print(f"{label} is not there: looked for {' and '.join(dict.fromkeys(places))}", file=sys.stderr)
    return _whole(found) if found else path


def _there(path: str) -> bool:
    """Whether there is a file, a folder, or a pair of .bin and .idx."""
    path = os.path.expanduser(path)
    return os.path.exists(path) or os.path.exists(f"{path}.idx")


def _whole(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _each(value: str, change) -> str:
    """The same with the parts of BASE+ADAPTER changed, unless that is the name of one file."""
    return change(value) if _there(value) else "+".join(map(change, value.split("+")))
