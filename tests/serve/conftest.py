"""Servers over a small model that learns in an instant."""

import pytest
from feedback_toys import be_careless
from served import TOKEN_FILE, served, small_config


@pytest.fixture(scope="module")
def careless():
    with pytest.MonkeyPatch.context() as patched:
        be_careless(patched)
        yield


@pytest.fixture(scope="module")
def server(careless, tmp_path_factory):
    """One without tokens, as on the machine of whoever started it."""
    with served(small_config(tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(careless, tmp_path_factory):
    """One with the tokens of `served`."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens.yaml").write_text(TOKEN_FILE)
    (folder / "tokens.yaml").chmod(0o600)
    with served(small_config(folder, tokens=str(folder / "tokens.yaml"))) as running:
        yield running
