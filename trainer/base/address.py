"""Addresses of endpoints: what is wrong with one, what may be shown of it, and where its secrets come from.

A password, what follows ``?`` and what follows ``#`` may be secrets. They are kept out of every file and message, but
for ``${REWARD_...}``, which stands for a variable of the environment and is looked up when a run begins.
"""

from __future__ import annotations

import base64
import json
import os
import re
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
HELP = "huggingface.co/docs/"  # Where libraries send people; what stands behind a # there is a heading.
SHORT = 3  # So few letters are found in many words, and hide nothing.
# Recipes come from others: one prefix keeps them from sending other variables, keys of a cloud say, to their address.
VARIABLE = re.compile(r"\$\{(REWARD_[A-Z0-9_]*)\}")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
NUMBER, END = r"[-+]?[\d.]+(?:[eE][-+]?\d+)?", r"(?=[\s'\",]|$)"
IN_TEXT = re.compile(  # up to a weight, which is no part of the address, or to the end
    rf"(?P<scheme>https?://)(?P<who>[^\s/?#'\"]*@(?!{NUMBER}{END}))?(?P<place>[^\s?#'\",]*?)"
    rf"(?P<query>\?[^\s#'\",]*?)?(?P<fragment>#[^\s'\",]*?)?(?=(?:@{NUMBER})?{END})",
    re.IGNORECASE,
)
KNOWN = re.compile(rf"(?:{VARIABLE.pattern}|{re.escape(HIDDEN)})[.:;)]*")


class Address(NamedTuple):
    """Where to ask."""

    shown: str
    """The address without its secrets."""
    secure: bool
    host: str
    port: int | None
    target: str
    """Path and query."""
    headers: dict[str, str]
    """Who asks, where the address says so."""
    secrets: tuple[str, ...]

    def hide(self, text: str, most: int) -> str:
        """A text of the other side, without secrets of ours that it sends back, and cut to so many letters after that.

        Where it breaks off within a secret, as an answer of which we read the beginning may, that part is hidden too.
        """
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        for secret in self.secrets:
            begun = next((n for n in range(len(secret) - 1, SHORT, -1) if text.endswith(secret[:n])), 0)
            text = text[: len(text) - begun] + HIDDEN * bool(begun)
        return text if len(text) <= most else text[:most]


def is_address(name: str) -> bool:
    """Whether a reward's name is an address, of whatever kind."""
    return SCHEME.match(name) is not None


def redacted(text: str) -> str:
    """A text with every address in it as it may be shown.

    >>> redacted("asked https://me:pw@h:80/score?key=abc&top=${REWARD_TOP}#x twice")
    'asked https://me:***@h:80/score?key=***&top=${REWARD_TOP}#*** twice'
    """
    return IN_TEXT.sub(_redacted, text)


def secrets_of(text: str) -> set[str]:
    """What ``redacted`` keeps out of a text, as it stands there and as it is meant (%20 is a blank)."""
    found: set[str] = set()
    for one in IN_TEXT.finditer(text):
        user, colon, password = (one["who"] or "").rpartition("@")[0].partition(":")
        found |= {password if colon else user, *map(_value, (one["query"] or "?")[1:].split("&"))}
    found = {secret for secret in found if secret and not KNOWN.fullmatch(secret)}
    return found | set(map(unquote, found))


def read(url: str) -> Address:
    """An address with its variables filled in.

    Raises:
        ValueError: It cannot be asked, or a variable is not set; the message is safe to show.
    """
    got = f"reward: got the address {redacted(url)}, want"
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{got} no blanks and letters of ASCII only (a blank is %20)")
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError:
        raise ValueError(f"{got} http://HOST[:PORT]/PATH") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or "$" in parts.hostname:
        raise ValueError(f"{got} http:// or https://, and a host")
    if HIDDEN in url:
        raise ValueError(
            f"{got} its secret, which was kept out of the run's files: give it again (--reward; of a pipeline, the "
            "command that it began with), or write ${REWARD_KEY} in its place"
        )
    if parts.fragment:
        raise ValueError(f"{got} nothing behind a #: no server is told")
    values: list[str] = []

    def filled(text: str, safe: str | None = None) -> str:
        def value(found: re.Match[str]) -> str:
            if not (known := os.environ.get(found[1], "")):
                raise ValueError(f"reward: {redacted(url)} wants the environment variable {found[1]}, which is not set")
            values.append(known)
            return known if safe is None else quote(known, safe=safe)

        return VARIABLE.sub(value, text)

    user = unquote(filled(parts.netloc.rpartition("@")[0], ""))
    target = filled(parts.path or "/", "") + (f"?{filled(parts.query, '')}" if parts.query else "")
    who = base64.b64encode(user.encode()).decode()
    headers = {"Authorization": f"Basic {who}"} if user else {}
    known = {*values, *secrets_of(url)}
    known |= {quote(s, safe="") for s in known} | {f(s)[1:-1] for f in (repr, json.dumps) for s in known}
    known |= {who, who.rstrip("=")}
    shortest_last = tuple(sorted((s for s in known if len(s) > SHORT), key=len, reverse=True))
    return Address(redacted(url), parts.scheme == "https", parts.hostname, port, target, headers, shortest_last)


def _redacted(found: re.Match[str]) -> str:
    who = found["who"] or ""
    if who:
        user, colon, password = who[:-1].partition(":")
        who = f"{user}:{_kept(password)}@" if colon else f"{_kept(user)}@"
    query = "&".join(map(_shown, found["query"][1:].split("&"))) if found["query"] else ""
    fragment = found["fragment"] or ""
    if fragment and not (found["place"].startswith(HELP) and not who):
        fragment = f"#{_kept(fragment[1:])}"
    return found["scheme"] + who + found["place"] + ("?" if found["query"] else "") + query + fragment


def _shown(part: str) -> str:
    """Of a query: ``name=value``, or a value alone."""
    name, equals, value = part.partition("=")
    return f"{name}={_kept(value)}" if equals else _kept(name)


def _value(part: str) -> str:
    return part.partition("=")[2] if "=" in part else part


def _kept(value: str) -> str:
    return value if not value or KNOWN.fullmatch(value) else HIDDEN
