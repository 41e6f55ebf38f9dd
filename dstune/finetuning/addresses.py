"""Checks addresses that clients give the server to connect to: https only, and nothing inside the server's own network.

The host name is checked in the request, and its IP address at every connection, since a name may resolve differently by then.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from dstune.serve.errors import ApiError

MOST_CHARACTERS = 2048


class Refused(OSError):
    """The server refuses to connect to this address."""


def checked_url(url: object, allowed: Collection[str]) -> str:
    """Check a URL. allowed: `HOST[:PORT]` or `http://HOST:PORT` of the operator's own network. Raises ApiError."""
    if not isinstance(url, str) or not 0 < len(url) <= MOST_CHARACTERS or not url.isprintable() or " " in url:
        raise _refused(f"must be a URL of at most {MOST_CHARACTERS} characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused("is no URL") from None
    if parts.username is not None or parts.password is not None or parts.fragment or not parts.hostname:
        raise _refused("must have a host, and neither a user nor a fragment")
    if is_allowed(parts, allowed):
        return url
    if parts.scheme != "https":
        raise _refused("must begin with https://")
    if port == 0 or not parts.hostname.isascii():
        raise _refused("must have a host name of ASCII characters and a port that can be reached")
    host = parts.hostname.removesuffix(".")
    if _address(host) is None and not _HOST.fullmatch(host):
        raise _refused("must have a host name of letters, digits, dots and hyphens")
    if _address(host) is None and _NUMERIC.search(host):
        raise _refused("must have a host name, or an IP address in its usual form")
    if (_address(host) is not None and not is_public(host)) or host == "localhost" or host.endswith(".localhost"):
        raise _refused("must be an address of the internet")
    return url


def is_allowed(parts: SplitResult, allowed: Collection[str]) -> bool:
    """Return whether the operator allows the host of a URL."""
    host, netloc = (parts.hostname or "").lower(), parts.netloc.lower()
    if parts.scheme == "https":
        return host in allowed or netloc in allowed
    return parts.scheme == "http" and f"http://{netloc}" in allowed


def is_public(address: str) -> bool:
    """Return whether an IP address is public; an IPv6 form that carries an IPv4 address is judged by that."""
    parsed = _address(address)
    if parsed is None:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        for inner in (parsed.ipv4_mapped, parsed.sixtofour, (parsed.teredo or (None, None))[1]):
            if inner is not None:
                return is_public(str(inner))
        if parsed in _TRANSLATED:
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
        if parsed not in _GLOBAL_UNICAST:
            return False
    if any(parsed in network for network in _SPECIAL):
        return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)


_NUMERIC = re.compile(r"(^|\.)(\d+|0x[0-9a-f]*)\.?$")
"""The end of an IPv4 address in the numeric forms that sockets also accept: `127.1`, `2130706433`, `0x7f.1`."""
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # services of Azure's hosts, among them metadata
        "100.64.0.0/10",  # shared by providers; Alibaba's metadata are at 100.100.100.200
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata are at 192.0.0.192
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments
        "3fff::/20",  # documentation
    )
)
"""Networks that some versions of Python's `ipaddress` call global: IANA's special-purpose addresses, and cloud addresses that only
the cloud's own machines can reach."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


class PublicResolver(AbstractResolver):
    """Resolves host names to public addresses; a name with any other address is refused."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        results: list[ResolveResult] = []
        for kind, _, protocol, _, place in addresses:
            if not is_public(str(place[0])):
                raise Refused(f"{host} is in a network that is not public")
            results.append(
                ResolveResult(
                    hostname=host, host=str(place[0]), port=port, family=kind, proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )  # fmt: skip
        return results

    async def close(self) -> None:
        return


def outward_session(*, allowed: bool, seconds: float) -> aiohttp.ClientSession:
    """Return a client for one address that passed `checked_url`. allowed: whether the operator allows its host."""
    connector = aiohttp.TCPConnector(
        resolver=None if allowed else PublicResolver(), use_dns_cache=False, force_close=True, limit=1
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=seconds),
        trust_env=False,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"Invalid url: {reason}.", param="url", code="invalid_url")
