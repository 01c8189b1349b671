"""Serving the page."""

import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import closing

import uvicorn

from imagen_jax.errors import UserError
from imagen_jax.serving.guard import HostCheck, Hosts
from imagen_jax.serving.page import make_app
from imagen_jax.serving.studio import Studio

_SHUTDOWN_SECONDS = 3  # that open pages get when the server ends
_HEAD_BYTES = 2**18  # of a request, so that the page can say that a link is too long


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address.

    Args:
      host: name or address.
      port: 0: any that is free.

    Raises:
      UserError: if the port is taken or not allowed, or there is no such host, naming the flag.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be 0 (any that is free) to 65535")
    if not host.strip():  # which the system takes for every address of the machine
        raise UserError(
            "--host is empty: give a name or an address; 0.0.0.0 is every address of this machine"
        )
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: in use by another program; give another, or 0 for any"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port}: not allowed for this user; give one above 1023") from error
        raise UserError(f"--host {host}: cannot listen there: {error.strerror or error}") from error
    except ValueError as error:  # no name of a host at all
        raise UserError(f"--host {host:.80}: no name of a machine: {error}") from error


def address(listener: socket.socket) -> str:
    """The URL of a listening socket; one that listens everywhere is reached as localhost."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class _Server(uvicorn.Server):
    """Says when it answers; from before then on it is what an interrupt ends."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets=sockets)
        self._ready()


def serve(studio: Studio, listener: socket.socket, hosts: Hosts, *, ready: Callable[[], None]) -> None:
    """Serves the page until the process is interrupted; what is being drawn then ends.

    Args:
      studio: draws.
      listener: where.
      hosts: under which names; see `guard`.
      ready: called when the page can be opened.

    Raises:
      KeyboardInterrupt: at Ctrl-C.
    """
    config = uvicorn.Config(
        HostCheck(make_app(studio), hosts),
        log_level="warning",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        lifespan="on",
        http="h11",  # httptools reads no link beyond 64 KiB
        h11_max_incomplete_event_size=_HEAD_BYTES,
    )
    with closing(studio):
        _Server(config, ready).run(sockets=[listener])
