"""Rewards over HTTP, for a trainer whose GPUs are full or whose environment is another one.

    python -m rewards.serve --reward pickscore hpsv2.1 --port 18083
    python flow_grpo.py --reward http://127.0.0.1:18083/pickscore:0.7         # rewards/remote.py is the client

Protocol 1. The answers are JSON; an error is {"error": text} and a status.

    GET /health    200 {"status": "ok"}, 503 while weights load or the server stops; needs no token
    GET /info      {protocol, rewards: {name: {needs, strict}}, limits: {items, bytes, pixels, header}, waiting, scored}
    POST /score    application/octet-stream: length of the header (4 bytes, little-endian), header (JSON), pictures
        header     {protocol: 1, reward, strict: bool, timeout: seconds, items: [{prompt, metadata, <role>: ...}]}
        <role>     what the reward needs: text is a string; image, source and recon are [offset, length] of an 8-bit RGB
                   PNG file among the pictures; items may share one
        answer     {scores: [number, or null where the item failed], errors: {index: text}, seconds}

    400 malformed    401 token    404 reward    413 over a limit    422 the reward raised ValueError
    500 the reward raised something else    503 full, loading or stopping    504 `timeout` has passed

Nothing of a request is unpickled, imported, or opened as a path or URL. Every limit is checked before the memory is
taken. A request is scored as one call, in the order of arrival and by one thread, so that its scores do not depend on
what else is going on; with merge, requests that wait are scored together.
"""

import hmac
import io
import json
import math
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

import numpy as np
from PIL import Image

import rewards

PROTOCOL = 1
PORT = 18083
IMAGE_ROLES, TEXT_ROLES = ("image", "source", "recon"), ("text",)
MAX_HEADER = 2**24  # bytes of the header of a request
JSON_COST = 16  # bytes of memory per byte of header, about the worst that JSON can do
MAX_SECONDS = 3600.0  # most that a request may ask to be waited for
MERGE_ITEMS = 64  # most items of one call that merges requests
LINGER = 2.0  # seconds that a refused request is read on and thrown away, so that its client gets to see the answer


class Refused(Exception):
    """A request that is answered with `status` and the error `reason`."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status, self.reason = status, reason


# ----------------------------------------------------------------------------------------------------------------------
# Bytes to samples


def picture_size(png):
    """(width, height) of an 8-bit RGB PNG file, from its first 29 bytes. ValueError if it is something else."""
    if len(png) < 33 or png[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR":
        raise ValueError("not a PNG file")
    width, height, depth, color = struct.unpack(">IIBB", png[16:26])
    if (depth, color) != (8, 2) or not width or not height:
        raise ValueError(f"not an 8-bit RGB picture: PNG of {width} x {height}, bit depth {depth}, colour type {color}")
    return width, height


def decode(png):
    """The picture of an 8-bit RGB PNG file, uint8 [H, W, 3]. ValueError if it is broken."""
    size = picture_size(png)
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            # A second header in the file could ask for more memory than the first one, which the limits were held to.
            if image.size != size or image.mode != "RGB":
                raise ValueError("contradicts its own header")
            return np.array(image)
    except Exception as error:  # of a broken file Pillow raises OSError, SyntaxError, zlib.error, struct.error ...
        raise ValueError(f"broken PNG file: {error}") from None


def header_length(body):
    """Bytes of the header of a request. Refused if the body does not hold them, or they are over the limit."""
    length = int.from_bytes(body[:4], "little")
    if len(body) < 4 + length:
        raise Refused(400, f"header of {length} bytes in a body of {len(body)}")
    if length > MAX_HEADER:
        raise Refused(413, f"header of {length} bytes, at most {MAX_HEADER}")
    return length


def parse(body, scores, limits):
    """The header of a request and where its pictures are: (header, prompts, metadata, spans), spans {role: [B texts, or
    B (offset, length) in `body`]}. Refused if it is malformed, asks for what is not there, or is over a limit."""
    start = 4 + header_length(body)
    try:
        header = json.loads(bytes(body[4:start]).decode())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"header is not JSON: {error}") from None
    if not isinstance(header, dict) or header.get("protocol") != PROTOCOL:
        got = header.get("protocol") if isinstance(header, dict) else header
        raise Refused(400, f"protocol {str(got)[:40]}, this server speaks {PROTOCOL}")
    name, items, timeout = header.get("reward"), header.get("items"), header.get("timeout", MAX_SECONDS)
    if not isinstance(name, str) or name not in scores:
        raise Refused(404, f"no reward {str(name)[:100]!r} here, there is {', '.join(scores)}")
    if type(header.setdefault("strict", False)) is not bool:
        raise Refused(400, "strict: expected true or false")
    if header["strict"] and scores[name].strict is None:
        raise Refused(404, f"reward {name!r} has no strict form")
    if type(timeout) not in (int, float) or not timeout > 0:
        raise Refused(400, "timeout: expected seconds > 0")
    header["timeout"] = min(timeout, MAX_SECONDS)
    if not isinstance(items, list):
        raise Refused(400, "items: expected a list")
    if len(items) > limits["items"]:
        raise Refused(413, f"{len(items)} items, at most {limits['items']} in one request (--max-queue)")
    spans = {role: [] for role in scores[name].needs}
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise Refused(400, f"item {i}: expected an object")
        if not isinstance(item.get("prompt"), str) or not isinstance(item.get("metadata"), dict):
            raise Refused(400, f"item {i}: expected a prompt (string) and metadata (object)")
        for role, of_role in spans.items():
            value = item.get(role)
            if role in TEXT_ROLES:
                if not isinstance(value, str):
                    raise Refused(400, f"item {i}: {role!r}: expected a string")
            else:
                pair = isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= 0 for v in value)
                if not pair or start + sum(value) > len(body):
                    raise Refused(400, f"item {i}: {role!r}: expected [offset, length] of a picture in the body")
                value = start + value[0], value[1]
            of_role.append(value)
    return header, [item["prompt"] for item in items], [item["metadata"] for item in items], spans


def measure(body, spans, limits):
    """Bytes that the pictures at `spans` take when decoded. Refused if one has more pixels than allowed. A file that is
    no such picture counts as nothing: it fails before it is decoded."""
    total = 0
    for role, of_role in spans.items():
        for i, (offset, length) in enumerate(of_role if role in IMAGE_ROLES else ()):
            try:
                width, height = picture_size(body[offset : offset + min(length, 33)])
            except ValueError:
                continue
            if width * height > limits["pixels"]:
                most = limits["pixels"] / 1e6
                raise Refused(413, f"item {i}: {width} x {height} pixels, at most {most:g} million (--max-megapixels)")
            total += 3 * width * height
    return total


def to_samples(body, spans, count):
    """(samples, rows, errors): those of `count` items whose pictures can be decoded, which they are, and why the others
    cannot: {index: text}."""
    decoded, errors = {role: [None] * count for role in spans}, {}
    for role, of_role in spans.items():
        for i, value in enumerate(of_role):
            if role in IMAGE_ROLES:
                try:
                    value = decode(body[value[0] : value[0] + value[1]])
                except ValueError as error:
                    errors[i] = f"{role}: {error}"
            decoded[role][i] = value
    rows = [i for i in range(count) if i not in errors]
    return {role: [values[i] for i in rows] for role, values in decoded.items()}, rows, errors


# ----------------------------------------------------------------------------------------------------------------------
# The server


class Job:
    """A call of a reward that waits for the worker; then `result` is a list of floats, or (status, reason)."""

    def __init__(self, form, samples, prompts, metadata, deadline):
        self.form, self.samples, self.prompts, self.metadata = form, samples, prompts, metadata
        self.deadline, self.done, self.result = deadline, threading.Event(), None


class Server(ThreadingHTTPServer):
    """Serves `scores`, {name: score} with scores as rewards.load returns them; None = loading, set `scores` when done.

    It listens from the start (OSError if it cannot) and answers once `start()` was called, in threads of its own.
    `close()` refuses what comes from then on, answers what was accepted, and returns. `with Server(...)` does both.
    `port` 0 picks a free one, which `server.port` tells. ValueError for an address that other machines can reach and no
    token, and for a reward that needs a role that the protocol does not have.
    """

    daemon_threads = True
    block_on_close = False  # close() waits for the answers, not for connections that are idle
    request_queue_size = 128

    def __init__(
        self,
        scores,
        host="127.0.0.1",
        port=0,
        token="",
        max_body=2**28,  # bytes of one request
        max_pixels=2**24,  # of one picture
        max_queue=1024,  # items accepted and not yet answered
        max_memory=2**33,  # bytes of the bodies and decoded pictures of all requests
        max_connections=256,
        read_timeout=60.0,  # seconds for the head of a request, and again for its body
        merge=False,
    ):
        if not token and host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"serving on {host} needs a token: set REWARD_TOKEN to a secret, here and for the clients")
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("REWARD_TOKEN: expected printable ASCII characters without spaces")
        self.token, self.read_timeout, self.merge = token, read_timeout, merge
        self.limits = dict(items=max_queue, bytes=min(max_body, max_memory), pixels=max_pixels, header=MAX_HEADER)
        self.max_memory, self.max_connections = max_memory, max_connections
        self.stopping = self.idle = False
        self.items = self.memory = self.connections = 0  # in use, held to the limits
        self.scored = 0  # items since the start
        self.jobs = deque()
        self.changed = threading.Condition()  # guards all of these
        self.set_scores(scores)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self.port = self.server_address[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def server_bind(self):
        TCPServer.server_bind(self)  # HTTPServer's asks the DNS for the machine's own name, which can take seconds

    def set_scores(self, scores):
        for name, score in (scores or {}).items():
            for role in score.needs:
                if role not in IMAGE_ROLES + TEXT_ROLES:
                    raise ValueError(f"reward {name!r} needs {role!r}, which cannot be sent")
        self.scores = scores

    def start(self):
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    __enter__ = start

    def __exit__(self, *_):
        self.close()

    def close(self):
        with self.changed:
            self.stopping = True
        self.shutdown()
        self.server_close()
        with self.changed:
            self.changed.wait_for(lambda: not self.items)
            self.idle = True
            self.changed.notify_all()
        self.worker.join()

    # Limits: take first, give back when the answer is out

    def take(self, taken, items=0, memory=0):
        """Adds to `taken` ([items, bytes] of one request), which `give` returns. Refused if it does not fit, now (503)
        or ever (413)."""
        if taken[1] + memory > self.max_memory:
            raise Refused(413, f"takes {(taken[1] + memory) / 1e9:.2f} GB of memory: send fewer pictures at a time")
        with self.changed:
            if items and self.stopping:
                raise Refused(503, "stopping")
            if self.items + items > self.limits["items"] or self.memory + memory > self.max_memory:
                raise Refused(503, f"full: {self.items} items, {self.memory / 1e9:.2f} GB")
            self.items += items
            self.memory += memory
            taken[0] += items
            taken[1] += memory

    def give(self, taken):
        with self.changed:
            self.items -= taken[0]
            self.memory -= taken[1]
            self.changed.notify_all()

    def process_request(self, request, client_address):
        with self.changed:
            full = self.connections >= self.max_connections
            self.connections += not full
        if full:
            request.settimeout(0)  # this is the thread that accepts: it waits for nobody
            try:
                request.send(b"HTTP/1.1 503 Full\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            except OSError:
                pass
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            with self.changed:
                self.connections -= 1
            raise

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.changed:
                self.connections -= 1

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # OSError: the client went away or was too slow
            traceback.print_exc()

    # The one thread that calls rewards

    def submit(self, job):
        with self.changed:
            self.jobs.append(job)
            self.changed.notify_all()

    def _work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.idle)
                if not self.jobs:
                    return
                calls = [self.jobs.popleft()]
                for job in list(self.jobs) if self.merge else ():
                    total = sum(len(call.prompts) for call in calls) + len(job.prompts)
                    if job.form == calls[0].form and total <= MERGE_ITEMS:
                        calls.append(job)
                        self.jobs.remove(job)
            calls = [job for job in calls if time.monotonic() < job.deadline]  # of the others nobody reads the answer
            if calls:
                self._call(calls)
            del calls  # or the pictures stay in memory until the next request

    def _call(self, jobs):
        prompts = [prompt for job in jobs for prompt in job.prompts]
        metadata = [row for job in jobs for row in job.metadata]
        samples = {role: [value for job in jobs for value in job.samples[role]] for role in jobs[0].samples}
        try:
            result = [float(value) for value in jobs[0].form(samples, prompts, metadata).tolist()]
            if len(result) != len(prompts):
                raise RuntimeError(f"{len(result)} scores for {len(prompts)} items")
        except BaseException as error:  # even SystemExit: without this thread there are no more answers
            if len(jobs) > 1:  # the others shall not fail for one
                for job in jobs:
                    self._call([job])
                return
            if isinstance(error, ValueError):
                result = 422, str(error)[:2000]
            else:
                traceback.print_exc()
                result = 500, f"{type(error).__name__}: {error}"[:2000]
        with self.changed:
            self.scored += len(prompts)
        for job in jobs:
            job.result = result if isinstance(result, tuple) else [result.pop(0) for _ in job.prompts]
            job.done.set()


class TimedReader(io.RawIOBase):
    """What a socket receives until `deadline` (time.monotonic), then TimeoutError. A timeout of the socket would start
    anew with every byte."""

    def __init__(self, connection, deadline):
        self.connection, self.deadline = connection, deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("too slow")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request of one connection, which is closed after it: so there is never a rest of it to be misread."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rewards", ""

    def setup(self):
        super().setup()
        self.rfile.close()
        self.raw = TimedReader(self.connection, time.monotonic() + self.server.read_timeout)
        self.rfile = io.BufferedReader(self.raw, 2**16)

    def handle(self):
        self.handle_one_request()

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        status = "stopping" if server.stopping else "loading" if server.scores is None else "ok"
        try:
            if self.path == "/health":
                self.reply(200 if status == "ok" else 503, {"status": status})
                return
            if self.path != "/info":
                raise Refused(404, "no such page: GET /health, GET /info, POST /score")
            self.check_token()
            if status != "ok":
                raise Refused(503, status)
            served = {name: dict(needs=[*s.needs], strict=s.strict is not None) for name, s in server.scores.items()}
            info = dict(protocol=PROTOCOL, rewards=served, limits=server.limits)
            self.reply(200, info | dict(waiting=server.items, scored=server.scored))
        except Refused as refused:
            self.reply(refused.status, {"error": refused.reason})

    def do_POST(self):
        taken, self.unread = [0, 0], True
        try:
            try:
                status, answer = 200, self.score(taken)
            except Refused as refused:
                status, answer = refused.status, {"error": refused.reason}
            except OSError:  # the client went away
                raise
            except Exception as error:
                traceback.print_exc()
                status, answer = 500, {"error": f"{type(error).__name__}: {error}"[:2000]}
            self.reply(status, answer)
        finally:
            self.server.give(taken)
        if self.unread:
            # Closing now would reset the connection, and the client, still sending, would not see the answer.
            self.connection.shutdown(socket.SHUT_WR)
            self.raw.deadline = time.monotonic() + LINGER
            while self.rfile.read1(2**16):
                pass

    def check_token(self):
        given = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise Refused(401, "wrong or no token: REWARD_TOKEN must be the server's")

    def score(self, taken):
        """The answer to POST /score. What the request uses is added to `taken`."""
        start, server = time.monotonic(), self.server
        if self.path != "/score":
            raise Refused(404, "no such page: GET /health, GET /info, POST /score")
        self.check_token()
        if server.stopping or server.scores is None:
            raise Refused(503, "stopping" if server.stopping else "loading")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or "Transfer-Encoding" in self.headers:
            raise Refused(411, "expected one Content-Length and no Transfer-Encoding")
        if not (lengths[0].isascii() and lengths[0].isdigit() and len(lengths[0]) < 16):
            raise Refused(400, "Content-Length: expected a number")
        if self.headers.get_content_type() != "application/octet-stream":  # what a web page cannot send unasked
            raise Refused(415, "expected Content-Type: application/octet-stream")
        length = int(lengths[0])
        if length > server.limits["bytes"]:
            raise Refused(413, f"body of {length} bytes, at most {server.limits['bytes']} (--max-body-mb)")
        server.take(taken, memory=length)
        body = self.read_body(length)
        server.take(taken, memory=JSON_COST * header_length(body))
        header, prompts, metadata, spans = parse(body, server.scores, server.limits)
        server.take(taken, len(prompts), measure(body, spans, server.limits))
        samples, rows, errors = to_samples(body, spans, len(prompts))
        score, deadline = server.scores[header["reward"]], start + header["timeout"]
        form = score.strict if header["strict"] else score
        job = Job(form, samples, [prompts[i] for i in rows], [metadata[i] for i in rows], deadline)
        if rows:
            server.submit(job)
            if not job.done.wait(max(0.0, deadline - time.monotonic())):
                raise Refused(504, f"not scored within {header['timeout']:g} s")
            if isinstance(job.result, tuple):
                raise Refused(*job.result)
        scores = [None] * len(prompts)
        for i, value in zip(rows, job.result or ()):
            if math.isfinite(value):
                scores[i] = value
            elif not math.isnan(value):
                errors[i] = f"score is {value}"
        return dict(scores=scores, errors={str(i): e for i, e in errors.items()}, seconds=time.monotonic() - start)

    def read_body(self, length):
        self.raw.deadline = time.monotonic() + self.server.read_timeout
        body, have = memoryview(bytearray(length)), 0
        try:
            while have < length:
                count = self.rfile.readinto(body[have:])
                if not count:
                    break
                have += count
        except TimeoutError:
            raise Refused(408, f"{have} of {length} bytes within {self.server.read_timeout:g} s") from None
        self.unread = False
        if have < length:
            raise Refused(400, f"body of {length} bytes ended after {have}")
        return body.toreadonly()

    def reply(self, status, answer):
        data = json.dumps(answer, allow_nan=False).encode()
        self.connection.settimeout(self.server.read_timeout)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Args:
    reward: tuple[str, ...]
    """rewards to serve, by the names of --reward elsewhere (no weights: those belong to the trainer)"""
    host: str = "127.0.0.1"
    """address to listen on; any other than this machine's own needs REWARD_TOKEN in the environment (0.0.0.0 = all)"""
    port: int = PORT
    """port to listen on (0 = a free one, printed)"""
    device: str = ""
    """device of the rewards, e.g. cuda:1 (empty = cuda if there is one, else cpu); one server per device"""
    judge_url: str = ""
    """OpenAI-compatible endpoint of the rewards that ask a model (empty = their default)"""
    judge_model: str = ""
    """model at --judge-url (empty = the reward's default)"""
    max_body_mb: float = 256
    """largest request, in MB"""
    max_megapixels: float = 16.8
    """largest picture, in millions of pixels"""
    max_queue: int = 1024
    """items accepted and not yet answered; more are told to come back later"""
    max_memory_gb: float = 8
    """memory for the requests and decoded pictures that are in work, in GB"""
    read_timeout: float = 60
    """seconds that a client may take to send a request"""
    merge: bool = False
    """score waiting requests of one reward in one call: faster where each is small, but the last bits of scores then
    depend on timing"""


def run(server):
    """Serves until SIGTERM or SIGINT, then closes the server. A second signal ends the process at once."""
    stop = threading.Event()

    def on_signal(number, frame):
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    stop.wait()
    print(f"stopping: {server.items} items to finish", file=sys.stderr, flush=True)
    server.close()


def main(args):
    import torch

    if not args.reward:
        sys.exit("rewards.serve: --reward names nothing, e.g. --reward pickscore")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        server = Server(
            None,  # bound first: a port in use is seen before minutes of loading
            args.host,
            args.port,
            os.environ.get("REWARD_TOKEN", "").strip(),
            max_body=int(args.max_body_mb * 1e6),
            max_pixels=int(args.max_megapixels * 1e6),
            max_queue=args.max_queue,
            max_memory=int(args.max_memory_gb * 1e9),
            read_timeout=args.read_timeout,
            merge=args.merge,
        ).start()
        server.set_scores({name: rewards.load(name, device, args.judge_url, args.judge_model) for name in args.reward})
    except (ValueError, RuntimeError) as error:
        sys.exit(f"rewards.serve: {error}")
    except (OSError, OverflowError) as error:
        sys.exit(f"rewards.serve: cannot listen on {args.host} port {args.port}: {error}")
    print(f"serving on {device}, {'with' if server.token else 'without'} a token:", flush=True)
    for name in server.scores:
        print(f"    --reward {server.url}/{name}", flush=True)
    run(server)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, prog="python -m rewards.serve", description=__doc__))
