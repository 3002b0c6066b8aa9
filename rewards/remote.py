"""The client of rewards/serve.py: a reward that is scored by other processes, as a function like any other.

    score = load("http://10.0.0.2:18083,10.0.0.3:18083/pickscore")      # two replicas of one server

A call is cut into requests by its size and the number of replicas in the URL, never by which of them are alive, and so
its scores do not depend on that. A request goes to the replica with the fewest requests of this process, and to
another one, or later again, if that one is gone, busy or broken: scoring has no effects, so to repeat it is safe. A
replica that failed is left alone for a while, longer each time, and asked for its health before the next request.

Pictures travel as PNG, without loss. Metadata travels as JSON: what are tuples here are lists there, and keys strings.
The token is REWARD_TOKEN of the environment. Proxies of the environment are not used.
"""

import http.client
import json
import math
import os
import random
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

PROTOCOL = 1
CONNECT_TIMEOUT = 5.0  # seconds
START_PATIENCE = 30.0  # seconds that `load` waits for a server that does not listen yet
LONGEST_PAUSE = 30.0  # seconds that a replica which failed is left alone at most
MAX_ANSWER = 2**24  # bytes
REQUEST_ITEMS = 8, 64  # least and most items of a request, where there are as many
PNG_THREADS = 4  # 70 ms for 1024 x 1024 on one core, outside of Python's lock

_random = random.Random()  # its own: the caller's random numbers stay what they were


class Replica:
    """One address of a server. `pause_until`, `failures`, `active` and `reason` belong to the client's lock."""

    def __init__(self, scheme, address, prefix, token):
        parts = urlsplit(f"{scheme}://{address}")
        self.host, self.port, self.prefix, self.address = parts.hostname, parts.port, prefix, address
        self.kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.pause_until, self.failures, self.active, self.reason = 0.0, 0, 0, "not asked yet"

    def ask(self, method, path, body=None, timeout=None):
        """(status, headers, JSON object) of one request. OSError or HTTPException if there is no such answer, or
        nothing happens for `timeout` seconds."""
        connection = self.kind(self.host, self.port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
            connection.sock.settimeout(timeout or CONNECT_TIMEOUT)
            headers = self.headers | ({"Content-Type": "application/octet-stream"} if body else {})
            try:
                connection.request(method, self.prefix + path, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all of it was sent: the answer may be there
            response = connection.getresponse()
            data = response.read(MAX_ANSWER + 1)
            length = response.getheader("Content-Length")
            if len(data) > MAX_ANSWER or length not in (None, str(len(data))):
                raise http.client.HTTPException(f"answer cut after {len(data)} bytes")
            try:
                answer = json.loads(data)
            except (ValueError, RecursionError):
                answer = None
            if response.status == 200 and not isinstance(answer, dict):
                raise http.client.HTTPException("answer is not a JSON object")
            return response.status, response.headers, answer if isinstance(answer, dict) else {}  # or a proxy's page
        finally:
            connection.close()


def load(url, device="cpu", timeout=300.0, patience=600.0):
    """The reward at `url`, http[s]://host:port[,host:port ...]/name; `device` is the server's business.

    timeout: seconds that one request may take. patience: seconds after which a request that no replica could answer is
    given up; so long, too, this call waits for a server that is loading. Raises ValueError for a URL that is not of
    this form, RuntimeError if no replica can be reached, has the reward, or takes the token.

    The score raises ValueError for samples that cannot be sent or that the reward refused, RuntimeError naming the
    replicas and their reasons when all of them have failed.
    """
    scheme, _, rest = url.partition("://")
    hosts, _, path = rest.partition("/")
    prefix, _, name = path.rpartition("/")
    prefix = f"/{prefix}" if prefix else ""
    token = os.environ.get("REWARD_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("REWARD_TOKEN: expected printable ASCII characters without spaces")
    try:
        if scheme not in ("http", "https") or not name or any(c in "?#@\\" or not "!" <= c <= "~" for c in rest):
            raise ValueError("malformed")
        replicas = [Replica(scheme, address, prefix, token) for address in hosts.split(",")]
        if not all(replica.host for replica in replicas) or len({r.address for r in replicas}) < len(replicas):
            raise ValueError("an address is empty or there twice")
    except ValueError as error:
        raise ValueError(
            f"reward {url!r}: {error}, expected http://host:port/name or http://host:port,host:port/name"
        ) from None
    return _Client(url, name, replicas, timeout, patience).score()


class _Client:
    def __init__(self, url, name, replicas, timeout, patience):
        self.name, self.replicas, self.timeout, self.patience = name, replicas, timeout, patience
        self.label = f"reward {name!r}"
        self.lock = threading.Lock()
        served, self.limits = self.connect(url)
        self.needs, self.has_strict = tuple(served["needs"]), served["strict"]

    def score(self):
        def score(samples, prompts, metadata):
            return self.call(False, samples, prompts, metadata)

        def strict(samples, prompts, metadata):
            return self.call(True, samples, prompts, metadata)

        score.needs, score.strict = self.needs, strict if self.has_strict else None
        return score

    # ------------------------------------------------------------------------------------------------------------------
    # Which replicas there are

    def connect(self, url):
        """({needs, strict} of the reward, limits) from the replicas that answer; at least one has to."""
        start = time.monotonic()
        while True:
            found, loading = {}, False
            for replica in self.replicas:
                try:
                    status, _, info = replica.ask("GET", "/info")
                except (OSError, http.client.HTTPException) as error:
                    replica.reason = _text(error)
                    continue
                replica.reason = info.get("error", f"status {status}")
                loading |= status == 503
                if status == 401:
                    raise RuntimeError(f"{self.label}: {replica.address}: {replica.reason}")
                if status == 200:
                    found[replica] = self.check_info(url, replica, info)
            if found:
                break
            waited = time.monotonic() - start
            if waited > (self.patience if loading else min(START_PATIENCE, self.patience)):
                raise RuntimeError(
                    f"{self.label}: no server answers at {self.reasons()}\n"
                    f"Start one: python -m rewards.serve --reward {self.name} --port {self.replicas[0].port or 80}"
                )
            time.sleep(min(1.0, self.patience / 10))
        missing = [replica for replica in self.replicas if replica not in found]
        for replica in missing:
            self.failed(replica, replica.reason)
        first, *others = found.values()
        for other in others:
            if other[0] != first[0]:
                raise RuntimeError(f"{self.label}: the replicas {url} differ: {first[0]} and {other[0]}")
        smallest = {key: min(limits[key] for _, limits in found.values()) for key in first[1]}
        return first[0], smallest

    def check_info(self, url, replica, info):
        try:
            if info["protocol"] != PROTOCOL:
                raise RuntimeError(
                    f"{self.label}: {replica.address} speaks protocol {info['protocol']}, not {PROTOCOL}"
                )
            if self.name not in info["rewards"]:
                known = ", ".join(info["rewards"])
                raise RuntimeError(f"reward {url!r}: {replica.address} does not serve {self.name!r}, it serves {known}")
            served = info["rewards"][self.name]
            limits = {key: int(info["limits"][key]) for key in ("items", "bytes", "header")}
            return {"needs": [str(role) for role in served["needs"]], "strict": bool(served["strict"])}, limits
        except (KeyError, TypeError, ValueError):
            raise RuntimeError(f"{self.label}: what answers at {replica.address} is not a reward server") from None

    def reasons(self):
        return ", ".join(f"{replica.address} ({replica.reason})" for replica in self.replicas)

    def failed(self, replica, reason):
        with self.lock:
            replica.failures += 1
            first = replica.failures == 1
            replica.reason = reason
            replica.pause_until = time.monotonic() + min(LONGEST_PAUSE, 2.0 ** min(replica.failures, 9) / 8) * _jitter()
        if first:
            print(f"{self.label}: {replica.address} failed: {reason}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------------------------
    # A call

    def call(self, strict, samples, prompts, metadata):
        count = len(prompts)
        rows, sizes, pictures = self.rows(samples, prompts, metadata, count)
        if not count:
            return torch.empty(0)
        stop = threading.Event()
        requests = self.split(sizes, pictures)
        with ThreadPoolExecutor(min(len(requests), 2 * len(self.replicas))) as pool:
            try:
                futures = [pool.submit(self.request, strict, rows, pictures, part, stop) for part in requests]
                scores = [score for future in futures for score in future.result()]
            finally:
                stop.set()  # or the others would go on trying
                pool.shutdown(cancel_futures=True)
        return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)

    def rows(self, samples, prompts, metadata, count):
        """What is sent of each item: its texts as a dict, their size in bytes, its pictures as {role: PNG file}."""

        def fail(i, what):
            raise ValueError(f"{self.label}, sample {i}: {what}")

        if len(metadata) != count:
            raise ValueError(f"{self.label}: {len(metadata)} metadata for {count} prompts")
        for role in self.needs:
            if len(samples.get(role, ())) != count:
                got = len(samples[role]) if role in samples else "no"
                raise ValueError(f"{self.label} needs {role!r}: {got} for {count} prompts")
        rows, sizes, files = [], [], {}
        for i in range(count):
            if not isinstance(prompts[i], str):
                fail(i, f"prompt: expected str, got {type(prompts[i]).__name__}")
            if not isinstance(metadata[i], dict):
                fail(i, f"metadata: expected dict, got {type(metadata[i]).__name__}")
            row = {"prompt": prompts[i], "metadata": metadata[i]}
            for role in self.needs:
                value = samples[role][i]
                if role == "text":
                    if not isinstance(value, str):
                        fail(i, f"{role!r}: expected str, got {type(value).__name__}")
                    row[role] = value
                    continue
                value = np.asarray(value)
                if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or not value.size:
                    fail(i, f"{role!r}: expected a uint8 picture [H, W, 3], got {value.dtype} {list(value.shape)}")
                files[i, role] = value
            try:
                sizes.append(len(json.dumps(row)))
            except (TypeError, ValueError, RecursionError) as error:
                fail(i, f"metadata cannot be sent as JSON: {error}")
            rows.append(row)
        with ThreadPoolExecutor(PNG_THREADS) as pool:
            encoded = dict(zip(files, pool.map(png, files.values())))
        pictures = [{role: encoded[i, role] for role in self.needs if role != "text"} for i in range(count)]
        return rows, sizes, pictures

    def split(self, sizes, pictures):
        """The items of each request, as ranges."""
        least, most = REQUEST_ITEMS
        at_once = min(most, max(least, math.ceil(len(sizes) / len(self.replicas))), self.limits["items"])
        parts, start, text, total = [], 0, 0, 0
        for i, size in enumerate(sizes):
            size += 200  # where its pictures are
            more = size + sum(map(len, pictures[i].values()))
            full = text + size > self.limits["header"] - 1000 or total + more > self.limits["bytes"] - 1000
            if i > start and (i - start == at_once or full):
                parts.append(range(start, i))
                start, text, total = i, 0, 0
            text, total = text + size, total + more
        return [*parts, range(start, len(sizes))]

    def body(self, strict, rows, pictures, part):
        items, where, files, end = [], {}, [], 0
        for i in part:
            for file in pictures[i].values():
                if file not in where:  # pictures that items share, like the source of a group, are sent once
                    where[file] = [end, len(file)]
                    files.append(file)
                    end += len(file)
            items.append(rows[i] | {role: where[file] for role, file in pictures[i].items()})
        header = dict(protocol=PROTOCOL, reward=self.name, strict=strict, timeout=self.timeout, items=items)
        header = json.dumps(header).encode()
        return b"".join([len(header).to_bytes(4, "little"), header, *files])

    def request(self, strict, rows, pictures, part, stop):
        """The scores of the items `part`, from whichever replica: a list of float or None."""
        body, give_up, busy, broken = self.body(strict, rows, pictures, part), time.monotonic() + self.patience, 0, {}
        while not stop.is_set():
            if len(broken) == len(self.replicas):
                raise RuntimeError(f"{self.label}: all servers failed: {', '.join(broken.values())}")
            replica, pause = self.choose(broken)
            if replica is None:
                if time.monotonic() + pause > give_up:
                    raise RuntimeError(f"{self.label}: no scores for {self.patience:g} s from {self.reasons()}")
                stop.wait(pause)
                continue
            try:
                if replica.failures:
                    status, _, answer = replica.ask("GET", "/health")
                    if status != 200:
                        raise ConnectionError(answer.get("status", f"status {status}"))
                # The server gives up first, and says so.
                status, headers, answer = replica.ask("POST", "/score", body, self.timeout + CONNECT_TIMEOUT)
                scores = self.read(replica, status, answer, len(part))
            except (OSError, http.client.HTTPException) as error:
                self.failed(replica, _text(error))
            except _Broken as error:
                broken[replica] = f"{replica.address} ({error})"
                self.failed(replica, str(error))
            except _Busy as error:
                busy += 1
                pause = min(LONGEST_PAUSE, max(_seconds(headers.get("Retry-After")), 2.0 ** min(busy, 9) / 16))
                with self.lock:
                    replica.reason, replica.pause_until = str(error), time.monotonic() + pause * _jitter()
            else:
                with self.lock:
                    back, replica.failures = replica.failures, 0
                if back:
                    print(f"{self.label}: {replica.address} is back", file=sys.stderr, flush=True)
                return scores
            finally:
                with self.lock:
                    replica.active -= 1
        return []  # nobody reads it: another request of the call has raised

    def choose(self, broken):
        """(replica, 0), counted as active, or (None, seconds until there is one)."""
        with self.lock:
            now = time.monotonic()
            usable = [replica for replica in self.replicas if replica not in broken]
            ready = [replica for replica in usable if replica.pause_until <= now]
            if not ready:
                return None, min(replica.pause_until for replica in usable) - now
            replica = min(ready, key=lambda replica: (replica.active, _random.random()))
            replica.active += 1
            return replica, 0.0

    def read(self, replica, status, answer, count):
        """The scores in an answer, or what to do without them."""
        error = str(answer.get("error", f"status {status}"))
        if status in (502, 503, 504):
            raise _Busy(error)
        if status in (400, 413, 422):
            raise ValueError(f"{self.label}: {replica.address}: {error}")
        if status in (401, 403):
            raise RuntimeError(f"{self.label}: {replica.address}: {error}")
        scores, errors = answer.get("scores"), answer.get("errors")
        if status != 200:
            raise _Broken(error)
        if not isinstance(scores, list) or len(scores) != count or not isinstance(errors, dict):
            raise _Broken(f"expected {count} scores, got {str(scores)[:40]}")
        for score in scores:
            if score is not None and (type(score) not in (int, float) or not abs(score) < math.inf):
                raise _Broken(f"a score is {str(score)[:40]}")
        for i, reason in list(errors.items())[:1]:
            warnings.warn(f"{self.label}: item {i} of a request failed at {replica.address}: {str(reason)[:200]}")
        return scores


class _Busy(Exception):
    """Alive, but not now."""


class _Broken(Exception):
    """Answers, but not with scores: not asked again for the same request."""


def png(image):
    """The PNG file of a uint8 picture [H, W, 3]. Runs of equal bytes are all that is searched for: as small as zlib's
    other fast settings on photographs, and faster."""
    file = BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def _jitter():
    return _random.uniform(0.75, 1.25)  # or all ranks would come back at once


def _seconds(text):
    """Retry-After as seconds; 0 where it is none, or a date."""
    return float(text) if text and text.isascii() and text.isdigit() else 0.0


def _text(error):
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
