"""Remote images: which addresses are public, and that nothing leads to the others."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cafe.serving.errors import ApiError
from cafe.serving.fetch import MAX_REDIRECTS, Fetch, is_public, resolve

PUBLIC = ["8.8.8.8", "93.184.215.14", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450:4001::200e"]
PRIVATE = {
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "::1": "loopback",
    "0.0.0.0": "unspecified",
    "::": "unspecified",
    "0.1.2.3": "this network",
    "10.0.0.1": "private",
    "172.16.0.1": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "169.254.169.254": "link-local: a cloud's metadata",
    "fe80::1": "link-local",
    "fe80::1%eth0": "link-local with a zone",
    "fec0::1": "site-local",
    "fc00::1": "unique local",
    "fd00:ec2::254": "unique local: a cloud's metadata",
    "100.64.0.1": "shared (carriers, some clouds)",
    "100.100.100.200": "shared: a cloud's metadata",
    "192.0.0.8": "protocol assignments",
    "192.0.2.1": "documentation",
    "198.18.0.1": "benchmarks",
    "198.51.100.1": "documentation",
    "203.0.113.1": "documentation",
    "2001:db8::1": "documentation",
    "224.0.0.1": "multicast",
    "239.255.255.250": "multicast",
    "ff02::1": "multicast",
    "ff0e::1": "multicast, global",
    "240.0.0.1": "reserved",
    "255.255.255.255": "broadcast",
    "::ffff:127.0.0.1": "loopback inside IPv6",
    "::ffff:8.8.8.8": "IPv4 inside IPv6",
    "::127.0.0.1": "loopback inside IPv6, the old way",
    "64:ff9b::7f00:1": "loopback behind NAT64",
    "64:ff9b:1::a00:1": "local NAT64",
    "2002:7f00:1::": "loopback behind 6to4",
    "2001:0:0:0:0:0:80ff:fffe": "Teredo",
    "": "nothing",
    "localhost": "a name",
    "0x7f000001": "not written as an address",
    "127.1": "not written as an address",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_public(address: str):
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE, ids=str)
def test_all_others_are_not(address: str):
    assert not is_public(address), PRIVATE[address]


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.1", "0x7f000001", "2130706433", "017700000001", "[::1]", "0"],
)
def test_other_spellings_of_loopback_are_refused_after_they_are_resolved(host: str):
    with pytest.raises(ApiError, match=r"not on the public internet|no address"):
        Fetch(1000, 5)(f"http://{host}/a.png")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "only http"),
        ("ftp://example.com/a", "only http"),
        ("gopher://example.com/a", "only http"),
        ("//example.com/a", "only http"),
        ("http:///a", "only http"),
        ("http://user@example.com/", "user name"),
        ("http://user:word@example.com/", "user name"),
        ("http://example.com:22/", "port 22"),
        ("http://example.com:99999/", "plain URL"),
        ("http://example.com/\r\nHost: other", "plain URL"),
        ("http://example.com/a b", "only http"),
        ("http://exämple.com/", "plain URL"),
        ("http://[::1/", "plain URL"),
        ("http://example.com/" + "a" * 5000, "plain URL"),
    ],
)
def test_what_is_no_plain_address_is_refused_before_anything_is_asked(url: str, reason: str):
    def never(host: str, port: int) -> list[str]:
        raise AssertionError("it was resolved")

    with pytest.raises(ApiError, match=reason):
        Fetch(1000, 5, resolve=never)(url)


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    fetch = Fetch(1000, 5, resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(ApiError, match="not on the public internet"):
        fetch("http://example.com/")


def test_a_name_is_resolved_once_and_that_address_is_asked(web: str):
    """A name that answers differently the second time (DNS rebinding) gains nothing."""
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    port = int(web.rpartition(":")[2])
    fetch = Fetch(1000, 5, allowed=lambda a: a == "127.0.0.1", resolve=rebinding, ports=None)
    assert fetch(f"http://images.example:{port}/hello?x=1") == b"/hello?x=1 images.example"
    assert asked == ["images.example"]


class Web(BaseHTTPRequestHandler):
    dripped_to_the_end = threading.Event()

    def do_GET(self) -> None:
        name, _, argument = self.path.lstrip("/").partition("/")
        match name:
            case "to":
                self.send_response(302)
                self.send_header("Location", f"http://{argument}")
                self.end_headers()
            case "loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                self.end_headers()
            case "large":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"a" * 5000)
            case "missing":
                self.send_error(404)
            case "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(200):
                    self.wfile.write(b"a")
                    time.sleep(0.05)
                self.dripped_to_the_end.set()
            case _:
                host = (self.headers["Host"] or "").partition(":")[0]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(f"{self.path} {host}".encode())

    def log_message(self, *_) -> None: ...


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def open_fetch(seconds: float = 5) -> Fetch:
    """As if 127.0.0.1 alone were the public internet."""
    return Fetch(1000, seconds, allowed=lambda a: a == "127.0.0.1", ports=None)


def test_a_redirect_to_a_public_address_is_followed(web: str):
    assert open_fetch()(f"http://{web}/to/{web}/there") == b"/there 127.0.0.1"


@pytest.mark.parametrize("target", ["127.0.0.2", "10.0.0.1", "169.254.169.254", "[::1]", "0.0.0.0"])
def test_a_redirect_to_a_private_address_is_refused(web: str, target: str):
    with pytest.raises(ApiError, match="not on the public internet"):
        open_fetch()(f"http://{web}/to/{target}/")


def test_redirects_end(web: str):
    with pytest.raises(ApiError, match=f"more than {MAX_REDIRECTS} redirects"):
        open_fetch()(f"http://{web}/loop")


def test_a_large_answer_is_refused(web: str):
    with pytest.raises(ApiError, match="larger than 1,000 bytes"):
        open_fetch()(f"http://{web}/large")


def test_other_answers_than_success_are_refused(web: str):
    with pytest.raises(ApiError, match="status 404"):
        open_fetch()(f"http://{web}/missing")


def test_an_answer_that_drips_ends_at_the_deadline(web: str):
    try:
        content = open_fetch(0.5)(f"http://{web}/drip")
    except ApiError:
        content = b""
    assert not Web.dripped_to_the_end.is_set()
    assert len(content) < 200


@pytest.mark.timeout(30)
def test_an_answer_that_never_begins_ends_at_the_deadline():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ApiError, match="could not be fetched"),
    ):
        open_fetch(0.5)(f"http://127.0.0.1:{silent.getsockname()[1]}/")


def test_the_resolver_gives_each_address_once():
    assert resolve("127.0.0.1", 80) == ["127.0.0.1"]
