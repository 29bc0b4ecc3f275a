"""A reward that lives behind an HTTP address.

What answers may be slow, broken or worse, so nothing of it is taken on trust: an answer has one deadline to its last
byte, a size, and a form. The request goes to the address that was named and nowhere else:
neither redirects nor the environment's proxies nor .netrc are followed.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from trainer.base.address import Address, read, redacted

TIMEOUT, TRIES, BATCH = 120.0, 4, 256
LARGEST = 1 << 20
"""Bytes of an answer; 256 scores are a few thousand."""
TOLD = 200  # Letters that a message shows of an answer, and bytes that are read of an error's.


class NoAnswer(ValueError):
    """The endpoint cannot be reached, or does not answer as it should."""


class Busy(Exception):
    """It may answer another time; ``after`` is when, in seconds, if it says so."""

    def __init__(self, problem: str, after: float = 0.0) -> None:
        super().__init__(problem)
        self.after = after


def endpoint(
    url: str, *, timeout: float = TIMEOUT, wait: float = 1.0
) -> Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], list[float]]:
    """A reward function that asks an endpoint.

    It gets ``POST`` requests with ``{"prompts": [...], "responses": [...], "extras": [...]}``, at most 256 of each,
    and answers ``{"scores": [...]}``, one finite number per response. Where it is busy (429, 5xx), out of reach, late,
    or breaks off, it is asked up to four times.

    Args:
        url: ``http://`` or ``https://``; ``${REWARD_...}`` in it stands for a variable of the environment.
        timeout: Seconds for one answer, all of it. To look its name up, and to be connected, comes before.
        wait: Seconds before the second try; doubled after each. ``Retry-After`` is heeded, up to ``timeout``.

    Raises:
        ValueError: It is no address that can be asked, or a variable is not set.
    """
    address = read(url)

    def score(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
        found: list[float] = []
        for at in range(0, len(prompts), BATCH):
            part = slice(at, at + BATCH)
            asked = {"prompts": prompts[part], "responses": responses[part], "extras": extras[part]}
            answer = _asked(address, _json(asked), timeout, wait)
            if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
                told = address.hide(repr(answer), TOLD)
                raise NoAnswer(f'{address.shown} answered {told}, want {{"scores": [...]}}')
            if len(answer["scores"]) != len(asked["responses"]):
                raise NoAnswer(
                    f"{address.shown} gave {len(answer['scores'])} scores for {len(asked['responses'])} responses, "
                    f"from sample {at} on: {responses[at]!r:.200}"
                )
            found += [_number(address, x, r) for x, r in zip(answer["scores"], responses[part], strict=True)]
        return found

    return score


def _number(address: Address, x: Any, response: str) -> float:
    """JSON's numbers only: a text or a truth that looks like one was not meant as a score."""
    try:
        if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x):
            return float(x)
    except OverflowError:
        pass
    told = address.hide(repr(x), 60)
    raise NoAnswer(f"{address.shown} gave {told} to the response {response!r:.200}, want a finite number")


def _json(asked: Any) -> bytes:
    """JSON has neither NaN nor infinities; what data holds of them is null, as in our logs."""
    try:
        return json.dumps(asked, default=str, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(asked), default=str).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asked(address: Address, body: bytes, timeout: float, wait: float) -> Any:
    problem = ""
    for tried in range(1, TRIES + 1):
        try:
            return _once(address, body, time.monotonic() + timeout)
        except Busy as busy:
            problem = str(busy)
            if tried < TRIES:
                time.sleep(max(wait * 2 ** (tried - 1), min(busy.after, timeout)))
    raise NoAnswer(f"{address.shown} did not answer ({problem})")


def _once(address: Address, body: bytes, deadline: float) -> Any:
    """One request and its answer.

    Raises:
        Busy: It is worth another try.
        NoAnswer: It is not.
    """
    try:
        status, told, after, answer = _exchanged(address, body, deadline)
    except (OSError, http.client.HTTPException) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
        told = address.hide(str(error), TOLD) or type(error).__name__  # It quotes an answer that is no HTTP.
        raise Busy("the time for an answer is over" if late else told) from None
    if status == 429 or status >= 500:
        raise Busy(f"status {status}: {told}", after)
    if status >= 300:
        raise NoAnswer(f"{address.shown} did not answer (status {status}: {told})")
    if len(answer) > LARGEST:
        raise NoAnswer(f"{address.shown} answered with more than {LARGEST >> 20} MiB, want a score per response")
    try:
        return json.loads(answer.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"{address.shown} did not answer in JSON ({_short(error)})") from None


def _short(error: Exception) -> str:
    return str(error).partition(";")[0]  # Python's advice about long numbers is not for here


def _exchanged(address: Address, body: bytes, deadline: float) -> tuple[int, str, float, bytes]:
    """Status, what is told about it, seconds to wait, and of a good answer all of it, or more than is wanted.

    A socket's own timeout begins anew with each byte that arrives, so that a server could be waited for without end.
    Therefore an alarm ends the connection at the deadline, whatever is being read or written.
    """
    kind, port = (http.client.HTTPSConnection, 443) if address.secure else (http.client.HTTPConnection, 80)
    connection = kind(address.host, address.port or port, timeout=_left(deadline))
    connection.connect()
    alarm = threading.Timer(_left(deadline), _hang_up, [connection.sock])
    alarm.daemon = True
    alarm.start()
    try:
        connection.request("POST", address.target, body, {"Content-Type": "application/json"} | address.headers)
        answer = connection.getresponse()
        good = answer.status < 300
        found, told = (answer.read(LARGEST + 1), "") if good else (b"", _about(answer, address))
        late = time.monotonic() >= deadline  # What was cut off by the alarm looks like an answer that has ended.
        if not good:
            told = told if told and not late else address.hide(answer.reason, TOLD)
            return answer.status, told, _seconds(answer.getheader("Retry-After")), b""
        if late:
            raise TimeoutError
        if answer.length and len(found) <= LARGEST:
            raise http.client.IncompleteRead(found, answer.length)
        return answer.status, "", 0.0, found
    finally:
        alarm.cancel()
        connection.close()


def _hang_up(plain: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(plain, socket.SHUT_RDWR)  # TLS would first ask the other side.


def _left(deadline: float) -> float:
    """Seconds. A timeout of zero would mean that nobody waits at all."""
    return max(deadline - time.monotonic(), 1e-3)


def _about(answer: http.client.HTTPResponse, address: Address) -> str:
    """What a status is about, as far as the other side says."""
    if answer.status < 400:
        place = address.hide(redacted(answer.getheader("Location", "nowhere")), TOLD)
        return f"a redirect to {place}, which is not followed"
    try:
        return address.hide(answer.read(TOLD).decode(errors="replace"), TOLD)
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(text: str | None) -> float:
    """Of ``Retry-After``, which may be a date instead; that is as good as nothing."""
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else 0.0
