"""vlm_judge and unifiedreward, through real sockets: a small server in this process speaks the OpenAI protocol."""

import base64
import io
import json
import math
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import unifiedreward, vlm_judge

TEMPLATE = {"point": "Rate {prompt} (ours).", "point_v1": "Rate {prompt} once.", "edit_quality": "Natural?"}
TEMPLATE |= {"edit_following": 'As told by {"score": [a, b]}? {instruction}\n'}


class Judge(ThreadingHTTPServer):
    """answer(text, images, body) -> choices[0], a status code, or bytes to send as they are."""

    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes the kernel drop connections of a burst

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models, self.key, self.answer = ["judge-7b"], None, None
        self.bodies, self.lock, self.running, self.most = [], threading.Lock(), 0, 0
        self.handle_error = lambda *_: None  # a client that hung up is part of the tests
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, data, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.reply(401, b'{"error": "wrong key"}')
            return False
        return True

    def do_GET(self):
        if not self.allowed():
            return
        if self.path != "/v1/models" or self.server.models is None:
            return self.reply(404, b"no such page")
        self.reply(200, json.dumps({"object": "list", "data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        assert self.path == "/v1/chat/completions" and self.headers["Content-Type"] == "application/json"
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        (turn,) = body["messages"]
        images = []
        for part in turn["content"][:-1]:
            head, data = part["image_url"]["url"].split(",")
            assert head == "data:image/png;base64" and turn["role"] == "user"
            images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"])))
        out = self.server.answer(turn["content"][-1]["text"], images, body)
        with self.server.lock:
            self.server.running -= 1
        if isinstance(out, int):
            self.reply(out, b'{"error": {"message": "as told"}}', [("Retry-After", "0")])
        elif isinstance(out, bytes):
            self.reply(200, out)
        else:
            self.reply(200, json.dumps({"choices": [{"index": 0, "finish_reason": "stop"} | out]}).encode())


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: proxies are not used
    monkeypatch.setattr(vlm_judge, "BACKOFF", 0.01)
    server = Judge()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def template(tmp_path):
    (tmp_path / "template.json").write_text(json.dumps(TEMPLATE))
    return tmp_path / "template.json"


def tokens(probabilities):
    """choices[0] of one answer token with the log-probs of its alternatives, likeliest first, as vLLM sends them."""
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    top = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in ranked]
    return {
        "message": {"role": "assistant", "content": ranked[0][0]},
        "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
    }


def written(text):
    return {"message": {"role": "assistant", "content": text}, "logprobs": None}


def pictures(count, height=6, width=5):
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def brightness(image):
    return 0.05 + 0.9 * float(image.mean()) / 255


def by_brightness(text, images, body):
    p = brightness(images[-1])
    return tokens({"Yes": 0.6 * p, " yes": 0.3 * p, "No": 0.9 * (1 - p), "Maybe": 0.1})


def test_p_yes_sums_the_spellings_and_ignores_the_rest(judge):
    judge.answer = lambda *_: tokens(
        {"Yes": 0.2, " YES": 0.1, "yes.": 0.1, "No": 0.1, "▁no": 0.02, "Not": 0.3, "yesterday": 0.1}
    )
    score = vlm_judge.load(judge_url=judge.url)
    got = score({"image": pictures(1)}, ["a red circle"], [{}])
    torch.testing.assert_close(got, torch.tensor([0.4 / 0.52]), atol=1e-6, rtol=0)
    (body,) = judge.bodies
    assert body["model"] == "judge-7b" and body["max_completion_tokens"] == 1 and body["temperature"] == 0
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    assert body["messages"][0]["content"][-1]["text"] == vlm_judge.QUESTION.replace("{prompt}", "a red circle")
    assert score.needs == ("image",) and score.strict is None and got.dtype == torch.float32


def test_expected_level_is_continuous(judge):
    judge.answer = lambda *_: tokens({"4": 0.5, " 5": 0.2, "3": 0.1, "7": 0.1, "0": 0.05})
    got = vlm_judge.load_score(judge_url=judge.url)({"image": pictures(1)}, ["a"], [{}])
    torch.testing.assert_close(got, torch.tensor([((4 * 0.5 + 5 * 0.2 + 3 * 0.1) / 0.8 - 1) / 4]), atol=1e-6, rtol=0)
    judge.answer = lambda *_: tokens({"5": 1.0})
    assert vlm_judge.load_score(judge_url=judge.url)({"image": pictures(1)}, ["a"], [{}]).item() == 1


def test_pictures_arrive_as_they_are_and_in_order(judge):
    """37 pictures of sizes that differ, answered late at random: results stand in the order of the samples."""
    delay = np.random.default_rng(1)

    def answer(text, images, body):
        time.sleep(float(delay.random()) * 0.02)
        return by_brightness(text, images, body)

    judge.answer = answer
    images = [pictures(1, 3 + i, 40 - i)[0] // (1 + i % 7) for i in range(37)]
    prompts = [f'prompt {i}, 日本 {{prompt}} \\ "quoted"' for i in range(37)]
    score = vlm_judge.load(judge_url=judge.url, concurrency=8)
    got = score({"image": images}, prompts, [{}] * 37)
    expected = [0.9 * brightness(i) / 0.9 for i in images]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=0)
    assert 1 < judge.most <= 8
    asked = sorted(body["messages"][0]["content"][-1]["text"] for body in judge.bodies)
    assert asked == sorted(vlm_judge.QUESTION.replace("{prompt}", prompt) for prompt in prompts)

    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = score({"image": [images[i] for i in order]}, [prompts[i] for i in order], [{}] * 37)
    torch.testing.assert_close(shuffled, got[order], atol=1e-6, rtol=0)
    assert score({"image": []}, [], []).shape == (0,)


def test_pixels_are_lossless_up_to_the_size_limit(judge, monkeypatch):
    seen = []
    judge.answer = lambda text, images, body: seen.append(images) or tokens({"Yes": 1.0})
    (image,) = pictures(1, 40, 30)
    vlm_judge.load(judge_url=judge.url)({"image": [image]}, ["a"], [{}])
    assert (seen[-1][0] == image).all()
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    vlm_judge.load(judge_url=judge.url)({"image": [np.asarray(Image.open(file))]}, ["a"], [{}])
    assert (seen[-1][0] == image).all()

    part = vlm_judge.image_part(image, max_pixels=300)
    small = np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))
    assert small.shape == (20, 15, 3)  # half of each side, of a quarter of the area
    assert (small == np.asarray(Image.fromarray(image).resize((15, 20), Image.Resampling.BICUBIC))).all()
    assert vlm_judge.image_part(np.zeros((1, 5000, 3), np.uint8), max_pixels=100) is not None


def test_roles_are_sent_in_their_order(judge):
    judge.answer = lambda text, images, body: tokens({"Yes": brightness(images[0]), "No": brightness(images[1])})
    source, image = pictures(2)
    image = image // 4
    question = "Edited as told: {prompt}?"
    score = vlm_judge.load(judge_url=judge.url, question=question, roles=("source", "image"), extra={"seed": 7})
    got = score({"image": [image], "source": [source]}, ["x"], [{}])
    expected = brightness(source) / (brightness(source) + brightness(image))
    torch.testing.assert_close(got, torch.tensor([expected]), atol=1e-6, rtol=0)
    assert score.needs == ("source", "image") and judge.bodies[-1]["seed"] == 7
    with pytest.raises(ValueError, match="vlm_judge: 2 of role 'source' for 1 prompts"):
        score({"image": [image], "source": [source] * 2}, ["x"], [{}])


def test_passing_failures_are_tried_again(judge):
    codes, tries = [503, 500, 429, 502], {}

    def answer(text, images, body):
        with judge.lock:
            tries[text] = tries.get(text, 0) + 1
        return codes[tries[text] - 1] if tries[text] <= len(codes) else by_brightness(text, images, body)

    judge.answer = answer
    images = pictures(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of: all were judged in the end
        got = vlm_judge.load(judge_url=judge.url, retries=4)({"image": images}, ["a", "b", "c"], [{}] * 3)
    torch.testing.assert_close(got, torch.tensor([brightness(i) for i in images]), atol=1e-6, rtol=0)
    assert sorted(tries.values()) == [5, 5, 5]


@pytest.mark.parametrize(
    "bad, why",
    [
        (503, "HTTP 503"),
        (400, "HTTP 400 Bad Request .*as told"),
        (tokens({"<think>": 0.9, "The": 0.1}), "neither yes nor no"),
        (written("Yes"), "no log-probs"),
        (b"<html>not json</html>", "Expecting value"),
        (b'{"choices": []}', "not that of an OpenAI-compatible endpoint"),
        (b'{"error": {"message": "out of memory"}}', "not that of an OpenAI-compatible endpoint"),
        (b"[1, 2]", "not that of an OpenAI-compatible endpoint"),
    ],
)
def test_a_failed_item_is_nan_and_the_others_are_not(judge, bad, why):
    judge.answer = lambda text, images, body: bad if "two" in text else by_brightness(text, images, body)
    images = pictures(3)
    with pytest.warns(UserWarning, match=f"vlm_judge: 1 of 3 not judged, e.g. .*{why}"):
        got = vlm_judge.load(judge_url=judge.url, retries=2)({"image": images}, ["one", "two", "three"], [{}] * 3)
    assert got.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(got[2], torch.tensor(brightness(images[2])), atol=1e-6, rtol=0)
    assert len(judge.bodies) == (5 if bad == 503 else 3)  # only what may pass is tried again


def test_a_judge_that_hangs_is_cut_off(judge):
    released = threading.Event()

    def answer(text, images, body):
        if "two" in text:
            released.wait(10)
        return by_brightness(text, images, body)

    judge.answer = answer
    score, start = vlm_judge.load(judge_url=judge.url, timeout=0.3, retries=1), time.monotonic()
    with pytest.warns(UserWarning, match="1 of 2 not judged, e.g. .*timed out"):
        got = score({"image": pictures(2)}, ["one", "two"], [{}] * 2)
    released.set()
    assert got.isnan().tolist() == [False, True] and time.monotonic() - start < 3


def test_unusable_items_are_nan_and_never_sent(judge):
    judge.answer = by_brightness
    good = pictures(1)[0]
    images = [good, good.astype(float), None, good[0], good[..., :2], good]
    with pytest.warns(UserWarning, match="5 of 6 not judged"):
        got = vlm_judge.load(judge_url=judge.url)({"image": images}, ["a"] * 5 + [None], [{}] * 6)
    assert got.isnan().tolist() == [False] + [True] * 5 and len(judge.bodies) == 1
    with pytest.warns(UserWarning, match="1 of 1 not judged"):
        assert vlm_judge.load(judge_url=judge.url)({"image": [None]}, ["a"], [{}]).isnan().all()


def test_a_judge_that_died_stops_the_run(judge):
    judge.answer = by_brightness
    score = vlm_judge.load(judge_url=judge.url, retries=1)
    judge.answer = lambda *_: 503
    with pytest.raises(RuntimeError, match="vlm_judge: no answer from the judge at http://127.*HTTP 503"):
        score({"image": [*pictures(2), None]}, ["a", "b", "c"], [{}] * 3)
    judge.answer = lambda *_: 404
    with pytest.raises(RuntimeError, match="vlm_judge: the judge at http://127.* refuses: HTTP 404 Not Found"):
        score({"image": pictures(2)}, ["a", "b"], [{}] * 2)
    judge.shutdown()
    judge.server_close()
    with pytest.raises(RuntimeError, match="no answer from the judge .*refused"):
        score({"image": pictures(2)}, ["a", "b"], [{}] * 2)


def test_load_names_what_is_wrong_with_the_endpoint(judge, monkeypatch):
    with pytest.raises(ValueError, match="vlm_judge: no endpoint given, e.g. --judge-url http://"):
        vlm_judge.load()
    with pytest.raises(ValueError, match="vlm_score: judge url 'localhost:8000'"):
        vlm_judge.load_score(judge_url="localhost:8000")
    with pytest.raises(ValueError, match="the question has no {prompt}"):
        vlm_judge.load(judge_url=judge.url, question="Nice?")
    with pytest.raises(RuntimeError, match="no judge answers at http://127.0.0.1:9/v1: .*refused.*\n.*vllm serve"):
        vlm_judge.load(judge_url="http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="serves judge-7b: not other"):
        vlm_judge.load(judge_url=judge.url, judge_model="other")
    judge.models = ["a", "b"]
    with pytest.raises(RuntimeError, match="serves a, b: give one of them with --judge-model"):
        vlm_judge.load(judge_url=judge.url)
    with pytest.raises(RuntimeError, match="no judge answers at .*: HTTP 404"):
        vlm_judge.load(judge_url=judge.url.replace("/v1", "/v2"))

    judge.models, judge.answer = None, by_brightness  # an endpoint without a list of models: the name is believed
    for url in (judge.url, judge.url + "/", judge.url.removesuffix("/v1"), judge.url + "/chat/completions"):
        vlm_judge.load(judge_url=url, judge_model="mine")({"image": pictures(1)}, ["a"], [{}])
    assert [body["model"] for body in judge.bodies] == ["mine"] * 4

    judge.models, judge.key = ["judge-7b"], "secret"
    with pytest.raises(RuntimeError, match="HTTP 401") as error:
        vlm_judge.load(judge_url=judge.url)
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    score = vlm_judge.load(judge_url=judge.url)
    assert score({"image": pictures(1)}, ["a"], [{}]).isfinite().all() and "secret" not in str(error.value)


def test_parsed_number_takes_the_last_and_not_what_was_thought():
    read = vlm_judge.parsed_number(r"score:\s*(\d+(?:\.\d+)?)")
    assert read(written("Score: 1\nno, score: 3.25")) == 3.25
    assert read(written("<think>Score: 1 or</think> Score: 2")) == 2
    for text in ("nothing", "", None, "<think>Score: 4</think> none"):
        with pytest.raises(ValueError):
            read(written(text))
    with pytest.raises(ValueError, match="was cut"):
        read(written("Score: 4") | {"finish_reason": "length"})


# ---------------------------------------------------------------------------------------------------------------------
# unifiedreward

# The form in which UnifiedReward 2.0 answers: real numbers, one aspect a line.
ACS = "\nAlignment Score (1-5): 2.6912500858\nCoherence Score (1-5): 2.375\nStyle Score (1-5): 3\n"


def test_unifiedreward_is_the_mean_of_three_lines(judge, template):
    judge.answer = lambda *_: written(ACS)
    score = unifiedreward.load(judge_url=judge.url, template=template)
    got = score({"image": pictures(2)}, ["a cat", "b"], [{}] * 2)
    expected = (2.6912500858 + 2.375 + 3) / 15
    torch.testing.assert_close(got, torch.full((2,), expected), atol=1e-6, rtol=0)
    body = next(body for body in judge.bodies if "a cat" in str(body))
    assert body["messages"][0]["content"][-1]["text"] == "Rate a cat (ours)." and body["temperature"] == 0
    assert "logprobs" not in body and score.needs == ("image",) and score.strict is None


@pytest.mark.parametrize(
    "text",
    [ACS.replace("Style", "Stile"), ACS.replace("2.37", "72.37"), ACS.replace("2.69", "-2.69"), "", "4, 4, 3", None],
)
def test_unifiedreward_that_cannot_be_read_is_nan(judge, template, text):
    judge.answer = lambda question, *_: written(text if "bad" in question else ACS)
    with pytest.warns(UserWarning, match="unifiedreward: 1 of 2 not judged"):
        got = unifiedreward.load(judge_url=judge.url, template=template)({"image": pictures(2)}, ["a", "bad"], [{}] * 2)
    assert got.isnan().tolist() == [False, True]


def test_unifiedreward_v1_is_the_final_score(judge, template):
    answers = {"a": "cat (animal): 1\nFinal Score: 4", "b": "**Final Score:** 3.5", "c": "Final Score: 7", "d": "4"}
    judge.answer = lambda question, *_: written(answers[question.split()[1]])
    score = unifiedreward.load_v1(judge_url=judge.url, template=template)
    with pytest.warns(UserWarning, match="unifiedreward_v1: 2 of 4"):
        got = score({"image": pictures(4)}, list("abcd"), [{}] * 4)
    torch.testing.assert_close(got, torch.tensor([0.8, 0.7, math.nan, math.nan]), atol=1e-6, rtol=0, equal_nan=True)
    assert "Rate a once." in {body["messages"][0]["content"][-1]["text"] for body in judge.bodies}


def test_unifiedreward_edit_joins_following_and_quality(judge, template):
    image, source, spoiled = pictures(3)

    def answer(text, images, body):
        if text == "Natural?":
            (shown,) = images
            return written('{"reasoning": "x", "score": [9, 16]}' if (shown == image).all() else "no idea")
        assert text == 'As told by {"score": [a, b]}? make it red\n' and (images[0] == source).all()
        return written('Well: {"reasoning": "a "stray" quote", "score": [25, 16]}')

    judge.answer = answer
    score = unifiedreward.load_edit(judge_url=judge.url, template=template)
    samples = {"image": [image, spoiled, image], "source": [source, source, source[0]]}
    with pytest.warns(UserWarning, match="unifiedreward_edit: 2 of 6"):
        got = score(samples, ["make it red"] * 3, [{}] * 3)
    torch.testing.assert_close(got[0], torch.tensor(math.sqrt(16 * 9) / 25), atol=1e-6, rtol=0)
    assert got.isnan().tolist() == [False, True, True] and score.needs == ("image", "source")
    with pytest.raises(ValueError, match="unifiedreward_edit: 2 pictures, 1 sources for 2 instructions"):
        score({"image": [image] * 2, "source": [source]}, ["a", "b"], [{}] * 2)
    for text in (
        '{"score": [26, 1]}',
        '{"score": [1]}',
        '{"score": ["1", 2]}',
        '{"score": 3}',
        "{}",
        '{"score": [NaN, 1]}',
    ):
        with pytest.raises(ValueError):
            unifiedreward.lower_of_two(written(text))


@pytest.mark.parametrize("load", [unifiedreward.load, unifiedreward.load_v1, unifiedreward.load_edit])
def test_unifiedreward_without_its_template_says_how_to_fetch_it(judge, monkeypatch, tmp_path, load):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="unifiedreward: not ready.*\n.*python -m rewards fetch unifiedreward$"):
        load(judge_url=judge.url)
