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


@pytest.fixture(scope="module")
def browser():
    from browsing import CHROMIUM, playwright  # where they are missing, the tests of the pages are skipped

    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """visit(path, **context): a page of its own person. At the end, none has had an error or asked anybody else."""
    from browsing import LIKELIEST

    pages, wrong = [], []

    def opened(path="/", watch=True, **context):
        page = browser.new_context(**{"locale": "en-US", **context}).new_page()
        page.add_init_script(LIKELIEST)
        if watch:
            page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("blob:", server.url)) or wrong.append(f"asked {r.url}"))
        pages.append(page)
        page.goto(server.url + path)
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert not wrong
