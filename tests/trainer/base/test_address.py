"""Addresses of rewards: bad ones are refused before any work, and no secret of a good one is written down or shown."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import command
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.reward_server import Act, Server, running, whole  # noqa: F401 (a fixture)
from tests.support.runs import config, world
from trainer.base import address
from trainer.cli import program as cli
from trainer.rewards.http import NoAnswer, endpoint
from trainer.rewards.names import aspects_of

BAD_ADDRESSES = [
    ("ftp://h/x", "want http:// or https://, and a host"),
    ("file:///etc/passwd", "want http:// or https://, and a host"),
    ("http://", "want http:// or https://, and a host"),
    ("http://h:port/x", "want http://HOST[:PORT]/PATH"),
    ("http://h:99999/x", "want http://HOST[:PORT]/PATH"),
    ("http://[::1/x", "want http://HOST[:PORT]/PATH"),
    ("http://h/a b", "want no blanks"),
    ("http://h/a\r\nX: y", "reward: got 'http://h/a\\r\\nX: y', want"),
    ("http://h/\u00e9", "want no blanks"),
    ("http://h/x#y", "want nothing behind a #"),
    ("http://h/x?key=***", "want its secret, which was kept out of the run's files"),
    ("http://h/x?key=${REWARD_NONE}", "wants the environment variable REWARD_NONE, which is not set"),
    ("http://${REWARD_HOST}/x", "want http:// or https://, and a host"),
]


@pytest.mark.parametrize(("url", "message"), BAD_ADDRESSES)
def test_a_bad_address_is_told_before_any_work(tmp_path: Path, capsys: Any, url: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "p"}\n')
    argv = ["grpo", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out"), f"--reward={url}"]
    assert cli.main(argv) == 2
    assert message in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h/score", "https://h/score"),
        ("https://h:8080/s?x=y@0.5", "https://h:8080/s?x=***@0.5"),
        ("a=http://h/a?k=1,http://i/b?k=2@-1e-3", "a=http://h/a?k=***,http://i/b?k=***@-1e-3"),
        ("HTTPS://Token@h/x", "HTTPS://***@h/x"),
        ("https://me:p@ss@h/x", "https://me:***@h/x"),
        ("https://h/x?a&b=&c=d=e", "https://h/x?***&b=&c=***"),
        ("https://h/x#frag", "https://h/x#***"),
        ("https://huggingface.co/docs/x#offline-mode", "https://huggingface.co/docs/x#offline-mode"),
        ("https://me:pw@huggingface.co/docs/x?k=v#key=w", "https://me:***@huggingface.co/docs/x?k=***#***"),
        ("https://huggingface.co/x#key", "https://huggingface.co/x#***"),
        ("https://h@0.5", "https://h@0.5"),
        ("https://u:${REWARD_P}@h/x?k=${REWARD_K}", "https://u:${REWARD_P}@h/x?k=${REWARD_K}"),
        ("https://h/x?k=a${REWARD_K}", "https://h/x?k=***"),
        ("--reward 'https://h/x?k=a&b=c' --lr 1", "--reward 'https://h/x?k=***&b=***' --lr 1"),
        ("https://h/x?k=***: status 404", "https://h/x?k=***: status 404"),
    ],
)
def test_what_of_an_address_is_shown(text: str, shown: str) -> None:
    assert address.redacted(text) == shown
    assert address.redacted(shown) == shown
    if not text.startswith("--") and " " not in text:
        assert [tuple(a)[1] for a in aspects_of(text)] == [tuple(a)[1] for a in aspects_of(shown)]  # its weight


def test_secrets_reach_the_server_and_come_back_hidden(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "a&b/c d")
    url = server.url.replace("//", "//me:p%40ss@") + "/v1/${REWARD_KEY}?key=${REWARD_KEY}&top=s3cr3t"
    echo: Act = lambda one: one.sendall(b"HTTP/1.1 403 No\r\n\r\nnot for a&b/c d, a%26b%2Fc%20d, s3cr3t or p@ss")  # noqa: E731
    server.acts.append(echo)
    with pytest.raises(NoAnswer) as error:
        endpoint(url, wait=0.0)(["p"], ["r"], [{}])
    assert str(error.value) == (
        server.url.replace("//", "//me:***@") + "/v1/${REWARD_KEY}?key=${REWARD_KEY}&top=*** did not answer "
        "(status 403: not for ***, ***, *** or ***)"
    )
    assert server.asked[0].startswith(b"POST /v1/a%26b%2Fc%20d?key=a%26b%2Fc%20d&top=s3cr3t HTTP/1.1\r\n")
    assert base64.b64encode(b"me:p@ss") in server.asked[0]


WHO = base64.b64encode(b"me:p@ss-of-many-letters").decode()
SECRET = "s3cret-of-many-letters"
BACK: dict[str, bytes] = {
    "no HTTP": f"SSH-2.0 {SECRET} {WHO}\r\n".encode(),
    "no status": f"HTTP/1.1 {SECRET}\r\n\r\n".encode(),
    "who asked": f"HTTP/1.1 401 No\r\n\r\nAuthorization: Basic {WHO}".encode(),
    "a reason": f"HTTP/1.1 500 {'x' * 190}{SECRET}\r\n\r\n".encode(),
    "at the end of what is told": f"HTTP/1.1 403 No\r\n\r\n{'x' * 190}{SECRET}".encode(),
    "many times": f"HTTP/1.1 403 No\r\n\r\n{SECRET * 300}".encode(),
    "itself cut off": f"HTTP/1.1 403 No\r\n\r\nnot {SECRET[:-2]}".encode(),
    "a redirect": f"HTTP/1.1 302 No\r\nLocation: /{'x' * 190}{SECRET}\r\n\r\n".encode(),
    "a form": f'HTTP/1.1 200 OK\r\n\r\n["{"x" * 190}{SECRET}"]'.encode(),
    "a score": f'HTTP/1.1 200 OK\r\n\r\n{{"scores": ["{"x" * 50}{SECRET}"]}}'.encode(),
    "escaped": b'HTTP/1.1 200 OK\r\n\r\n{"scores": ["a\\\\b\'\\u00fccd"]}',
}


@pytest.mark.parametrize("way", BACK)
def test_no_part_of_a_secret_comes_back(way: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "a\\b'\u00fccd")
    url = server.url.replace("//", "//me:p%40ss-of-many-letters@") + f"/${{REWARD_KEY}}?key={SECRET}"
    server.acts.append(lambda one: one.sendall(BACK[way]))
    with pytest.raises(NoAnswer) as error:
        endpoint(url, wait=0.0)(["p"], ["r"], [{}])
    said = str(error.value)
    assert server.asked[0].count(WHO.encode()) == 1
    assert not any(part in said for part in (SECRET[:5], WHO[:5], "p@ss", "\\b", "\u00fccd"))
    assert len(said) < 500


def scored(one: socket.socket) -> None:
    """Four prompts of three responses each."""
    whole(json.dumps({"scores": [0.5, 1.0, 0.0] * 4}).encode())(one)


def found_in(folder: Path, secrets: tuple[str, ...]) -> list[str]:
    return [str(f) for f in folder.rglob("*") if f.is_file() and any(s.encode() in f.read_bytes() for s in secrets)]


def test_a_run_writes_no_secret_down_and_can_go_on(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the command, nor checkpoints, nor the report; what was a variable is looked up again, the rest asked for."""
    world(tmp_path)
    monkeypatch.setenv("REWARD_KEY", "k3y-of-env")
    secrets = ("passw0rd", "s3cr3t", "k3y-of-env")
    host = server.url.removeprefix("http://")
    literal = f"http://me:passw0rd@{host}/x?top=s3cr3t&key=${{REWARD_KEY}}"
    plain = f"http://{host}/x?key=${{REWARD_KEY}}"
    for url, again in ((plain, []), (literal, ["--reward", literal])):
        out = tmp_path / ("again" if again else "plain")
        argv = [x for x in command("grpo", tmp_path, out, "--save-every", "1") if not x.startswith("--reward=")]
        server.acts[:] = [scored, whole(b"s3cr3t passw0rd k3y-of-env is unknown", "403 No")]
        server.asked.clear()
        assert cli.main([*argv, "--reward", url]) == 2
        assert b"key=k3y-of-env" in server.asked[0]
        assert (out / "checkpoints" / "latest.json").exists()
        assert found_in(out, secrets) == []
        assert "${REWARD_KEY}" in (out / "resolved.yaml").read_text()
        said = capsys.readouterr()
        assert "did not answer (status 403: " in said.err
        assert not any(s in said.out + said.err for s in secrets if s in url or s == "k3y-of-env")
        server.acts[:] = [scored]
        if again:
            assert cli.main(["resume", str(out)]) == 2
            told = capsys.readouterr().err
            assert "want its secret, which was kept out of the run's files: give it again (--reward" in told
            assert told.count("\n") == 1
            assert cli.main(["resume", str(out), "--reward", literal.replace("/x?", "/y?")]) == 2
            assert "reward: http://me:***@" in (told := capsys.readouterr().err)
            assert not any(s in told for s in secrets)
        assert cli.main(["resume", str(out), *again]) == 0
        assert found_in(out, secrets) == []
        assert "report: " in capsys.readouterr().out


def test_a_pipeline_writes_no_secret_down(server: Server, tmp_path: Path, capsys: Any) -> None:
    """Not even one that a variable of the recipe brings in."""
    world(tmp_path)
    options = config("grpo", tmp_path, tmp_path / "x", steps=1)
    text = (
        f"vars: {{key: none}}\nstages:\n  grpo:\n    model: {options.model}\n    data: {options.data}\n"
        f"    reward: {server.url}/x?key=${{key}}\n    steps: 1\n    batch_size: 4\n    num_generations: 3\n"
        "    max_new_tokens: 4\n    quiet: true\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    server.acts.append(scored)
    argv = ["pipeline", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--set", "key=s3cr3t"]
    assert cli.main(argv) == 0
    assert b"key=s3cr3t" in server.asked[0]
    assert found_in(tmp_path / "run", ("s3cr3t",)) == []
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "grpo" / "summary.json").unlink()
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    assert "want its secret" in (told := capsys.readouterr().err)
    assert told.count("\n") == 1
    assert cli.main(argv) == 0
