"""Malformed and oversized requests to the real command, as bytes on sockets: refused, in little memory, silently."""

import contextlib
import itertools
import json
import re
import socket
import time
from pathlib import Path

import pytest
from served_page import image_file, request, running, write_checkpoint

GROWTH = 64 << 10  # KiB
MIB = 1 << 20
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /look HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"\r\n\r\n"


def peak_memory(process):
    """Return the largest memory that a process has had, in KiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of one process for all requests, which has printed nothing and not grown at the end."""
    with running(write_checkpoint(tmp_path_factory.mktemp("served"))) as (address, process):
        assert request(address, "POST", "/look", image_file())[0] == 200
        yield address, process, peak_memory(process)
        process.terminate()
        out, err = process.communicate(timeout=30)
        assert out.removeprefix("Press Ctrl-C to stop.\n") == ""
        warning, error = err.splitlines()  # the images have other proportions than the network's
        assert warning.startswith("segdeconv: warning: dataset.size: images are resized")
        assert error == "segdeconv: error: stopped by SIGTERM - run the same command again"
        assert process.returncode == 143


def exchange(address, *pieces, half_close=False):
    """Send bytes until the server stops reading, and return all that it sends until it closes the connection."""
    host, port = address.split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=8) as client, contextlib.suppress(ConnectionError):
        try:
            for piece in pieces:
                client.sendall(piece)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        finally:
            while data := client.recv(1 << 16):
                received += data
    return received


def statuses(received):
    return [int(status) for status in re.findall(rb"^HTTP/1.1 (\d+) ", received, re.MULTILINE)]


def assert_refused(served, *pieces, half_close=False, codes=range(400, 500)):
    """Require a refusal or a closed connection, little memory, and an answer to the next request."""
    address, process, before = served
    received = exchange(address, *pieces, half_close=half_close)
    assert not received or (len(statuses(received)) == 1 and statuses(received)[0] in codes), received[:2000]
    assert not received or b"X-Content-Type-Options: nosniff" in received or b"x-content-type-options" in received
    assert b"Traceback" not in received
    assert peak_memory(process) - before < GROWTH
    assert request(address, "GET", "/network")[0] == 200


@pytest.mark.parametrize("zeros", range(1, 33))
def test_leading_zeros_of_a_length_are_refused(served, zeros):
    for length in (b"0" * zeros + b"9" * 12, b"0" * zeros + b"5", (b"0" * zeros).ljust(32, b"9")):
        assert_refused(served, POST + b"Content-Length: " + length + END + b"image")


@pytest.mark.parametrize(
    "length",
    [b"9" * 20, b"9" * 21, b"9" * 5000, b"1" + b"0" * 4999, b"0" * 5000, b"+5", b"-5", b"--5", b"5 5", b"5\t5", b"0x5",
     b"5e3", b"5.0", b"1_0", b"", b" ", b"5,6", b"5, 5", b"5;5", b"NaN", "\uff15".encode(), "\u00b2".encode(),
     "\u0665".encode(), b"33554433", b"4294967296", b"18446744073709551621", b"5\r\nContent-Length: 6",
     b"5\r\nContent-Length: 5", b"5\r\n 6", b"5\nContent-Length: 6", b"5\r\nTransfer-Encoding: chunked",
     b"5\r\nTransfer-Encoding: gzip", b"5\x00", b"\x0b5", b"5\x0c"],
)  # fmt: skip
def test_unusual_lengths_are_refused(served, length):
    assert_refused(served, POST + b"Content-Length: " + length + END + b"image", half_close=True)


@pytest.mark.parametrize(
    "encoding",
    [b"chunked", b"CHUNKED", b"gzip", b"gzip, chunked", b"chunked, identity", b"\x0bchunked", b"identity", b"",
     b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nContent-Length: 99999999999", b"x\r\n chunked"],
)  # fmt: skip
def test_transfer_encodings_are_refused(served, encoding):
    for body in (b"5\r\nimage\r\n0\r\n\r\n", b""):
        assert_refused(served, POST + b"Transfer-Encoding: " + encoding + END + body, half_close=True)


@pytest.mark.parametrize(
    "chunk",
    [b"f" * 16, b"f" * 20, b"f" * 21, b"f" * 5000, b"0" * 5000 + b"5", b"-5", b"+5", b"0x5", b"5 5", b"", b"g",
     b"5;" + b"a" * MIB, b"5\x00"],
)  # fmt: skip
def test_unusual_chunks_are_refused(served, chunk):
    assert_refused(served, CHUNKED + chunk + b"\r\nimage\r\n0\r\n\r\n", half_close=True)


def test_bodies_without_end_are_refused(served):
    assert_refused(served, CHUNKED, b"fffffff0\r\n", *itertools.repeat(bytes(MIB), 200))
    assert_refused(served, CHUNKED, *itertools.repeat(b"1\r\na\r\n" * 100_000, 100))
    assert_refused(served, CHUNKED, b"0\r\n", *itertools.repeat(b"a: b\r\n" * 100_000, 100))
    assert_refused(served, POST + b"Content-Length: 33554433" + END, *itertools.repeat(bytes(MIB), 200))
    assert statuses(exchange(served[0], GET + b"Content-Length: 18446744073709551615" + END)) == [200]
    exchange(served[0], GET + b"Content-Length: 1048576000" + END, *itertools.repeat(bytes(MIB), 1000))
    assert_refused(
        served, b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n"
    )


@pytest.mark.parametrize(
    "header",
    [b"a" * MIB + b": b", b"a: " + b"b" * MIB, b"\r\n".join(b"a%d: b" % index for index in range(10_000)),
     b"\r\n".join([b"a:"] * 101), b"a: " + b"b" * 20_000, b"a: b\r\n" + b" c\r\n" * 10_000 + b" d", b"a: b\x00c",
     b"a\x00: b", b"a\nb: c\n\x00", b"a: b\n\nGET", b": b", b"a b: c", b"a : b", b"no colon", b"\x80: b",
     b"Host: localhost", b"Cookie: " + b"a=b; " * 50_000],
    ids=lambda header: repr(header[:24]),
)  # fmt: skip
def test_unusual_headers_are_refused(served, header):
    if header == b"a: b\n\nGET":  # ends the headers: the rest belongs to another request, which is not answered
        assert statuses(exchange(served[0], GET + header + END)) == [200]
    else:
        assert_refused(served, GET + header + END, half_close=True)


def test_headers_without_end_are_refused(served):
    for start, piece in ((GET + b"a: ", b"b" * 10_000), (GET, b"a: b\r\n" * 1000), (b"", b"G" * 10_000), (b"", b"\r")):
        assert_refused(served, start, *itertools.repeat(piece, 2000), half_close=True)


@pytest.mark.parametrize(
    "line",
    [b"GET /", b"GET / HTTP/0.9", b"GET / HTTP/1", b"GET / HTTP/11.1", b"GET / http/1.1", b"GET  / HTTP/1.1", b"GET",
     b"", b" GET / HTTP/1.1", b"GET /\x00 HTTP/1.1", b"GET /\xff HTTP/1.1", b"GET / HTTP/1.1 x", b"/ GET HTTP/1.1",
     b"GET http://localhost/page.js HTTP/1.1", b"GET http://evil.example/ HTTP/1.1", b"GET //page.js HTTP/1.1",
     b"GET * HTTP/1.1", b"GET localhost:80 HTTP/1.1", b"GET /" + b"a" * MIB + b" HTTP/1.1",
     b"GET /pixel?" + b"a=1&" * 3000 + b" HTTP/1.1", b"GET /pixel?picture=" + b"9" * 5000 + b"&y=0&x=0 HTTP/1.1",
     b"GET /network/ HTTP/1.1", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
    ids=lambda line: repr(line[:32]),
)  # fmt: skip
def test_unusual_request_lines_are_refused(served, line):
    assert_refused(served, line + b"\r\nHost: localhost" + END, half_close=True, codes=(*range(400, 500), 501, 505))


def test_other_protocols_and_methods_are_refused(served):
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64)
    assert_refused(served, preface, codes=(400, 505))
    assert_refused(served, b"GET / HTTP/2.0\r\nHost: localhost" + END, codes=(505,))
    for method in (b"PRI", b"CONNECT", b"get", b"A" * 10_000):
        assert_refused(served, method + b" / HTTP/1.1\r\nHost: localhost" + END, codes=(501,))
    upgrade = b"Connection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13"
    for name in (b"websocket", b"h2c"):
        assert statuses(exchange(served[0], GET + upgrade % name + END + bytes(100))) == [200]


def test_a_connection_answers_one_request(served):
    for first in (GET + b"\r\n", GET + b"Connection: keep-alive\r\n\r\n", b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"):
        received = exchange(served[0], (first + GET + b"\r\n") * 50)
        assert statuses(received) in ([], [200])  # unread requests may reset the connection
    smuggled = POST + b"Content-Length: 5" + END + b"image" + GET + b"\r\n"
    assert_refused(served, smuggled, codes=(422,))


def test_half_closed_clients_are_answered_if_their_request_is_complete(served):
    assert statuses(exchange(served[0], GET + b"\r\n", half_close=True)) == [200]
    image = image_file()
    received = exchange(served[0], POST + b"Content-Length: %d" % len(image) + END + image, half_close=True)
    assert statuses(received) == [200]
    for cut in (b"", GET, POST + b"Content-Length: 99" + END + b"image"):
        assert_refused(served, cut, half_close=True)


def test_clients_that_disconnect_are_forgotten(served):
    address = served[0]
    image = image_file()
    for sent in (
        b"",
        GET,
        GET + b"\r\n",
        POST + b"Content-Length: 99" + END,
        POST + b"Content-Length: %d" % len(image) + END + image,
    ):
        for _ in range(3):
            with socket.create_connection(address.split(":"), timeout=5) as client:
                client.sendall(sent)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
    deadline = time.monotonic() + 10
    while (result := request(address, "POST", "/look", image))[0] == 503 and time.monotonic() < deadline:
        assert json.loads(result[2])["error"] == "too many images are waiting - try again soon"
    assert result[0] == 200
