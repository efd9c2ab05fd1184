"""How models are named: a path, hf:OWNER/REPO/FILE for one on the Hugging Face hub, or BASE+ADAPTER of either."""

from pathlib import Path

from rwkv_train.checkpoints import hub


def parts_of(path: str | Path) -> list[Path]:
    """The model and the adapters that a path names: BASE, or BASE+ADAPTER where there is no file of that name.

    Those on the hub are downloaded.
    """
    return [hub.fetched(part) if hub.is_hub(part) else Path(part).expanduser() for part in names_in(path)]


def names_in(path: str | Path) -> list[str]:
    """BASE and each ADAPTER of it, as they are written. ValueError where one is left out."""
    text = str(path)
    names = [text] if text and Path(text).expanduser().exists() else text.split("+")
    if not all(map(str.strip, names)):
        raise ValueError(f"{text!r} leaves the name of a model or an adapter out; write MODEL, or BASE+ADAPTER")
    return names


def pinned(path: str, before: str | None = None) -> str:
    """The same name, each part on the hub with its commit: that of a name of before, where it is of the same model."""
    before = names_in(before) if before else []
    return "+".join(hub.pinned(part, before) if hub.is_hub(part) else part for part in names_in(path))


def called(path: str | Path) -> str:
    """What a model is called: the last words of its name, without suffix."""
    names = names_in(path)
    if not any(map(hub.is_hub, names)):
        path = Path(path).expanduser().resolve()
        return path.parent.name if path.stem == "model" else path.stem
    return "+".join(hub.HubName.of(name).stem if hub.is_hub(name) else Path(name).stem for name in names)
