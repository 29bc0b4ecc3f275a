"""A reward that lives behind an HTTP address."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

TIMEOUT, TRIES, BATCH = 120.0, 4, 256


class NoAnswer(ValueError):
    """The endpoint cannot be reached, or does not answer as it should."""


def endpoint(
    url: str, *, timeout: float = TIMEOUT, wait: float = 1.0
) -> Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], list[float]]:
    """A reward function that asks an endpoint.

    It gets ``POST`` requests with ``{"prompts": [...], "responses": [...], "extras": [...]}``, at most 256 of each,
    and answers ``{"scores": [...]}``. Where it is busy (429, 5xx) or out of reach it is asked up to four times.

    Args:
        url: ``http://`` or ``https://``.
        timeout: Seconds for one answer.
        wait: Seconds before the second try; doubled after each.
    """

    def score(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
        found: list[float] = []
        for at in range(0, len(prompts), BATCH):
            part = slice(at, at + BATCH)
            asked = {"prompts": prompts[part], "responses": responses[part], "extras": extras[part]}
            answer = _post(url, json.dumps(asked, default=str).encode(), timeout, wait)
            if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
                raise NoAnswer(f'{url} answered {answer!r:.200}, want {{"scores": [...]}}')
            if len(answer["scores"]) != len(asked["responses"]):
                raise NoAnswer(
                    f"{url} gave {len(answer['scores'])} scores for {len(asked['responses'])} responses, from sample "
                    f"{at} on: {responses[at]!r:.200}"
                )
            found += answer["scores"]
        return found

    return score


def _post(url: str, body: bytes, timeout: float, wait: float) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    problem = ""
    for tried in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {error.read(200).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, TimeoutError) as error:
            problem = str(error)
        except json.JSONDecodeError as error:
            raise NoAnswer(f"{url} did not answer in JSON ({error})") from None
        if tried < TRIES:
            time.sleep(wait * 2 ** (tried - 1))
    raise NoAnswer(f"{url} did not answer ({problem})")
