"""Who may ask a server of this machine: by the name it was called, by the page, by a token.

A browser carries a page's requests to any address, also to one that only this machine can reach.
`Host` tells a name that somebody else points here (DNS rebinding), `Origin` and `Sec-Fetch-Site`
tell the page of another site, and neither can be set by a page.
"""

import hmac
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_HOST = "127.0.0.1"
TOKEN_VARIABLE = "HF_KNN_TOKEN"
TOKEN_IN_ADDRESS = "token"
"""The query of an address that a person opens; it becomes a cookie at once."""

SHORT_TOKEN = 16
"""Characters below which somebody may guess a token that was chosen."""

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_SAFE = ("GET", "HEAD", "OPTIONS")
_OTHER_SITES = ("cross-site", "same-site")

HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
"""Of every answer that does not say otherwise: no other site shows, reads or keeps it."""


@dataclass(frozen=True)
class Access:
    """Where a server listens, the names it is called by, and its token.

    Attributes:
        host: an address or a name of this machine.
        token: what whoever is let in knows.
        names: what else it may be called, such as the name that a proxy passes on.
        is_given: the token was chosen by whoever started the server, so nobody has to print it.
    """

    host: str
    token: str = field(repr=False)
    names: frozenset[str] = frozenset()
    is_given: bool = False

    @classmethod
    def choose(
        cls, host: str | None = None, token: str | None = None, names: Iterable[str] = ()
    ) -> "Access":
        """Decides what was not said.

        Args:
            host: None is this machine alone.
            token: None takes that of the variable `HF_KNN_TOKEN`, else makes one.
            names: further names, without ports.

        Raises:
            ValueError: for a token that no header can carry, or a name that is none.
        """
        chosen = token if token is not None else os.environ.get(TOKEN_VARIABLE) or None
        if chosen is not None and not _TOKEN.fullmatch(chosen):
            raise ValueError(
                "Expected the token to be letters, digits and signs without spaces; choose another "
                f"one, or leave out --token and {TOKEN_VARIABLE}, and one is made."
            )
        known = set()
        for name in names:
            parsed = _name_of(name)
            if parsed is None:
                raise ValueError(f"Expected the name of a host, but got {name!r}.")
            known.add(parsed)
        return cls(
            host or LOCAL_HOST, chosen or secrets.token_urlsafe(24), frozenset(known),
            chosen is not None,
        )  # fmt: skip

    @property
    def is_local(self) -> bool:
        """Whether only this machine can ask; further names are those of a proxy for others."""
        return _is_loopback(self.host) and not self.names

    def is_called(self, host: str) -> bool:
        """Whether a `Host` header names this server.

        Args:
            host: the header, with or without a port; a port is not looked at, since a tunnel has
                another one.
        """
        name = _name_of(host)
        if name is None:
            return False
        if name in self.names or _is_loopback(name) or name == _name_of(self.host):
            return True
        if _is_loopback(self.host):
            return False
        # an address is no name that somebody else could point here
        return _address_of(name) is not None or name in _own_names()

    def knows(self, token: str) -> bool:
        """Whether it is the token, in a time that does not tell how much of it is right.

        Args:
            token: what somebody sent.
        """
        return hmac.compare_digest(token.encode(), self.token.encode())


class Guard:
    """Lets through what may ask, and answers everything else with a sentence.

    Args:
        app: what answers.
        access: names and token.
        needs_token: whether a request does, by its method and path; asked only where nobody but
            this machine can reach the server, since else everything does.
    """

    def __init__(
        self, app: ASGIApp, access: Access, needs_token: Callable[[str, str], bool]
    ) -> None:
        self._app, self._access, self._needs_token = app, access, needs_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks anything else
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = self._refusal(scope) or self._token(scope) or self._app
        await answer(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """What another site or another name asks."""
        hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
        if len(hosts) != 1 or not self._access.is_called(hosts[0]):
            return refused(
                403, f"Expected this server to be called by an address of its own, but Host is "
                f"{', '.join(hosts) or 'missing'}; whoever runs it can allow a name with "
                "--allow-host.",
            )  # fmt: skip
        own = _site_of(f"http://{hosts[0]}")
        is_foreign = any(own is None or _site_of(origin) != own for origin in origins)
        if not (_headers(scope, b"sec-fetch-mode") == ["navigate"] and scope["method"] in _SAFE):
            sites = _headers(scope, b"sec-fetch-site")  # but somebody may follow a link
            is_foreign |= any(site in _OTHER_SITES for site in sites)
        if is_foreign:
            return refused(403, "Expected no request from the page of another site.")
        return None

    def _token(self, scope: Scope) -> Response | None:
        """What is said to whoever has no token and needs one, or brings it in an address."""
        cookie = f"hf_knn_{(scope.get('server') or ('', 0))[1]}"  # cookies know no ports
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        said = [value for name, value in asked if name == TOKEN_IN_ADDRESS]
        rest = [(name, value) for name, value in asked if name != TOKEN_IN_ADDRESS]
        if said:  # out of the way of any log
            scope["query_string"] = urlencode(rest).encode()
        if any(map(self._access.knows, said)) and scope["method"] in _SAFE:
            return self._let_in(scope, cookie)
        if self._access.is_local and not self._needs_token(scope["method"], scope["path"]):
            return None
        sent = [*said, *_bearers(scope), *_cookies(scope, cookie)]
        if any(map(self._access.knows, sent)):
            return None
        what = "another one" if sent else "none"
        return refused(
            401, f"Expected the token of this server, but got {what}; send it as "
            "`Authorization: Bearer TOKEN`. Whoever started the server was told it.",
            {"www-authenticate": "Bearer"},
        )  # fmt: skip

    def _let_in(self, scope: Scope, cookie: str) -> Response:
        """The same address without the token, which the browser keeps for this server alone."""
        query = scope["query_string"].decode("latin-1")
        path = "/" + scope["path"].lstrip("/\\")  # never the address of another host
        answer = RedirectResponse(path + (f"?{query}" if query else ""), 303)
        answer.set_cookie(cookie, self._access.token, httponly=True, samesite="strict")
        return answer


def refused(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says what was expected.

    Args:
        status: of HTTP.
        sentence: what, and what to do.
        headers: further ones.
    """
    return JSONResponse({"error": sentence}, status, headers)


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _bearers(scope: Scope) -> list[str]:
    pairs = [value.partition(" ") for value in _headers(scope, b"authorization")]
    return [token.strip() for scheme, _, token in pairs if scheme.lower() == "bearer"]


def _cookies(scope: Scope, name: str) -> list[str]:
    found = []
    for header in _headers(scope, b"cookie"):
        try:
            jar = SimpleCookie(header)
        except CookieError:
            continue
        found += [jar[name].value] if name in jar else []
    return found


def _name_of(host: str) -> str | None:
    """A host without its port, as names are compared; None if it is none."""
    found = _HOST.fullmatch(host) or _HOST.fullmatch(f"[{host}]")
    if found is None:
        return None
    name = found["name"].strip("[]").rstrip(".").lower()
    address = _address_of(name)
    return name if address is None else str(address)


def _address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    name = _name_of(host)
    if name is None:
        return False
    address = _address_of(name)
    return name == "localhost" if address is None else address.is_loopback


def _own_names() -> set[str]:
    """What this machine calls itself, in its network too."""
    name = socket.gethostname().lower()
    return {name, f"{name}.local", name.partition(".")[0]} - {""}


def _site_of(origin: str) -> tuple[str, str] | None:
    """Host and port of an origin; a page of http and one of https behind a proxy are the same."""
    scheme, _, host = origin.partition("://")
    found = _HOST.fullmatch(host)
    if scheme not in ("http", "https") or found is None:
        return None
    port = found["port"] or {"http": "80", "https": "443"}[scheme]
    return _name_of(host) or "", "80" if port == "443" else port


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            added = [(name, value) for name, value in HEADERS.items() if name not in there]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sent
