"""Who may talk, teach and operate."""

import hmac
import stat

import pytest

from rwkv_train.serve.guard import ApiError, Rights, Tokens, check_address

VIEWER, OWNER = "viewer-token-0123456789", "owner-token-0123456789"
TOKENS = {VIEWER: Rights("viewers", talk=True), OWNER: Rights("owner", True, frozenset({"starter"}), True)}


def tokens_file(tmp_path, text: str, mode: int = 0o600):
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_tokens_of_a_file(tmp_path, capsys):
    path = tokens_file(
        tmp_path,
        f'viewers: {{token: "{VIEWER}", talk: true}}\n'
        f'owner: {{token: "{OWNER}", talk: true, teach: [starter], operate: true}}\n'
        'teacher: {token: "teacher-token-01", teach: true}\n',
    )
    tokens = Tokens.load(path)
    assert {token: tokens.of(f"Bearer {token}") for token in TOKENS} == TOKENS
    assert tokens.of_token(OWNER) == tokens.of(f"bearer   {OWNER} ") == TOKENS[OWNER]
    assert tokens.of_token("teacher-token-01").may_teach("any") and not TOKENS[VIEWER].may_teach("starter")
    assert TOKENS[OWNER].may_teach("starter") and not TOKENS[OWNER].may_teach("other")
    assert not capsys.readouterr().err
    assert not any(token in f"{tokens!r} {vars(tokens)}" for token in TOKENS)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Basic {OWNER}", OWNER, f"Bearer {OWNER}x", "Bearer \xff\ud800"]
)
def test_unknown_tokens(header):
    with pytest.raises(ApiError) as refused:
        Tokens(TOKENS).of(header)
    assert refused.value.status == 401 and refused.value.headers == {"WWW-Authenticate": "Bearer"}
    assert OWNER not in str(refused.value)
    assert Tokens().of(header) == Rights("local", True, True, True)


def test_every_token_is_compared(monkeypatch):
    compared = []
    same = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or same(a, b))
    for token in (VIEWER, OWNER):
        compared.clear()
        Tokens(TOKENS).of_token(token)
        assert len(compared) == len(TOKENS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no tokens"),
        ("- a", "no tokens"),
        ("a: x", "must have a token"),
        ("a: {talk: true}", '"a" has no token'),
        ("a: {token: 12345678901234567890, talk: true}", "in quotes"),
        ("a: {token: short, talk: true}", "16"),
        ("a: {token: with a space in it, talk: true}", "no spaces"),
        (f"a: {{token: {OWNER}, talk: 1}}", "talk must be true or false"),
        (f"a: {{token: {OWNER}, teach: [1]}}", "teach must be"),
        (f"a: {{token: {OWNER}, teach: starter}}", "teach must be"),
        (f"a: {{token: {OWNER}, admin: true}}", '"admin"'),
        (f"a: {{token: {OWNER}}}", "may do nothing"),
        (f"a/b: {{token: {OWNER}, talk: true}}", "is no name"),
        (f"1: {{token: {OWNER}, talk: true}}", "is no name"),
        (f"a: {{token: {OWNER}, talk: true}}\nb: {{token: {OWNER}, talk: true}}", '"b" has the token of "a"'),
        (f"a: {{token: {OWNER}, talk: true}}\na: {{token: {VIEWER}, talk: true}}", "stands twice"),
        ("a: {", "no YAML"),
    ],
)
def test_wrong_files_of_tokens(tmp_path, text, said):
    path = tokens_file(tmp_path, text)
    with pytest.raises(ValueError) as refused:
        Tokens.load(path)
    message = str(refused.value)
    assert said in message and message.startswith(str(path)) and "\n" not in message and OWNER not in message


def test_a_file_of_tokens_that_others_read_is_told(tmp_path, capsys):
    path = tokens_file(tmp_path, f"a: {{token: {OWNER}, talk: true}}", 0o644)
    Tokens.load(path)
    assert f"chmod 600 {path}" in capsys.readouterr().err
    path.chmod(stat.S_IRUSR)
    Tokens.load(path)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"missing\.yaml: the file of tokens cannot be read"):
        Tokens.load(tmp_path / "missing.yaml")


def test_addresses():
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost", "LocalHost"):
        check_address(host, Tokens())
    for host in ("0.0.0.0", "::", "", "192.168.1.2", "localhost.evil.example", "::ffff:8.8.8.8", "2130706433"):
        with pytest.raises(ValueError, match="--tokens"):
            check_address(host, Tokens())
        check_address(host, Tokens(TOKENS))
