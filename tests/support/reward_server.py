"""A server for rewards that answers as a test likes, broken or hostile."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

Act = Callable[[socket.socket], object]
GOOD = b'{"scores": [1.5]}'


class Server:
    """Takes connections one after the other, reads a request, and lets ``act`` answer as it likes."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.asked: list[bytes] = []
        self.sent = 0
        self.acts: list[Act] = []
        self.over = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                one, _ = self.listening.accept()
                threading.Thread(target=self._answer, args=(one,), daemon=True).start()

    def _answer(self, one: socket.socket) -> None:
        with one, suppress(OSError):
            act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
            head = b""
            while b"\r\n\r\n" not in head and (more := one.recv(1)):
                head += more
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if act is not deaf:
                while length > 0 and (more := one.recv(length)):
                    head, length = head + more, length - len(more)
            self.asked.append(head)
            act(one)

    def times_asked(self, expected: int) -> int:
        """How often somebody asked; on a busy machine a request may be read after whoever sent it has given up."""
        until = time.monotonic() + 5
        while len(self.asked) < expected and time.monotonic() < until:
            time.sleep(0.01)
        return len(self.asked)

    def endless(self, start: bytes, part: bytes, pause: float = 0.0) -> Act:
        def act(one: socket.socket) -> None:
            one.sendall(start)
            while not self.over.wait(pause):
                one.sendall(part)
                self.sent += len(part)

        return act


def whole(body: bytes, status: str = "200 OK", **headers: str) -> Act:
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return lambda one: one.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)


def raw(text: bytes) -> Act:
    return lambda one: one.sendall(text)


def deaf(one: socket.socket) -> None:
    threading.Event().wait(2)


@pytest.fixture(name="server")
def running() -> Iterator[Server]:
    made = Server()
    yield made
    made.over.set()
    made.listening.close()
