"""rewards/serve.py and rewards/remote.py against each other, against hostile clients and against hostile servers."""

import contextlib
import gc
import http.client
import io
import json
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import rewards
from data import shapes
from rewards import remote, serve

NAN = math.nan


def picture(seed, height=24, width=20):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reward(needs, function, strict=None):
    """A reward from a function of one item, {role: value, prompt, metadata} -> float."""

    def form(of_item):
        def score(samples, prompts, metadata):
            assert set(samples) == set(needs)
            items = [dict(zip(samples, row)) for row in zip(*samples.values())]
            items = [item | {"prompt": p, "metadata": m} for item, p, m in zip(items, prompts, metadata, strict=True)]
            return torch.tensor([of_item(item) for item in items], dtype=torch.float32)

        return score

    score = form(function)
    score.needs, score.strict = needs, form(strict) if strict else None
    return score


def fingerprint(item):
    """A number that changes with every byte of an item, and with which role it stands in."""
    data = [item["prompt"], json.dumps(item["metadata"])]
    data += [f"{r}{np.shape(item[r])}{np.asarray(item[r]).tolist()}" for r in sorted(item) if r in ROLES]
    return zlib.crc32("\0".join(data).encode("utf-8", "surrogatepass")) / 2**20


ROLES = ("image", "text", "source", "recon")


def fingerprints(needs=("image",)):
    return reward(needs, fingerprint, strict=lambda item: float(int(fingerprint(item)) % 2))


def batch(count, seed=0, roles=("image",)):
    rng = random.Random(seed)
    samples = {}
    for r, role in enumerate(roles):
        samples[role] = [picture((seed, r, i), rng.randint(1, 40), rng.randint(1, 40)) for i in range(count)]
        if role == "text":
            samples[role] = [f"text {seed} {i}" for i in range(count)]
    return samples, [f"prompt {i}" for i in range(count)], [{"seed": seed, "i": i} for i in range(count)]


def equal(got, expected):
    return got.dtype == torch.float32 and torch.equal(got.nan_to_num(-1e9), expected.nan_to_num(-1e9))


def body(header, *files):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(4, "little") + header + b"".join(files)


def valid_header(file, **changes):
    item = {"prompt": "p", "metadata": {}, "image": [0, len(file)]}
    return dict(protocol=1, reward="fingerprint", strict=False, timeout=20, items=[item]) | changes


def post(server, data, headers=None, method="POST", path="/score"):
    """(status, headers, answer) of a request as http.client sends it, which remote.py has no part in."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, path, data, {"Content-Type": "application/octet-stream"} | (headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def raw(server, data, half_close=True, timeout=30):
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
    return answer


def head(length, path="/score", extra=""):
    lines = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Type: application/octet-stream\r\n{extra}"
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "has not happened"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)


@pytest.fixture(scope="module")
def server():
    with serve.Server({"fingerprint": fingerprints()}, read_timeout=20) as server:
        yield server
        idle(server)


def idle(server):
    """Nothing is left of any request."""
    wait_for(lambda: not (server.items or server.memory or server.connections or server.jobs))


class Gate:
    """A reward that waits until it is let go; `calls` holds the prompts of each call."""

    def __init__(self):
        self.open, self.calls, self.strict, self.needs = threading.Event(), [], None, ("image",)
        self.inner = fingerprints()

    def __call__(self, samples, prompts, metadata):
        self.calls.append(list(prompts))
        assert self.open.wait(60)
        return self.inner(samples, prompts, metadata)


class Background:
    """function() in a thread; `result()` returns or raises what it did."""

    def __init__(self, function):
        self.value, self.error = None, None
        self.thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self.thread.start()

    def _run(self, function):
        try:
            self.value = function()
        except BaseException as error:
            self.error = error

    def result(self, timeout=60):
        self.thread.join(timeout)
        assert not self.thread.is_alive(), "still running"
        if self.error:
            raise self.error
        return self.value


# ----------------------------------------------------------------------------------------------------------------------
# The same callable, elsewhere


def test_jpeg_and_shapes_equal_the_in_process_rewards():
    local = {name: rewards.load(name) for name in ("jpeg", "jpeg_incompressibility", "shapes")}
    metadata = [p for p in shapes.held_out_prompts() if p["tag"] in ("colors", "position")][:12]
    images = [shapes.draw(m, np.random.default_rng(i)) for i, m in enumerate(metadata)]
    images[3] = picture(3, 32, 32)
    args = {"image": images}, [m["prompt"] for m in metadata], metadata
    with serve.Server(local) as server:
        for name, score in local.items():
            there = remote.load(f"{server.url}/{name}")
            assert tuple(there.needs) == tuple(score.needs) and (there.strict is None) == (score.strict is None)
            assert equal(there(*args), score(*args))
            assert score.strict is None or equal(there.strict(*args), score.strict(*args))
        with pytest.raises(ValueError, match="shapes reward, prompt None: metadata 'include'"):  # its own error
            remote.load(f"{server.url}/shapes")({"image": images[:1]}, ["a"], [{}])


@pytest.mark.parametrize(
    "needs, merge",
    [
        (("image",), False),
        (("text",), True),
        (("source", "image"), False),
        (("recon", "source", "text", "image"), False),
        (("recon", "source", "text", "image"), True),
    ],
)
def test_every_role_arrives_as_it_was(needs, merge):
    local = fingerprints(needs)
    with serve.Server({"f": local}, merge=merge) as server:
        there = remote.load(f"{server.url}/f")
        assert there.needs == needs
        for count in (0, 1, 7, 70):  # more than fit into one request
            args = batch(count, count, ROLES)  # with roles that it does not need
            expected = local({role: args[0][role] for role in needs}, *args[1:])
            assert equal(there(*args), expected) and there(*args).shape == (count,)
            assert equal(there.strict(*args), local.strict({role: args[0][role] for role in needs}, *args[1:]))


def test_prompts_and_metadata_survive():
    prompts = ["", "日本 🙂", 'a\0b\r\n\t"\\', "\ud800 lone", "x" * 20000, "null"]
    metadata = [{}, {"ключ": ["é", None, True]}, {"n": 1e-300, "i": 2**70}, {"": {"deep": [[[]]]}}, {"t": "\udfff"}]
    metadata += [{"inf": [math.inf, -math.inf, NAN], "zero": -0.0}]
    local = reward(
        ("image",), lambda item: zlib.crc32(repr((item["prompt"], item["metadata"])).encode("utf-8", "surrogatepass"))
    )
    with serve.Server({"f": local}) as server:
        args = {"image": [picture(i) for i in range(6)]}, prompts, metadata
        assert equal(remote.load(f"{server.url}/f")(*args), local(*args)) and len(set(local(*args).tolist())) == 6


def test_nan_stays_nan_and_floats_keep_their_bits():
    values = [0.0, -0.0, NAN, 1 / 3, 1e-45, 3.4e38, -16777217.0, NAN, math.inf, -math.inf]
    local = reward(("image",), lambda item: values[item["metadata"]["i"]])
    args = batch(10)
    with serve.Server({"f": local}) as server:
        with pytest.warns(UserWarning, match="item 8 of a request failed.*score is inf"):
            got = remote.load(f"{server.url}/f")(*args)
        status, _, answer = post(server, sent(["image"], args, "f"))
    expected = torch.where(local(*args).isinf(), NAN, local(*args))  # no reward is infinite
    assert got.view(torch.int32)[[0, 1, 3, 4, 5, 6]].tolist() == expected.view(torch.int32)[[0, 1, 3, 4, 5, 6]].tolist()
    assert got.isnan().tolist() == expected.isnan().tolist() and got.isnan().sum() == 4
    assert (
        status == 200
        and answer["scores"][2] is None
        and answer["errors"] == {"8": "score is inf", "9": "score is -inf"}
    )


def sent(needs, args, name):
    """The body of a request, written out."""
    items, files, end = [], [], 0
    for i in range(len(args[1])):
        items.append({"prompt": args[1][i], "metadata": args[2][i]})
        for role in needs:
            file = io.BytesIO()
            Image.fromarray(args[0][role][i]).save(file, "PNG")
            files.append(file.getvalue())
            items[-1][role] = [end, len(files[-1])]
            end += len(files[-1])
    return body(dict(protocol=1, reward=name, strict=False, timeout=20, items=items), *files)


def test_shared_pictures_are_sent_once(server):
    client = remote.load(f"{server.url}/fingerprint")
    noise = picture(0, 64, 64)
    same, different = [noise] * 8, [picture(i, 64, 64) for i in range(8)]
    lengths = []
    for images in (same, different):
        seen, ask = [], remote.Replica.ask
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                remote.Replica, "ask", lambda r, m, p, b=None, *a: seen.append(len(b or b"")) or ask(r, m, p, b, *a)
            )
            args = {"image": images}, ["p"] * 8, [{}] * 8
            assert equal(client(*args), fingerprints()(*args))
        lengths.append(sum(seen))
    assert lengths[0] < lengths[1] / 4


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(image=[picture(0), None]), "sample 1: 'image': expected a uint8 picture .*object"),
        (dict(image=[picture(0) / 255.0, picture(1)]), "sample 0: 'image'.*float64"),
        (dict(image=[picture(0), picture(1)[..., 0]]), r"sample 1: 'image'.*\[24, 20\]"),
        (dict(image=[picture(0), picture(1)[:0]]), r"sample 1: 'image'.*\[0, 20, 3\]"),
        (dict(image=[picture(0)]), "'image': 1 for 2 prompts"),
        (dict(text=["a", "b"]), "needs 'image': no for 2"),
        (dict(prompts=["a", None]), "sample 1: prompt: expected str, got NoneType"),
        (dict(metadata=[{}, None]), "sample 1: metadata: expected dict"),
        (dict(metadata=[{}]), "1 metadata for 2 prompts"),
        (dict(metadata=[{}, {"a": np.float32(1)}]), "sample 1: metadata cannot be sent as JSON"),
        (dict(metadata=[{}, {"a": b"b"}]), "sample 1: metadata cannot be sent as JSON"),
    ],
)
def test_samples_that_cannot_be_sent_are_named(server, change, why):
    prompts, metadata = change.pop("prompts", ["a", "b"]), change.pop("metadata", [{}, {}])
    samples = change or {"image": [picture(0), picture(1)]}
    with pytest.raises(ValueError, match=why):
        remote.load(f"{server.url}/fingerprint")(samples, prompts, metadata)


def test_calls_of_one_client_from_many_threads(server):
    client, local = remote.load(f"{server.url}/fingerprint"), fingerprints()
    calls = [(args := batch(3, i), Background(lambda args=args: client(*args))) for i in range(24)]
    assert all(equal(call.result(), local(*args)) for args, call in calls)


# ----------------------------------------------------------------------------------------------------------------------
# Starting


@pytest.mark.parametrize(
    "url",
    [
        *("http://host:1", "http://host:1/", "http:///x", "ftp://host:1/x", "http://host:1,/x", "http://h:port/x"),
        *("http://u:p@host:1/x", "http://h:1/x?y=1", "http://h:1/x#y", "http://h:1,h:1/x", "http://h:99999/x"),
        *("http://h 1/x", "http://h:1/x\r\nEvil: 1", "http://[::1/x", "http://hé/x"),
    ],
)
def test_malformed_urls_are_refused(url):
    with pytest.raises(ValueError, match="expected http://host:port/name"):
        remote.load(url, patience=0.0)


def test_start_without_server_says_how_to_start_one():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and nobody listens
        port = unused.getsockname()[1]
        with pytest.raises(RuntimeError) as error:
            remote.load(f"http://127.0.0.1:{port}/ocr", patience=0.2)
    assert "Connection refused" in str(error.value) and f"--reward ocr --port {port}" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_start_with_a_wrong_name_lists_what_is_served(server):
    with pytest.raises(RuntimeError, match="does not serve 'ocr', it serves fingerprint"):
        remote.load(f"{server.url}/ocr")


def test_start_waits_while_the_server_loads():
    with serve.Server(None) as server:
        assert post(server, None, method="GET", path="/health")[0::2] == (503, {"status": "loading"})
        assert post(server, b"")[0] == 503
        loading = Background(lambda: remote.load(f"{server.url}/f", patience=20))
        time.sleep(0.3)
        assert loading.thread.is_alive()
        server.set_scores({"f": fingerprints()})
        args = batch(2)
        assert equal(loading.result()(*args), fingerprints()(*args))
        assert post(server, None, method="GET", path="/health")[0::2] == (200, {"status": "ok"})


def test_replicas_that_differ_are_refused():
    with serve.Server({"f": fingerprints()}) as one, serve.Server({"f": fingerprints(("source",))}) as other:
        with pytest.raises(RuntimeError, match="the replicas .* differ"):
            remote.load(f"{one.url},127.0.0.1:{other.port}/f")


def test_a_prefix_of_a_proxy_is_kept(server):
    with pytest.raises(RuntimeError, match="no such page"):
        remote.load(f"{server.url}/v1/fingerprint", patience=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Token and address


def test_token_is_needed_and_compared_whole(monkeypatch):
    with serve.Server({"fingerprint": fingerprints()}, token="s3cret") as server:
        data = sent(["image"], batch(1), "fingerprint")
        for given in (
            {},
            *({"Authorization": a} for a in ("Bearer s3cre", "Bearer s3crett", "s3cret", "Bearer ", "Bearer é")),
        ):
            assert post(server, data, given)[0] == 401
            assert post(server, None, given, "GET", "/info")[0] == 401
        assert post(server, data, {"Authorization": "Bearer s3cret"})[0] == 200
        assert post(server, None, method="GET", path="/health")[0] == 200  # for load balancers
        for token in ("", "wrong"):
            monkeypatch.setenv("REWARD_TOKEN", token)
            with pytest.raises(RuntimeError, match="401|wrong or no token: REWARD_TOKEN must be the server's"):
                remote.load(f"{server.url}/fingerprint")
        monkeypatch.setenv("REWARD_TOKEN", "s3cret\n")  # as `echo` writes it to a file
        args = batch(3)
        assert equal(remote.load(f"{server.url}/fingerprint")(*args), fingerprints()(*args))
        idle(server)
        assert server.scored == 4  # nothing of what had no token
    monkeypatch.setenv("REWARD_TOKEN", "a\r\nEvil: 1")
    with pytest.raises(ValueError, match="REWARD_TOKEN"):
        remote.load("http://127.0.0.1:1/x")


def test_other_addresses_need_a_token():
    for host in ("0.0.0.0", "", "::"):
        with pytest.raises(ValueError, match="needs a token: set REWARD_TOKEN"):
            serve.Server({}, host=host)
    serve.Server({}, host="0.0.0.0", token="x").server_close()
    with pytest.raises(ValueError, match="printable"):
        serve.Server({}, token="a b")


def test_roles_that_cannot_be_sent_are_refused_at_start():
    with pytest.raises(ValueError, match="reward 'f' needs 'video'"):
        serve.Server({"f": fingerprints(("video",))})


# ----------------------------------------------------------------------------------------------------------------------
# Malformed and hostile requests


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width, height, rows, depth=8, color=2, before=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


PNG = remote.png(picture(0, 5, 7))


@pytest.mark.parametrize(
    "data, status, why",
    [
        (b"", 400, "header of 0 bytes|not JSON|JSON"),
        (b"\xff\xff\xff\xff{}", 400, "header of 4294967295 bytes"),
        (body(b"{"), 400, "not JSON"),
        (body(b"\xff\xfe"), 400, "not JSON"),
        (body(b"[" * 100_000), 400, "not JSON"),
        (body(b"9" * 100_000), 400, "not JSON"),
        (body(b"null"), 400, "protocol None"),
        (body(valid_header(PNG, protocol=2), PNG), 400, "protocol 2, this server speaks 1"),
        (body(valid_header(PNG, reward="x"), PNG), 404, "no reward 'x' here, there is fingerprint"),
        (body(valid_header(PNG, reward=["x"]), PNG), 404, "no reward"),
        (body(valid_header(PNG, strict=1), PNG), 400, "strict"),
        (body(valid_header(PNG, timeout=-1), PNG), 400, "timeout"),
        (body(valid_header(PNG, timeout=NAN), PNG), 400, "timeout"),
        (body(valid_header(PNG, timeout="1"), PNG), 400, "timeout"),
        (body(valid_header(PNG, items={}), PNG), 400, "items"),
        (body(valid_header(PNG, items=[[]]), PNG), 400, "item 0: expected an object"),
        (body(valid_header(PNG, items=[{}]), PNG), 400, "item 0: expected a prompt"),
        (body(valid_header(PNG, items=[{"prompt": "", "metadata": []}])), 400, "item 0: expected a prompt"),
        (body(valid_header(PNG, items=[{"prompt": "", "metadata": {}}])), 400, "'image': expected .offset"),
        (body(valid_header(PNG)), 400, "'image': expected .offset"),  # outside of the body
        (body(valid_header(PNG, items=[{}] * 1025)), 413, "1025 items, at most 1024"),
        *(
            (
                body(valid_header(PNG, items=[{"prompt": "", "metadata": {}, "image": where}]), PNG),
                400,
                "expected .offset",
            )
            for where in (
                [-8, 8],
                [0, 1e9],
                [0, 2**63],
                [True, 8],
                "/etc/passwd",
                "file:///etc/passwd",
                [0],
                {"path": "x"},
            )
        ),
    ],
)
def test_malformed_requests_are_named(server, data, status, why):
    got, _, answer = post(server, data)
    assert got == status and list(answer) == ["error"]
    assert re.search(why, answer["error"]), answer


@pytest.mark.parametrize(
    "request_head, status",
    [
        (b"POST /score HTTP/1.1\r\nHost: h\r\n\r\n", 411),
        (head("1\r\nContent-Length: 2"), 411),
        (head("1", extra="Transfer-Encoding: chunked\r\n"), 411),
        (head("-1"), 400),
        (head("0x10"), 400),
        (head("１"), 400),
        (head("9" * 30), 400),
        (head(2**28 + 1), 413),
        (head("10").replace(b"octet-stream", b"json"), 415),
        (head("10", path="/../score"), 404),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"PUT /score HTTP/1.1\r\n\r\n", 501),
        (b"POST /score HTTP/9.9\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_malformed_heads_are_refused(server, request_head, status):
    answer = raw(server, request_head, half_close=False)
    assert f"HTTP/1.1 {status} ".encode() in answer[:20] or (
        status in (400, 505) and f"Error code: {status}".encode() in answer
    )


def test_truncated_bodies_are_refused(server):
    data = sent(["image"], batch(2), "fingerprint")
    for keep in (0, 3, 4, 50, len(data) - 1):
        assert b" 400 " in raw(server, head(len(data)) + data[:keep])[:20]
    for keep in (3, 4, 50, len(data) - 1):  # a shorter body that says so
        assert b" 400 " in raw(server, head(keep) + data[:keep])[:20]
    assert b" 200 " in raw(server, head(len(data)) + data)[:20]


def test_the_answer_to_an_oversized_body_arrives_although_it_is_not_read():
    with serve.Server({"fingerprint": fingerprints()}, max_body=100_000) as server:
        status, _, answer = post(server, bytes(20_000_000))
        assert status == 413 and "at most 100000 (--max-body-mb)" in answer["error"]
        assert (
            b" 413 " in raw(server, head(20_000_000) + bytes(20_000_000), half_close=False)[:20]
        )  # all of it was sent
        # The client of the trainer cuts its calls so that they fit.
        client, args = remote.load(f"{server.url}/fingerprint"), batch(3, roles=("image",))
        args[0]["image"][:] = [picture(i, 160, 160) for i in range(3)]  # 77 kB each
        assert equal(client(*args), fingerprints()(*args)) and server.scored == 3
        args[0]["image"][1] = picture(9, 400, 400)
        with pytest.raises(ValueError, match="body of .* bytes, at most 100000"):
            client(*args)


BROKEN = {
    "text": b"not a picture, but long enough to be one",
    "empty": b"",
    "cut": PNG[:-30],
    "flipped": PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
    "gif": b"GIF89a" + bytes(50),
    "grey": png_file(2, 2, b"\0ab\0ab", color=0),
    "16 bit": png_file(1, 1, b"\0abcdef", depth=16),
    "alpha": png_file(1, 1, b"\0abcd", color=6),
    "no width": png_file(0, 5, b""),
    "two headers": png_file(2, 1, bytes(30), before=chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 3, 8, 2, 0, 0, 0))),
    "text bomb": png_file(1, 1, b"\0abc", before=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 9))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_null_and_spares_its_neighbours(server, kind):
    good, bad = remote.png(picture(1)), BROKEN[kind]
    places = [[0, len(good)], [len(good), len(bad)], [0, len(good)]]
    items = [{"prompt": "p", "metadata": {}, "image": place} for place in places]
    status, _, answer = post(server, body(valid_header(good, items=items), good, bad))
    expected = fingerprint({"image": picture(1), "prompt": "p", "metadata": {}})
    assert status == 200 and answer["scores"] == [np.float32(expected), None, np.float32(expected)]
    assert list(answer["errors"]) == ["1"] and answer["errors"]["1"].startswith("image: ")


def memory_peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024


def test_decompression_bombs_take_no_memory(server):
    bomb = png_file(30_000, 30_000, bytes(50_000_000))  # 2.7 GB of pixels, of which some are there
    lying = png_file(10, 10, bytes(300_000_000))  # more data than its header says
    before = memory_peak()
    status, _, answer = post(server, body(valid_header(bomb), bomb))
    assert status == 413 and "30000 x 30000 pixels, at most 16.7772 million (--max-megapixels)" in answer["error"]
    status, _, answer = post(server, body(valid_header(lying), lying))
    assert status == 200 and len(answer["scores"]) == 1
    # 1000 references to one picture of 16 million pixels: 50 GB.
    large = png_file(4000, 4000, bytes(4000 * 12001))
    items = [{"prompt": "p", "metadata": {}, "image": [0, len(large)]}] * 1000
    status, _, answer = post(server, body(valid_header(large, items=items), large))
    assert status == 413 and "send fewer pictures" in answer["error"]
    assert memory_peak() - before < 100


def test_headers_over_their_limit_are_refused(server):
    data = body(b"[" + b"[]," * 6_000_000 + b"[]]")  # would be 1 GB of lists
    before = memory_peak()
    status, _, answer = post(server, data)
    assert status == 413 and "header of" in answer["error"] and memory_peak() - before < 100


def test_slow_clients_are_cut_off_and_delay_nobody(monkeypatch):
    monkeypatch.setattr(serve, "LINGER", 0.3)
    with serve.Server({"fingerprint": fingerprints()}, read_timeout=0.7) as server:
        data = sent(["image"], batch(1), "fingerprint")
        starts = [b"", b"POST /sc", head(len(data))[:-1], head(len(data)), head(len(data)) + data[:20]]
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        for i, connection in enumerate(slow):
            connection.sendall(starts[i % 5])
        start = time.monotonic()
        client, args = remote.load(f"{server.url}/fingerprint"), batch(2)
        assert equal(client(*args), fingerprints()(*args)) and time.monotonic() - start < 1
        # A byte every 0.1 s keeps no connection open either.
        drip = Background(lambda: dribble(slow[4], data[20:]))
        wait_for(lambda: server.connections == 0, 6)
        assert drip.result() < len(data) - 20 and server.memory == 0
        for connection in slow:
            connection.close()


def dribble(connection, data):
    for i in range(len(data)):
        try:
            connection.send(data[i : i + 1])
        except OSError:
            return i
        time.sleep(0.1)
    return len(data)


def test_more_connections_than_allowed_are_told_so():
    with serve.Server({"fingerprint": fingerprints()}, read_timeout=1.0, max_connections=4) as server:
        holding = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        wait_for(lambda: server.connections == 4)
        assert b"503" in raw(server, b"", half_close=False)[:20]
        args = batch(2)  # the client waits for its turn
        assert equal(remote.load(f"{server.url}/fingerprint", patience=20)(*args), fingerprints()(*args))
        for connection in holding:
            connection.close()


# ----------------------------------------------------------------------------------------------------------------------
# Fuzzing


def fuzz(server, seed, count):
    """`count` requests that are damaged in their head, header or pictures, and a good one after each 20."""
    rng = random.Random(seed)
    args = batch(3, 1)
    good = sent(["image"], args, "fingerprint")
    expected = fingerprints()(*args).tolist()
    length = 4 + int.from_bytes(good[:4], "little")
    values = [None, True, -1, 0, 1e308, 2**64, "", "x" * 1000, "\ud800", [], {}, [[]], [0, 5], {"a": 1}, NAN, [1, -1]]
    statuses = {}
    for number in range(count):
        kind, data, top = rng.randrange(6), good, None
        if kind == 0:  # bytes anywhere
            data = bytearray(good)
            for _ in range(rng.choice([1, 3, 30])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:  # pictures only
            data = bytearray(good)
            for _ in range(rng.choice([1, 10])):
                data[rng.randrange(length, len(data))] = rng.randrange(256)
        elif kind == 2:  # header: another value somewhere
            header = json.loads(good[4:length])
            place = rng.choice([header, header["items"][0], header["items"][2]])
            place[rng.choice([*place, "new"])] = rng.choice(values)
            data = body(header, good[length:])
        elif kind == 3:  # pieces cut out or doubled
            a, b = sorted(rng.randrange(len(good)) for _ in range(2))
            data = good[:a] + good[b:] if rng.random() < 0.5 else good[:b] + good[a:]
        elif kind == 4:  # head
            top = bytearray(head(len(good)))
            for _ in range(rng.choice([1, 3, 10])):
                top[rng.randrange(len(top))] = rng.randrange(256)
        else:  # nothing but noise
            top, data = rng.randbytes(rng.randrange(200)), b""
        data = bytes(data)
        answer = raw(server, bytes(head(len(data)) if top is None else top) + data)
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
        statuses[status] = statuses.get(status, 0) + 1
        # A request that hangs would run into the timeout of its socket, one that breaks the server is a 500.
        assert status in (0, 100, 200, 400, 404, 411, 413, 414, 415, 422, 431, 501, 505), (seed, number, answer)
        if status == 200 and kind == 1:  # a damaged picture has its own score or none, the others keep theirs
            scores = json.loads(answer.partition(b"\r\n\r\n")[2])["scores"]
            assert sum(s == e for s, e in zip(scores, expected)) >= 1 or None in scores
        if number % 20 == 19:
            assert post(server, good)[2]["scores"] == expected
    return statuses


def check_fuzz(server, capfd, count, threads):
    fuzz(server, 0, 40)  # what is imported and cached on first use
    idle(server)
    gc.collect()
    resident, running, scored = memory_now(), threading.active_count(), server.scored
    runs = [Background(lambda t=t: fuzz(server, t + 1, count // threads)) for t in range(threads)]
    statuses = {}
    for run in runs:
        for status, number in run.result(1200).items():
            statuses[status] = statuses.get(status, 0) + number
    idle(server)
    wait_for(lambda: threading.active_count() <= running)
    gc.collect()
    assert memory_now() - resident < 60
    assert statuses[200] > count / 20 and statuses[400] > count / 10  # both sides of the parser have been seen
    assert server.scored > scored
    assert "Traceback" not in capfd.readouterr().err


def memory_now():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_fuzzed_requests_break_nothing(server, capfd):
    check_fuzz(server, capfd, 400, 2)


@pytest.mark.slow
def test_ten_thousand_fuzzed_requests_break_nothing(server, capfd):
    check_fuzz(server, capfd, 10_000, 4)


# ----------------------------------------------------------------------------------------------------------------------
# The queue, failures, deadlines


def test_a_full_queue_says_503_and_the_client_comes_back():
    gate = Gate()
    with serve.Server({"fingerprint": gate}, max_queue=4) as server:
        args, local = batch(3), fingerprints()
        client = remote.load(f"{server.url}/fingerprint")
        first = Background(lambda: client(*args))
        wait_for(lambda: gate.calls and server.items == 3)
        status, headers, answer = post(server, sent(["image"], batch(2), "fingerprint"))
        assert status == 503 and int(headers["Retry-After"]) >= 1 and answer["error"].startswith("full: 3 items")
        assert post(server, sent(["image"], batch(5), "fingerprint"))[0] == 413  # would never fit
        later = [Background(lambda i=i: client(*batch(2, i))) for i in range(2)]
        time.sleep(0.5)
        assert server.items <= 4 and all(call.thread.is_alive() for call in later)
        gate.open.set()
        assert equal(first.result(), local(*args))
        assert all(equal(call.result(), local(*batch(2, i))) for i, call in enumerate(later))
        # Calls with more items than the queue takes are cut.
        assert equal(client(*batch(7, 5)), local(*batch(7, 5)))


def test_memory_in_work_is_bounded():
    gate = Gate()
    with serve.Server({"fingerprint": gate}, max_memory=300_000) as server:
        client = remote.load(f"{server.url}/fingerprint")
        large = {"image": [picture(0, 200, 200)]}, ["p"], [{}]  # 120 kB as a file and 120 kB decoded
        first = Background(lambda: client(*large))
        wait_for(lambda: gate.calls)
        status, headers, answer = post(server, sent(["image"], large, "fingerprint"))
        assert status == 503 and "Retry-After" in headers and server.memory < 300_000
        gate.open.set()
        assert equal(first.result(), fingerprints()(*large))
        assert equal(client(*large), fingerprints()(*large))


def test_work_that_nobody_waits_for_is_dropped():
    gate = Gate()
    with serve.Server({"fingerprint": gate}) as server:
        client = remote.load(f"{server.url}/fingerprint")
        first = Background(lambda: client(*batch(1)))
        wait_for(lambda: gate.calls)
        args = {"image": [picture(0)]}, ["impatient"], [{}]
        data = sent(["image"], args, "fingerprint").replace(b'"timeout": 20', b'"timeout": .2')
        header = json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")].replace(b": .2", b": 0.2"))
        status, _, answer = post(server, body(header, remote.png(picture(0)), bytes(2000)))
        assert status == 504 and "not scored within 0.2 s" in answer["error"]
        gate.open.set()
        first.result()
        client(*batch(1))
        assert ["impatient"] not in gate.calls


def test_requests_are_merged_only_on_demand():
    for merge in (False, True):
        gate = Gate()
        with serve.Server({"fingerprint": gate}, merge=merge) as server:
            client = remote.load(f"{server.url}/fingerprint")
            calls = [Background(lambda: client(*batch(1)))]
            wait_for(lambda: gate.calls)
            calls += [Background(lambda i=i: client(*batch(2, i))) for i in range(1, 6)]
            wait_for(lambda: len(server.jobs) == 5)
            gate.open.set()
            got = [call.result() for call in calls]
        assert [len(call) for call in gate.calls] == ([1, 10] if merge else [1, 2, 2, 2, 2, 2])
        assert all(equal(got[i], fingerprints()(*batch(2, i))) for i in range(1, 6))


def fail_on(prompts, error):
    def of_item(item):
        if item["prompt"] in prompts:
            raise error
        return fingerprint(item)

    return reward(("image",), of_item)


def test_a_merged_request_fails_alone():
    gate, failing = Gate(), fail_on(["bad"], ValueError("bad item"))
    gate.inner = failing
    with serve.Server({"f": gate}, merge=True) as server:
        client = remote.load(f"{server.url}/f")
        first = Background(lambda: client(*batch(1)))
        wait_for(lambda: gate.calls)
        bad = Background(lambda: client({"image": [picture(0)]}, ["bad"], [{}]))
        good = Background(lambda: client(*batch(2, 1)))
        wait_for(lambda: len(server.jobs) == 2)
        gate.open.set()
        first.result()
        assert equal(good.result(), fingerprints()(*batch(2, 1)))
        with pytest.raises(ValueError, match="bad item"):
            bad.result()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit(3), KeyError("x"), AssertionError()])
def test_a_reward_that_raises_fails_its_call_and_no_other(error, capfd):
    local = fail_on(["bad"], error)
    with serve.Server({"f": local}) as server:
        client = remote.load(f"{server.url}/f")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"all servers failed: 127.0.0.1:.*{type(error).__name__}"):
                client({"image": [picture(0)]}, ["bad"], [{}])
            assert equal(client(*batch(2)), local(*batch(2)))
    assert "Traceback" in capfd.readouterr().err  # the operator sees where


def test_a_reward_with_the_wrong_number_of_scores_is_an_error():
    def score(samples, prompts, metadata):
        return torch.zeros(len(prompts) - 1)

    score.needs, score.strict = ("image",), None
    with serve.Server({"f": score}) as server:
        with pytest.raises(RuntimeError, match="1 scores for 2 items"):
            remote.load(f"{server.url}/f")(*batch(2))


# ----------------------------------------------------------------------------------------------------------------------
# Replicas


def replica(folder, port=0, seconds=0.0):
    """A server in a process of its own, until a signal."""
    inner = fingerprints()

    def score(samples, prompts, metadata):
        (Path(folder) / "busy").touch()
        time.sleep(seconds)
        return inner(samples, prompts, metadata)

    score.needs, score.strict = inner.needs, None
    server = serve.Server({"f": score}, port=port).start()
    (Path(folder) / "port.new").write_text(str(server.port))
    (Path(folder) / "port.new").rename(Path(folder) / "port")
    serve.run(server)


def start(folder, port=0, seconds=0.0):
    folder.mkdir(exist_ok=True)
    (folder / "port").unlink(missing_ok=True)
    (process,) = processes.start(replica, str(folder), port, seconds)
    wait_for((folder / "port").exists, 60)
    return process, int((folder / "port").read_text())


def test_replicas_die_and_come_back_and_no_score_is_lost(tmp_path, capfd):
    (one, port_one), (two, port_two) = start(tmp_path / "1", seconds=0.01), start(tmp_path / "2", seconds=0.01)
    client = remote.load(f"http://127.0.0.1:{port_one},127.0.0.1:{port_two}/f", patience=120)  # pauses grow to 30 s
    local, stop, counts = fingerprints(), threading.Event(), [0, 0, 0]

    def work(w):
        while not stop.is_set():
            args = batch(20, 100 * w + counts[w])  # requests of 10
            assert equal(client(*args), local(*args))
            counts[w] += 1

    def more(number):
        target = [count + number for count in counts]
        wait_for(lambda: any(w.error for w in workers) or all(c >= t for c, t in zip(counts, target)), 120)

    workers = [Background(lambda w=w: work(w)) for w in range(3)]
    try:
        more(2)
        one.kill()
        more(3)
        one, _ = start(tmp_path / "1", port_one, seconds=0.01)
        wait_for((tmp_path / "1/busy").exists)
        (tmp_path / "1/busy").unlink()
        wait_for((tmp_path / "1/busy").exists)  # it is asked again
        two.kill()  # now the other one is the only one
        more(3)
        one.kill()  # and now there is none
        one.join()
        time.sleep(0.3)
        two, _ = start(tmp_path / "2", port_two, seconds=0.01)
        more(2)
    finally:
        stop.set()
        results = [worker.result() for worker in workers]
        for process in (one, two):
            process.kill()
    assert results == [None] * 3
    said = capfd.readouterr().err
    assert f"127.0.0.1:{port_one} failed: " in said and f"127.0.0.1:{port_one} is back" in said


def test_all_replicas_gone_is_a_clear_error(capfd):
    with serve.Server({"f": fingerprints()}) as one, serve.Server({"f": fingerprints()}) as two:
        client = remote.load(f"{one.url},127.0.0.1:{two.port}/f", patience=1.0)
        assert equal(client(*batch(40)), fingerprints()(*batch(40)))
        assert one.scored and two.scored and one.scored + two.scored == 40
    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        client(*batch(40))
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert "\n" not in message and message.startswith("reward 'f': no scores for 1 s from ")
    assert all(f"127.0.0.1:{server.port} (Connection refused)" in message for server in (one, two))


def test_one_replica_is_enough_to_start(capfd):
    with serve.Server({"f": fingerprints()}) as one:
        dead = serve.Server({})
        dead.server_close()
        client = remote.load(f"http://127.0.0.1:{dead.port},127.0.0.1:{one.port}/f")
        assert equal(client(*batch(20)), fingerprints()(*batch(20)))
    assert f"127.0.0.1:{dead.port} failed: Connection refused" in capfd.readouterr().err


def test_sigterm_finishes_what_was_accepted(tmp_path):
    process, port = start(tmp_path, seconds=0.7)
    client, local = remote.load(f"http://127.0.0.1:{port}/f", patience=0.1), fingerprints()
    calls = [Background(lambda i=i: client(*batch(2, i))) for i in range(3)]  # one in work, two in the queue
    address = remote.Replica("http", f"127.0.0.1:{port}", "", "")
    wait_for(lambda: address.ask("GET", "/info")[2]["waiting"] == 6)
    os.kill(process.pid, signal.SIGTERM)
    assert all(equal(call.result(), local(*batch(2, i))) for i, call in enumerate(calls))
    process.join(10)
    assert process.exitcode == 0
    with pytest.raises(RuntimeError, match="no scores for"):
        client(*batch(1))


class Stranger(BaseHTTPRequestHandler):
    """Says that it is a reward server, and then answers with what `server.answers` holds, then correctly."""

    def do_GET(self):
        info = dict(protocol=1, rewards={"f": dict(needs=["text"], strict=False)})
        self.send(200, info | dict(limits=dict(items=100, bytes=10**6, header=10**6)))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.answers:
            self.send(*self.server.answers.pop(0))
        else:
            self.send(200, {"scores": [0.5, 1.5], "errors": {}})

    def send(self, status, answer, cut=0):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + cut))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def stranger():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


TWO = {"text": ["a", "b"]}, ["p", "q"], [{}, {}]


@pytest.mark.parametrize(
    "answer",
    [
        (502, b"<html>bad gateway</html>"),
        (503, {"error": "full"}),
        (504, {}),
        (200, {"scores": [0.5, 1.5], "errors": {}}, 5),  # shorter than announced
        (200, b""),
        (200, b"not json"),
        (200, b"[" * 50_000),
        (200, [0.5, 1.5]),
    ],
)
def test_answers_that_may_get_better_are_asked_for_again(stranger, answer, capfd):
    stranger.answers = [answer]
    client = remote.load(f"http://127.0.0.1:{stranger.server_port}/f", patience=20)
    assert client(*TWO).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    "scores",
    [None, [], [1.0], [1.0, 2.0, 3.0], [1.0, "2"], [1.0, True], [1.0, NAN], [1.0, math.inf], [1.0, [2.0]], {"0": 1.0}],
)
def test_answers_that_are_no_scores_are_no_scores(stranger, scores, capfd):
    stranger.answers = [(200, {"scores": scores, "errors": {}})]
    client = remote.load(f"http://127.0.0.1:{stranger.server_port}/f", patience=20)
    with pytest.raises(RuntimeError, match="all servers failed: 127.0.0.1:.*(expected 2 scores|a score is)"):
        client(*TWO)
    assert client(*TWO).tolist() == [0.5, 1.5]


def test_a_server_that_hangs_is_left(stranger, monkeypatch):
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        port = silent.getsockname()[1]
        stranger.answers = []
        client = remote.load(f"http://127.0.0.1:{port},127.0.0.1:{stranger.server_port}/f", timeout=0.2)
        start = time.monotonic()
        assert all(client(*TWO).tolist() == [0.5, 1.5] for _ in range(8))
        assert time.monotonic() - start < 3


def test_something_else_than_a_reward_server_is_named(stranger):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stranger, "do_GET", lambda self: self.send(200, {"hello": 1}))
        with pytest.raises(RuntimeError, match="what answers at 127.0.0.1:.* is not a reward server"):
            remote.load(f"http://127.0.0.1:{stranger.server_port}/f")


# ----------------------------------------------------------------------------------------------------------------------
# Many clients


def many_clients(port, clients, seconds):
    """Threads that score other batches again and again; the number of calls. AssertionError if one score differs."""
    local = {"fingerprint": fingerprints(), "jpeg": rewards.load("jpeg")}
    there = {name: remote.load(f"http://127.0.0.1:{port}/{name}") for name in local}
    batches = [batch(1 + i % 9, i) for i in range(40)]
    expected = {name: [score(*args) for args in batches] for name, score in local.items()}
    end, calls = time.monotonic() + seconds, [0] * clients

    def work(w):
        rng = random.Random(w)
        while time.monotonic() < end:
            name, i = rng.choice(list(local)), rng.randrange(len(batches))
            assert equal(there[name](*batches[i]), expected[name][i])
            calls[w] += 1

    workers = [Background(lambda w=w: work(w)) for w in range(clients)]
    for worker in workers:
        worker.result(seconds + 120)
    return calls


@pytest.mark.parametrize(
    "clients, seconds, merge",
    [
        (8, 3, False),
        (8, 1, True),
        pytest.param(64, 60, False, marks=pytest.mark.slow),
        pytest.param(64, 60, True, marks=pytest.mark.slow),
    ],
)
def test_every_answer_to_many_clients_is_right(clients, seconds, merge):
    with serve.Server({"fingerprint": fingerprints(), "jpeg": rewards.load("jpeg")}, merge=merge) as server:
        calls = many_clients(server.port, clients, seconds)
        idle(server)
    assert min(calls) >= 3 and sum(calls) >= 10 * seconds


# ----------------------------------------------------------------------------------------------------------------------
# The command


def run_command(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "rewards.serve", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(serve.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_command_serves_until_sigterm(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    process = run_command("--reward", "jpeg", "shapes", "--port", "0", "--device", "cpu")
    try:
        assert process.stdout.readline() == "serving on cpu, with a token:\n"
        urls = [process.stdout.readline().split()[1] for _ in range(2)]
        assert [url.rpartition("/")[2] for url in urls] == ["jpeg", "shapes"]
        # A port in use is said at once, before anything is loaded.
        port = urls[0].rpartition("/")[0].rpartition(":")[2]
        second = Background(lambda: run_command("--reward", "nonsense", "--port", port).communicate(timeout=60))
        args = batch(5)
        assert equal(remote.load(urls[0])(*args), rewards.load("jpeg")(*args))
        assert f"cannot listen on 127.0.0.1 port {port}: " in second.result()[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and "stopping: 0 items to finish" in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(reward=("jpgg",), port=0), "unknown reward 'jpgg', did you mean 'jpeg'"),
        (dict(reward=(), port=0), "--reward names nothing"),
        (dict(reward=("jpeg",), host="0.0.0.0"), "needs a token: set REWARD_TOKEN"),
        (dict(reward=("jpeg",), host="192.0.2.1"), "needs a token"),
        (dict(reward=("jpeg",), port=99999), "cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_command_errors_are_one_line(changes, why):
    with pytest.raises(SystemExit) as error:
        serve.main(serve.Args(**changes))
    assert why in str(error.value) and "\n" not in str(error.value)
