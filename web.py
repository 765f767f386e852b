"""Requests to the servers that training or an evaluation may use: a retriever (retriever.Remote) and a judge
(measures.judge).

A redirect is an error, because it would carry questions and keys to another address. Requests to this machine
never go through a proxy; others go through the proxies of the environment.

    reply = post("http://127.0.0.1:8000/retrieve", {"queries": ["who?"], "topk": 3}, timeout=10)
"""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

from files import InputError

MAX_REPLY = 2**26  # bytes


class RequestError(RuntimeError):
    """A request without a reply that can be used. The message is one line, with the HTTP status and the
    server's own message if there are any. `again` tells whether the same request may succeed later."""

    def __init__(self, message: str, again: bool):
        super().__init__(message)
        self.again = again


def check_url(url: str, flag: str) -> str:
    """Returns `url` without a slash at its end. Raises InputError, which names the flag, if it is no address
    of a server."""
    try:
        parts = urlsplit(url)
        port_in_range = parts.port is None or parts.port > 0  # .port raises ValueError for 70000
        host = re.fullmatch(r"[\w.:%-]+", parts.hostname or "", re.ASCII)
        plain = not parts.username and not re.search(r"[^!-~]", url)  # no blanks, no control characters
        if parts.scheme in ("http", "https") and host and port_in_range and plain:
            return url.rstrip("/")
    except ValueError:
        pass
    raise InputError(
        f"{flag} {url!r}: it is no address of the form http(s)://host[:port][/path] without a user name"
    )


def is_this_machine(host: str) -> bool:
    """Whether a host name or a numeric address is one of this machine. No name is looked up."""
    host = host.removesuffix(".")
    if host in ("localhost", "ip6-localhost", "::1", socket.gethostname().lower()) or host.endswith(
        ".localhost"
    ):
        return True
    try:  # only an address of this machine can be bound to
        kind, _, _, _, address = socket.getaddrinfo(
            host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except (OSError, UnicodeError):
        return False
    return True


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None  # urllib then raises HTTPError with the status of the redirect


def post(url: str, content: dict, timeout: float, headers: dict[str, str] | None = None) -> bytes:
    """The body of the reply to a POST request with a JSON body. `timeout` is in seconds: for the connection,
    for each read, and, looked at after each read, for the whole reply. Raises RequestError."""
    body, end, reply = json.dumps(content).encode(), time.monotonic() + timeout, bytearray()
    proxies = {} if is_this_machine(urlsplit(url).hostname or "") else None  # None: those of the environment
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), NoRedirect)
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
        with opener.open(request, timeout=timeout) as response:
            while chunk := response.read1(2**20):
                reply += chunk
                if len(reply) > MAX_REPLY:
                    raise RequestError(f"the reply is larger than {MAX_REPLY} bytes", again=False)
                if time.monotonic() > end:  # the socket's timeout is for one read, of which there may be many
                    raise TimeoutError("timed out")
            if response.length:  # bytes that were announced and did not come
                raise ConnectionError("the reply was cut short")
    except urllib.error.HTTPError as error:
        with error:
            said = _message(error)
        raise RequestError(f"HTTP {error.code} {error.reason}{said}", again=error.code >= 500) from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a header with a line break
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise RequestError(reason, again=not isinstance(error, ValueError)) from error
    return bytes(reply)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says about an error: the message in its JSON, or else the text of its page."""
    try:
        text = error.read(2**16).decode(errors="replace")
    except (OSError, HTTPException):
        return ""
    try:
        content = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(content, dict) and content.get(key):
                content = content[key]
        text = content if isinstance(content, str) else json.dumps(content)
    except (ValueError, RecursionError):
        text = re.sub(r"<[^>]*>", " ", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f": {text[:300]}" if text else ""
