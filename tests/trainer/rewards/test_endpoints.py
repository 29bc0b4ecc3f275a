"""Rewards from an endpoint: scores arrive, and what fails is explained."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.trainer.rewards.test_sources import score
from trainer.rewards import http as reward_http

Answer = Callable[[dict[str, Any]], tuple[int, str]]


@pytest.fixture
def server() -> Iterator[tuple[str, list[Answer], list[dict[str, Any]]]]:
    """An address, the answers that it will give, the last of them for good, and what it was asked."""
    answers: list[Answer] = []
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = (answers.pop(0) if len(answers) > 1 else answers[0])(asked[-1])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/score", answers, asked
        httpd.shutdown()
        thread.join()


def test_an_endpoint_scores(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers, asked = server
    monkeypatch.setattr("time.sleep", lambda _: None)
    good = lambda q: (200, json.dumps({"scores": [len(r) for r in q["responses"]]}))  # noqa: E731
    answers += [lambda q: (503, "busy"), lambda q: (429, "slow down"), good]
    assert score(url).tolist() == [1.0, 3.0]
    assert len(asked) == 3
    assert asked[2] == {"prompts": ["a b", "a"], "responses": ["c", "a d"], "extras": [{}, {"response": "e f"}]}
    monkeypatch.setattr(reward_http, "BATCH", 1)
    assert score(url).tolist() == [1.0, 3.0]
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("status", "body", "message", "times"),
    [
        (200, "{}", r"answered \{\}, want \{\"scores\"", 1),
        (200, '{"scores": [1]}', "gave 1 scores for 2 responses, from sample 0 on: 'c'", 1),
        (200, "<html>", "did not answer in JSON", 1),
        (200, '{"scores": [1, null]}', "gave None to the response 'a d'", 1),
        (404, "nothing here", "status 404: nothing here", 1),
        (500, "crash", "status 500: crash", 4),
    ],
)
def test_an_endpoint_that_fails_is_explained(
    status: int, body: str, message: str, times: int, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers, asked = server
    monkeypatch.setattr("time.sleep", lambda _: None)
    answers.append(lambda q: (status, body))
    with pytest.raises(ValueError, match=message):
        score(url)
    assert len(asked) == times


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ValueError, match="did not answer"):
        score("http://127.0.0.1:9/score")
