"""Models on the Hugging Face hub by name: hf:OWNER/REPO[/FILE][@REVISION].

`huggingface_hub` fetches them: it goes on with a download that broke off, keeps what it fetched in its cache (HF_HOME),
works offline from that (HF_HUB_OFFLINE=1), and takes a login from `hf auth login` or HF_TOKEN. Nothing is sent but the
requests.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from rwkv_train.checkpoints.hf import HF_WEIGHTS, MODEL_TYPES, read_json
from rwkv_train.program import told
from rwkv_train.run_config import HUB

SUFFIXES = (".pth", ".safetensors", ".st")
OPENED = (*SUFFIXES, ".bin", ".pt", ".ckpt")  # where such a file is named
# What goes with weights that lie in the same folder: never code.
BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json", "*tokenizer*.json", "*vocab*", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.json", "*.jinja", "template.yaml", "*.index.json"),
)
MAIN = "main"  # the revision of a name that names none
SHOWN = 20  # files that a message lists
BLOCK = 2**18  # bytes that are fetched at once to look into a file
PATIENCE = 10  # seconds until a hub that does not answer cannot be reached


class HubName(NamedTuple):
    """A name taken apart. file: "" where none is named, or a folder in the repository."""

    text: str
    repo: str
    file: str
    revision: str

    @classmethod
    def of(cls, text: str) -> "HubName":
        """ValueError where it is not written as such names are."""
        path, at, revision = text.removeprefix(HUB).rpartition("@") if "@" in text else (text.removeprefix(HUB), "", "")
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.*))?", path)
        if not match or (at and not revision):
            raise ValueError(f"{text} is no name on the Hugging Face hub; write hf:OWNER/REPO[/FILE][@REVISION]")
        return cls(text, match[1], (match[2] or "").strip("/"), revision or MAIN)

    @property
    def stem(self) -> str:
        """What the model is called: its file without suffix, or its repository."""
        last = PurePosixPath(self.file or self.repo)
        return last.stem if last.suffix in SUFFIXES else last.name


class _Choice(NamedTuple):
    """What a name stands for at one commit: files of weights, what goes with them, and the file or folder to open."""

    repo: str
    commit: str
    weights: list[str]
    beside: list[str]
    opened: str


def is_hub(name: str | Path) -> bool:
    return str(name).startswith(HUB)


def fetched(text: str) -> Path:
    """Where the file or folder that a name stands for lies in the cache; what is not there yet is downloaded.

    A name is looked up once in a process, so that a model and its tokenizer are of one commit. What is taken without
    being named is told on standard error. Raises ValueError, in one line, for whatever cannot be had.
    """
    name, choice = HubName.of(text), _chosen(text)
    missing = [file for file in (*choice.beside, *choice.weights) if not _in_cache(choice, file)]
    if missing:
        told(f"downloading {', '.join(missing)} of {name.repo} into {_library().constants.HF_HUB_CACHE}")
        patterns = list(map(escape, missing))
        with _broken_off(name):  # by its revision, which is then known offline, too
            _library().snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns)
    first = _in_cache(choice, choice.weights[0])
    if not first:
        raise ValueError(f"{text}: {name.revision} has moved on while it was downloaded; try again")
    return Path(first).parents[len(PurePosixPath(choice.weights[0]).parts) - 1] / choice.opened


def pinned(text: str, before: list[str]) -> str:
    """The same name with the file it stands for, and the commit in place of a revision that may move.

    before: names that had theirs already; for a name without a revision, one of the same model is taken.
    """
    name = HubName.of(text)
    for other in map(HubName.of, filter(is_hub, before)):
        if other.repo == name.repo and name.file in ("", other.file) and name.revision == MAIN:
            return other.text
    choice = _chosen(text)
    return f"{HUB}{choice.repo}" + f"/{choice.opened}" * bool(choice.opened) + f"@{choice.commit}"


def look_into(text: str, read: Callable[[BinaryIO], dict]) -> dict:
    """What `read` finds in the files of weights that a name stands for, together: those in the cache, or over the
    network, of which no more is fetched than is read."""
    choice, library, found = _chosen(text), _library(), {}
    remote = library.HfFileSystem(endpoint=library.constants.ENDPOINT)
    for file in choice.weights:
        far, here = f"{choice.repo}@{choice.commit}/{file}", _in_cache(choice, file)
        with _broken_off(HubName.of(text)), open(here, "rb") if here else remote.open(far, block_size=BLOCK) as f:
            found |= read(f)
    return found


def _library():
    """huggingface_hub, whose telemetry (what else is installed here) is off."""
    import huggingface_hub.constants
    import huggingface_hub.errors

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


@cache
def _chosen(text: str) -> _Choice:
    name = HubName.of(text)
    return _choose(name, *_listed(name))


def _listed(name: HubName) -> tuple[str, list[str], bool]:
    """(commit, files, False) of a revision, as the hub says; (commit, those in the cache, True) where that cannot be
    reached."""
    library = _library()
    try:
        with _in_words(name):
            info = library.HfApi().model_info(name.repo, revision=name.revision, timeout=PATIENCE)
        return info.sha, [file.rfilename for file in info.siblings or ()], False
    except OSError as error:
        why = "HF_HUB_OFFLINE is set" if library.constants.HF_HUB_OFFLINE else _line(error)
        snapshot = _snapshot(name)
        if not snapshot:
            raise ValueError(
                f"{name.text}: {library.constants.ENDPOINT} cannot be reached ({why}), and the cache "
                f"{library.constants.HF_HUB_CACHE} has nothing of it; download it where there is a network"
            ) from None
        told(f"{name.text}: the hub cannot be reached ({why}); taken from the cache, commit {snapshot.name[:12]}")
        return snapshot.name, _files_below(snapshot), True


def _lacking(name: HubName, cached: bool, why: str) -> ValueError:
    """What to raise where files lack that a name asks for. cached: of those in the cache, which may be some of them."""
    if cached:
        why = f"not all of it is in the cache {_library().constants.HF_HUB_CACHE}; download it where there is a network"
    return ValueError(f"{name.text}: {why}")


def _choose(name: HubName, commit: str, files: list[str], cached: bool) -> _Choice:
    """Which of a repository's files a name stands for. cached: as for `_lacking`."""
    weights = [file for file in files if file.endswith(SUFFIXES)]
    if name.file in files:
        if not name.file.endswith(OPENED):
            raise ValueError(f"{name.text} is no file of weights that is opened here; {_list(weights)}")
        return _with_beside(name, commit, files, [name.file], name.file)
    folder = f"{name.file}/" if name.file else ""
    inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
    if not inside:
        lacks = f"{name.repo} has no file {name.file} at {name.revision}" if name.file else f"{name.repo} is empty"
        raise _lacking(name, cached, f"{lacks}; {_list(weights)}")
    adapter = [folder + file for file in inside if fnmatch(file, "adapter_model.*")]
    if "adapter_config.json" in inside and adapter:
        return _with_beside(name, commit, files, adapter, name.file)
    if "config.json" in inside and (index := next((file for file in HF_WEIGHTS if file in inside), None)):
        weights = [folder + file for file in _weights_of_folder(name, commit, folder, index)]
        if lacking := set(weights) - set(files):
            raise _lacking(name, cached, f"{index} lists {min(lacking)}, which {name.repo} has not; name another model")
        return _with_beside(name, commit, files, weights, name.file)
    weights = [file for file in weights if file.startswith(folder)]
    if not weights:
        raise _lacking(name, cached, f"it names no file of weights; {_list(weights)}")
    if len(weights) > 1:
        raise ValueError(f"{name.text} names no file of weights, and none is guessed; {_list(weights)}")
    others = " of those in the cache; the repository may have others" if cached else ""
    told(f"{name.text} holds one file of weights, {weights[0]}, which is taken{others}")
    return _with_beside(name, commit, files, weights, weights[0])


def _weights_of_folder(name: HubName, commit: str, folder: str, index: str) -> list[str]:
    """The files of weights of a Hugging Face folder, after a look at its config."""
    kind = read_json(_get(name, commit, folder + "config.json")).get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f'{name.text}: model_type is {kind!r}, expected "rwkv" (RWKV-4) or "rwkv7"')
    if not index.endswith(".json"):
        return [index]
    found = read_json(_get(name, commit, folder + index)).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name.text}: {index} names no files of weights; name another model")
    return sorted({str(shard) for shard in found.values()})


def _with_beside(name: HubName, commit: str, files: list[str], weights: list[str], opened: str) -> _Choice:
    """The choice of these weights, with what lies in their folder and goes with them."""
    folder = PurePosixPath(weights[0]).parent
    near = [file for file in files if PurePosixPath(file).parent == folder]
    beside = [file for file in near if any(fnmatch(PurePosixPath(file).name, shape) for shape in BESIDE)]
    return _Choice(name.repo, commit, weights, [file for file in beside if file not in weights], opened)


def _list(weights: list[str]) -> str:
    if not weights:
        return f"it has no {', '.join(SUFFIXES)}"
    more = f" and {len(weights) - SHOWN} more" if len(weights) > SHOWN else ""
    return f"its files of weights: {', '.join(sorted(weights)[:SHOWN])}{more}"


def _get(name: HubName, commit: str, file: str) -> Path:
    with _broken_off(name):
        return Path(_library().hf_hub_download(name.repo, file, revision=commit))


@contextmanager
def _broken_off(name: HubName) -> Iterator[None]:
    """ValueError where a download does not come to its end."""
    try:
        with _in_words(name):
            yield
    except OSError as error:
        why = _line(error.__cause__ or error)
        raise ValueError(f"{name.text} cannot be downloaded ({why}); the same command goes on with it") from None


def _in_cache(choice: _Choice, file: str) -> str | None:
    found = _library().try_to_load_from_cache(choice.repo, file, revision=choice.commit)
    return found if isinstance(found, str) else None


def _snapshot(name: HubName) -> Path | None:
    """The folder of a revision in the cache."""
    library = _library()
    try:
        return Path(library.snapshot_download(name.repo, revision=name.revision, local_files_only=True))
    except library.errors.LocalEntryNotFoundError:
        return None


def _files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def _in_words(name: HubName) -> Iterator[None]:
    """What the hub answers to a name that is wrong, or not for everybody, as one ValueError. OSError where it does not
    answer."""
    library = _library()
    errors, page = library.errors, f"{library.constants.ENDPOINT}/{name.repo}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(f"{name.text}: its makers ask for consent; agree on {page}, then {login}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name.text}: the hub has no repository {name.repo}, or it is private; check the name, or {login}"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name.text}: {name.repo} has no branch, tag or commit {name.revision}; see {page}") from None
    except errors.LocalEntryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status >= 500:
            raise OSError(f"it answers {status}") from None
        raise ValueError(f"{name.text}: the hub refuses ({_line(error)}); try again later, or {login}") from None


def _line(error: BaseException) -> str:
    """An error in a line; those of a connection have nothing to say but their kind."""
    kind = type(error).__name__
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    raw = len(error.args) > 1 and isinstance(error.args[0], str)  # of several arguments str makes a tuple's text
    text = (error.args[0] if raw else str(error)).strip().partition("\n")[0]
    return text if text and "ConnectionPool" not in text else kind
