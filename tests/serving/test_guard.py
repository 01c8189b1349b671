"""Host and Origin, over raw ASGI, for pages and websockets alike. Needs what `imagen_jax[serve]` brings."""

import asyncio

import pytest

from imagen_jax.errors import UserError

pytest.importorskip("starlette")
from imagen_jax.serving.guard import HostCheck, Hosts, parse_hosts

LOCAL = Hosts.of("127.0.0.1", "127.0.0.1")
EVERYWHERE = Hosts.of("0.0.0.0", "0.0.0.0")
NAMED = Hosts.of("gpu-box", "192.168.1.5", ["draw.example.org, 10.0.0.7", "[fe80::1]"])
VERSION_6 = Hosts.of("::", "::")


async def inner(scope, receive, send):
    """The application behind: every message that it sends is an answer."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})


def ask(hosts, kind, *headers):
    """(status, text) of the answer; (101, "") for a websocket that is opened."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request"}

    scope = {"type": kind, "path": "/_nicegui_ws/socket.io", "headers": list(headers)}
    asyncio.run(HostCheck(inner, hosts)(scope, receive, send))
    if sent[0]["type"] == "websocket.accept":
        return 101, ""
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body.decode()


def host(name):
    return b"host", name.encode("latin-1")


def origin(name):
    return b"origin", name.encode("latin-1")


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        (LOCAL, ["127.0.0.1:8080", "localhost:9000", "LOCALHOST", "localhost.:80", "[::1]:8080", "[0:0::1]"]),
        (EVERYWHERE, ["localhost", "192.168.7.7:8080", "[fe80::2]:1", "0.0.0.0:8080"]),
        (VERSION_6, ["[2001:db8::1]:8080", "10.1.1.1"]),
        (
            NAMED,
            ["gpu-box:8080", "GPU-box", "192.168.1.5", "draw.example.org:443", "10.0.0.7", "[FE80:0::1]"],
        ),
    ],
    ids=["local", "everywhere", "version 6", "named"],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_its_own_names_are_answered(hosts, names, kind):
    for name in names:
        assert ask(hosts, kind, host(name))[0] in (200, 101), name
        assert ask(hosts, kind, host(name), origin(f"http://{name}"))[0] in (200, 101), name
        assert ask(hosts, kind, host(name), origin(f"https://{name}"))[0] in (200, 101), name


FOREIGN = [
    "evil.example",
    "evil.example:8080",
    "127.0.0.1.evil.example",
    "localhost.evil.example:8080",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost:8080:8080",
    "localhost/",
    "localhost evil.example",
    "localhost\tx",
    "[::1",
    "::1",
    "",
    " ",
    "ev\xefl",
    "192.168.1.5",
    "127.0.0.2",
    "x" * 10_000,
]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_another_name_is_refused_in_one_line(kind):
    for name in FOREIGN:
        status, text = ask(LOCAL, kind, host(name))
        assert status == 400 and text.startswith("Host ") and text.count("\n") == 1 and len(text) < 300, name
    assert ask(LOCAL, kind)[0] == 400
    assert ask(LOCAL, kind, host("localhost"), host("evil.example"))[0] in (200, 101, 400)
    assert ask(EVERYWHERE, kind, host("evil.example"))[0] == 400
    assert "--allow_host=evil.example" in ask(EVERYWHERE, kind, host("evil.example:80"))[1]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_pages_of_other_sites_are_refused_in_one_line(kind):
    ours = host("localhost:8080")
    for name in (
        "http://evil.example",
        "http://localhost:9000",
        "http://127.0.0.1:8080",  # another origin to the browser, too
        "https://localhost",
        "ftp://localhost:8080",
        "localhost:8080",
        "http://localhost:8080/",
        "http://localhost:8080@evil.example",
        "null",
        "",
    ):
        status, text = ask(LOCAL, kind, ours, origin(name))
        assert status == 403 and text.startswith("Origin ") and text.count("\n") == 1, name
    assert ask(LOCAL, kind, ours, origin("http://localhost:8080"), origin("http://evil.example"))[0] == 403
    # A proxy may hand on a name of its own.
    assert ask(NAMED, kind, host("localhost:8080"), origin("https://draw.example.org"))[0] in (200, 101)
    assert ask(NAMED, kind, host("localhost:8080"), origin("https://gpu-box"))[0] == 403


def test_what_is_neither_page_nor_websocket_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(HostCheck(app, LOCAL)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_names_of_the_flag():
    assert parse_hosts(["A.example, b", "10.0.0.1", "fe80:0::1,[::2]"]) == {
        "a.example",
        "b",
        "10.0.0.1",
        "fe80::1",
        "::2",
    }
    for value in (
        "",
        "a,",
        "*",
        "https://a.example",
        "a.example:80",
        "a/b",
        "a b",
        "bücher.example",
        "[a]:1",
    ):
        with pytest.raises(UserError, match="--allow_host"):
            parse_hosts([value])
