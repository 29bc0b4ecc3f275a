"""The reward behind an address: its answer has one deadline, one size and one form, and nobody else is asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.reward_server import GOOD, Act, Server, deaf, raw, running, whole  # noqa: F401 (a fixture)
from trainer.rewards import http as reward_http
from trainer.rewards.http import NoAnswer, endpoint

SHORT = 0.15  # seconds for an answer


def ask(server: Server, *acts: Act, path: str = "/score", timeout: float = SHORT, prompt: str = "p") -> list[float]:
    server.acts[:] = acts
    return endpoint(server.url + path, timeout=timeout, wait=0.0)([prompt], ["r"], [{}])


OK = b"HTTP/1.1 200 OK\r\n"
SLOW: dict[str, tuple[bytes, bytes, float]] = {
    "nothing": (b"", b"", 0.02),
    "a body by the byte": (OK + b"Content-Length: 999\r\n\r\n", b" ", 0.02),
    "a body without an end": (OK + b"\r\n", b" ", 0.02),
    "a status by the byte": (b"", b"H", 0.02),
    "headers by the byte": (OK + b"X: ", b"x", 0.02),
    "headers without an end": (OK, b"X: y\r\n", 0.02),
    "chunks by the byte": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.02),
    "go on, go on": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "an error by the byte": (b"HTTP/1.1 503 Busy\r\nContent-Length: 999\r\n\r\n", b"x", 0.02),
}


@pytest.mark.parametrize("name", SLOW)
def test_all_of_an_answer_has_one_deadline(server: Server, name: str) -> None:
    began, told = time.monotonic(), "status 503: Busy" if "error" in name else "the time for an answer is over"
    with pytest.raises(NoAnswer, match=rf"did not answer \({told}\)"):
        ask(server, server.endless(*SLOW[name]))
    assert time.monotonic() - began < reward_http.TRIES * SHORT + 2
    assert server.times_asked(reward_http.TRIES) == reward_http.TRIES


def test_who_does_not_read_is_not_waited_for(server: Server) -> None:
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="the time for an answer is over"):
        ask(server, deaf, prompt="x" * 2**25)
    assert time.monotonic() - began < reward_http.TRIES * SHORT + 3


@pytest.mark.parametrize("headers", [b"", b"Content-Length: 1000000000000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_an_answer_has_a_size(server: Server, headers: bytes) -> None:
    part = b" " * 2**16
    part = b"10000\r\n" + part + b"\r\n" if b"chunked" in headers else part
    with pytest.raises(NoAnswer, match="answered with more than 1 MiB, want a score per response"):
        ask(server, server.endless(OK + headers + b"\r\n", part), timeout=10.0)
    assert len(server.asked) == 1
    assert server.sent < 2**26  # what fits into the buffers on the way


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["http", "loop", "file:///etc/passwd", "ftp://127.0.0.1:1/x", "//elsewhere"])
def test_a_redirect_is_an_error_and_nobody_else_is_asked(server: Server, status: int, where: str) -> None:
    other = Server()
    other.acts.append(whole(GOOD))
    location = {"http": f"{other.url}/x?token=abc", "loop": "/score"}.get(where, where)
    with pytest.raises(NoAnswer, match=rf"status {status}: a redirect to .*, which is not followed") as error:
        ask(server, whole(b"", f"{status} Moved", Location=location))
    assert "token=abc" not in str(error.value)
    assert (len(server.asked), len(other.asked)) == (1, 0)
    other.listening.close()


def test_what_may_pass_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four times, and with what `Retry-After` says, as far as an answer may take."""
    waits: list[float] = []
    monkeypatch.setattr(reward_http.time, "sleep", waits.append)
    broken = [
        raw(OK + b"Content-Length: 99\r\n\r\n" + GOOD),  # it breaks off
        raw(b""),
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
        whole(b"busy", "500 No", Retry_After="3600"),
        whole(b"busy", "429 No", Retry_After="2"),
        whole(b"busy", "503 No", Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"),
        raw(b"HTTP/1.1 503 No\r\nContent-Length: 99\r\n\r\nx"),
    ]
    for act in broken:
        assert ask(server, act, whole(GOOD), timeout=5.0) == [1.5]
    assert waits == [0.0, 0.0, 0.0, 5.0, 2.0, 0.0, 0.0]
    with pytest.raises(NoAnswer, match="status 503"):
        ask(server, broken[-1])
    assert len(server.asked) == 2 * len(broken) + 4


NUMBERS = [
    "true", "null", '"1_000"', '"1"', "NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "-" + "9" * 400, "[1]",
    "[[1]]", '{"score": 1}', "[]",
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n[:12])
def test_scores_are_numbers(server: Server, number: str) -> None:
    with pytest.raises(NoAnswer, match=r"gave .{1,60} to the response 'r', want a finite number") as error:
        ask(server, whole(b'{"scores": [%s]}' % number.encode()))
    assert len(str(error.value)) < 300
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"scores": [1, 2]}', "gave 2 scores for 1 responses"),
        (b'{"scores": []}', "gave 0 scores for 1 responses"),
        (b'{"scores": {"0": 1}}', 'want {"scores": [...]}'),
        (b"[1.5]", 'want {"scores": [...]}'),
        (b"[" * 100_000, "did not answer in JSON"),
        (b'{"scores": [' + b"9" * 5000 + b"]}", "did not answer in JSON (Exceeds the limit (4300 digits)"),
        (b'{"scores": [1.0], "x": "\xe9"}', "did not answer in JSON ('utf-8'"),
        (b"\x1f\x8b\x08", "did not answer in JSON ('utf-8'"),
        (b"", "did not answer in JSON"),
    ],
)
def test_an_answer_has_one_form(server: Server, body: bytes, message: str) -> None:
    with pytest.raises(NoAnswer) as error:
        ask(server, whole(body))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.asked) == 1


def test_what_is_sent_is_json_and_numbers_are_taken_as_they_are(server: Server) -> None:
    server.acts.append(whole(b'\xef\xbb\xbf{"scores": [3, -0.25, 1e-300]}', "201 Created"))
    extras: list[dict[str, Any]] = [{"x": float("nan"), "y": [float("-inf")]}, {"z": "\ud800"}, {"n": 10**400}]
    assert endpoint(server.url, wait=0.0)(["p"] * 3, ["r"] * 3, extras) == [3.0, -0.25, 1e-300]
    body = server.asked[0].partition(b"\r\n\r\n")[2]
    assert b"NaN" not in body
    assert json.loads(body)["extras"] == [{"x": None, "y": [None]}, {"z": "\ud800"}, {"n": 10**400}]


def test_neither_proxies_nor_netrc_have_a_say(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert ask(server, whole(GOOD)) == [1.5]
    assert server.asked[0].startswith(b"POST /score HTTP/1.1\r\n")
    assert b"authorization" not in server.asked[0].lower()
