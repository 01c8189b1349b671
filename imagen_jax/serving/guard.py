"""Which requests are answered: those under a name of this server's own, from pages of its own.

A page of another site can have the browser send requests to `localhost`, and can take a name of its own for this
machine's address (DNS rebinding). The first says so in `Origin`, the second in `Host`. Both are looked at for pages and
for websockets alike; what comes from a program has no Origin.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from imagen_jax.errors import UserError

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
# A name, an IPv4 address, or an IPv6 address in brackets, and perhaps a port.
_PLACE = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?", re.IGNORECASE)
_SHOWN = 80  # characters of a stranger's header that a refusal quotes


def _host(place: str) -> str | None:
    """The host of "host:port" in its usual spelling; None: it is none."""
    found = _PLACE.fullmatch(place)
    if found is None:
        return None
    host = (found[1] or found[2]).lower().removesuffix(".")
    return str(ipaddress.ip_address(host)) if _is_address(host) else host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def parse_hosts(values: Iterable[str]) -> frozenset[str]:
    """Names and addresses from values of --allow_host, each of which may be several with commas between them.

    Raises:
      UserError: for what is neither.
    """
    hosts = set()
    for value in values:
        for part in value.split(","):
            text = part.strip().removeprefix("[").removesuffix("]")
            host = _host(f"[{text}]" if ":" in text else text)
            if host is None or (":" in text and not _is_address(host)):
                raise UserError(
                    f"--allow_host {value}: give names or addresses, without https:// and without a port"
                )
            hosts.add(host)
    return frozenset(hosts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Under which names a server is reached."""

    names: frozenset[str]  # and addresses
    trusted: frozenset[str] = (
        frozenset()
    )  # those of --allow_host: pages that come from there, through a proxy, are ours
    any_address: bool = (
        False  # whether addresses of any kind are its own: it listens at all that the machine has
    )

    @classmethod
    def of(cls, host: str, address: str, allowed: Iterable[str] = ()) -> "Hosts":
        """Names of a server.

        Args:
          host: as it was told where to listen.
          address: at which it listens.
          allowed: values of --allow_host.

        Raises:
          UserError: for a value of --allow_host that is no name.
        """
        trusted = parse_hosts(allowed)
        listening = {host.lower(), str(ipaddress.ip_address(address))}
        return cls(
            names=_LOCAL | listening | trusted,
            trusted=trusted,
            any_address=ipaddress.ip_address(address).is_unspecified,
        )

    def refusal(self, host: str, origin: str | None) -> tuple[int, str] | None:
        """Status and text with which a request is refused; None: it is answered.

        Args:
          host: its `Host` header, empty if it has none.
          origin: its `Origin` header, None if it has none.
        """
        name = _host(host)
        if name is None or not (name in self.names or (self.any_address and _is_address(name))):
            hint = "" if name is None else f"; imagen-jax serve --allow_host={name:.{_SHOWN}} would allow it"
            return 400, f"Host {host!a:.{_SHOWN}} is not a name of this server{hint}\n"
        if origin is None:
            return None
        scheme, _, place = origin.partition("://")
        own = place.lower() == host.lower() or _host(place) in self.trusted
        if scheme in ("http", "https") and own:
            return None
        return 403, f"Origin {origin!a:.{_SHOWN}} is another site: only pages of this server are answered\n"


class HostCheck:
    """An ASGI application that passes on the requests that `Hosts` does not refuse."""

    def __init__(self, app: ASGIApp, hosts: Hosts):
        self.app, self._hosts = app, hosts  # NiceGUI looks for its own application below the name `app`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request or hands it on; a websocket that is refused is never opened."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            origins = headers.getlist("origin")
            refused = self._hosts.refusal(headers.get("host", ""), ", ".join(origins) if origins else None)
            if refused is not None:
                status, text = refused
                await PlainTextResponse(text, status)(scope, receive, send)
                return
        await self.app(scope, receive, send)
