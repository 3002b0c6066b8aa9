"""A vision-language model as the judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, ...).

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000          # then: --judge-url http://localhost:8000/v1

    vlm_judge   P(yes) / (P(yes) + P(no)) of the first answer token, to "does the picture show the prompt?"
    vlm_score   the expected level 1 .. 5 over the first answer token, (level - 1) / 4

Both are continuous in the picture and cost one answer token: levels that are parsed from a greedy answer tie, and a
group of ties has no advantage. A judge can be talked to: writing in the picture, or a prompt, that tells it to say yes
is the known hack.

Answers come with log-probs of the 20 likeliest tokens; where neither yes nor no (no level) is among them the item is
NaN. That is what a model does that thinks before it answers: switch thinking off, extra={"chat_template_kwargs":
{"enable_thinking": False}}. The key, if the endpoint wants one, is read from the environment: JUDGE_API_KEY. Proxies of
the environment are not used.
"""

import base64
import http.client
import io
import json
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

CONCURRENCY = 32  # requests in flight
TIMEOUT = 120.0  # seconds for one request
RETRIES = 4  # after the first try, where the failure may pass
BACKOFF = 0.5  # seconds before the first retry, doubled each time up to MAX_WAIT, +- 50 %
MAX_WAIT = 20.0
MAX_PIXELS = 1024 * 1024  # larger pictures are resized: the judge's context is finite
PASSING = 408, 429, 500, 502, 503, 504  # HTTP errors worth a retry; 401, 403, 404, 405 stop the run, others are NaN
FATAL = 401, 403, 404, 405

QUESTION = (
    "Does this picture show the following, with every object, number, colour and relation as described?\n"
    "Description: {prompt}\n"
    "Answer with one word, Yes or No."
)
SCORE_QUESTION = (
    "How well does this picture match the following description? 1 = not at all, 3 = partly, 5 = in every detail.\n"
    "Description: {prompt}\n"
    "Answer with one digit from 1 to 5."
)


def picture(image):
    """The uint8 array [H, W, 3] (or anything that converts to one) as a PIL picture; None if it is no such thing."""
    try:
        array = np.asarray(image)
    except (TypeError, ValueError):
        return None
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        return None
    return Image.fromarray(array)


def image_part(image, max_pixels=MAX_PIXELS):
    """One picture as a part of a chat message, PNG in a data URL; None if it is no uint8 [H, W, 3]."""
    shown = picture(image)
    if shown is None:
        return None
    scale = math.sqrt(max_pixels / (shown.width * shown.height))
    if scale < 1:
        size = [max(1, int(side * scale)) for side in shown.size]
        shown = shown.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    shown.save(file, format="PNG", compress_level=1)  # level 6 takes five times as long for a tenth less
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def message(images, text, prompt, placeholder="{prompt}"):
    """The content of the user turn: pictures, then text with `placeholder` replaced. None if an item is unusable."""
    parts = [image_part(image) for image in images]
    if None in parts or not isinstance(prompt, str):
        return None
    return [*parts, {"type": "text", "text": text.replace(placeholder, prompt)}]


def first_token(choice):
    """{canonical token: probability} of the 20 likeliest first tokens: "Yes", " yes" and "YES." are all "yes"."""
    content = (choice.get("logprobs") or {}).get("content")
    if not content:
        raise ValueError("the answer has no log-probs")
    probabilities = {}
    for entry in content[0]["top_logprobs"]:
        token = entry["token"].strip(" \t\r\n\u2581\u0120.,:;!*\"'").lower()
        probabilities[token] = probabilities.get(token, 0.0) + math.exp(entry["logprob"])
    return probabilities


def p_yes(choice):
    """P(yes) / (P(yes) + P(no)) of the first token. ValueError if neither is among the likeliest."""
    probabilities = first_token(choice)
    yes, no = probabilities.get("yes", 0.0), probabilities.get("no", 0.0)
    if not yes + no > 0:
        raise ValueError(f"neither yes nor no among the first tokens {list(probabilities)[:5]}")
    return yes / (yes + no)


def expected_level(choice, levels=5):
    """(E[level] - 1) / (levels - 1) over the digits of the first token. ValueError if there is no level among them."""
    probabilities = first_token(choice)
    weights = [probabilities.get(str(level), 0.0) for level in range(1, levels + 1)]
    if not sum(weights) > 0:
        raise ValueError(f"no level 1 to {levels} among the first tokens {list(probabilities)[:5]}")
    return sum(weight * k for k, weight in enumerate(weights)) / sum(weights) / (levels - 1)


def answer_text(choice):
    """The text of an answer, what a thinking model thought taken off. ValueError if there is none or it was cut."""
    text = choice["message"]["content"]
    if choice.get("finish_reason") == "length":
        raise ValueError("the answer was cut at max_completion_tokens")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the answer is empty")
    return text.rpartition("</think>")[2]


def parsed_number(pattern):
    """A reader of answers: the float that the group of `pattern` catches last. ValueError if it does not match."""

    def read(choice):
        found = re.findall(pattern, answer_text(choice), re.IGNORECASE)
        if not found:
            raise ValueError(f"nothing like {pattern!r} in the answer {answer_text(choice)[-80:]!r}")
        return float(found[-1])

    return read


def connect(name, url, model=None, concurrency=CONCURRENCY, timeout=TIMEOUT, retries=RETRIES):
    """Client of an OpenAI-compatible endpoint: returns ask(contents, read, **body) -> float32 [B].

    url: http://host:port or with the path up to /v1. model: None = the only one it serves.
    contents: list of B user messages (None = unusable item, NaN). read: function of choices[0] -> float, ValueError
    where the answer cannot be used (NaN). body: more fields of the request. Order of results = order of contents.

    Raises ValueError without a usable url, RuntimeError if no such endpoint answers now or it does not serve `model`.
    ask raises RuntimeError where the endpoint refuses (wrong key, path or model), or none of the requests got through.
    """
    if not url:
        raise ValueError(f"{name}: no endpoint given, e.g. --judge-url http://localhost:8000/v1")
    if not re.match(r"https?://[^/]+", url):
        raise ValueError(f"{name}: judge url {url!r}: expected http://host:port/v1")
    url = url.rstrip("/").removesuffix("/chat/completions")
    url += "" if "/" in url.partition("://")[2] else "/v1"
    headers = {"Content-Type": "application/json"}
    if os.environ.get("JUDGE_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['JUDGE_API_KEY']}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(path, body=None):
        """The JSON of the reply. OSError (its `code`, if any, is the HTTP status), ValueError if it is no JSON."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with opener.open(urllib.request.Request(url + path, data, headers), timeout=timeout) as reply:
                return json.loads(reply.read())
        except http.client.HTTPException as error:  # e.g. the connection broke within the reply
            raise OSError(f"{type(error).__name__}: {error}") from None

    def reason(error):
        if not isinstance(error, urllib.error.HTTPError):
            return str(getattr(error, "reason", error)) or type(error).__name__
        try:
            detail = " ".join(error.read().decode("utf-8", "replace").split())[:200]
        except (OSError, http.client.HTTPException):
            detail = ""
        return f"HTTP {error.code} {error.reason} {detail}".rstrip()

    try:
        served = [entry["id"] for entry in post("/models")["data"]]
    except OSError as error:
        if getattr(error, "code", None) not in (404, 405) or model is None:  # some endpoints do not list their models
            raise RuntimeError(
                f"{name}: no judge answers at {url}: {reason(error)}.\n"
                "Start one, e.g. vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000, and give its --judge-url"
            ) from None
        served = [model]
    except (ValueError, TypeError, KeyError):
        raise RuntimeError(f"{name}: {url}/models is not that of an OpenAI-compatible endpoint") from None
    if model is None and len(served) == 1:
        model = served[0]
    if model not in served:
        what = "give one of them with --judge-model" if model is None else f"not {model}"
        raise RuntimeError(f"{name}: the judge at {url} serves {', '.join(served) or 'nothing'}: {what}")

    def ask_one(content, read, body):
        """(score, None), (NaN, why), or (None, why) where no answer came."""
        if content is None:
            return math.nan, "not a uint8 picture [H, W, 3] with a prompt that is a str"
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0.0, **body}
        for attempt in range(retries + 1):
            wait = min(BACKOFF * 2**attempt, MAX_WAIT) * random.uniform(0.5, 1.5)
            try:
                score = float(read(post("/chat/completions", body)["choices"][0]))
                return (score, None) if math.isfinite(score) else (math.nan, f"the score is {score}")
            except OSError as error:
                code, why = getattr(error, "code", None), reason(error)
                if code in FATAL:
                    raise RuntimeError(f"{name}: the judge at {url} refuses: {why}") from None
                if code is not None and code not in PASSING:
                    return math.nan, why
                after = error.headers.get("Retry-After", "") if code is not None else ""
                wait = min(float(after), MAX_WAIT) if after.isdigit() else wait
            except ValueError as error:
                return math.nan, str(error)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                return math.nan, f"the reply is not that of an OpenAI-compatible endpoint ({error!r})"
            if attempt < retries:
                time.sleep(wait)
        return None, why

    def ask(contents, read, **body):
        pool = ThreadPoolExecutor(max_workers=concurrency)
        try:
            results = list(pool.map(lambda content: ask_one(content, read, body), contents))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        failed = [why for score, why in results if why is not None]
        asked = [score for content, (score, _) in zip(contents, results) if content is not None]
        if asked and all(score is None for score in asked):
            raise RuntimeError(
                f"{name}: no answer from the judge at {url}: {next(why for score, why in results if score is None)}"
            )
        if failed:
            warnings.warn(f"{name}: {len(failed)} of {len(results)} not judged, e.g. {failed[0]}", stacklevel=3)
        return torch.tensor([math.nan if score is None else score for score, _ in results], dtype=torch.float32)

    return ask


def _judge(name, read, question, roles, judge_url, judge_model, extra, options):
    if "{prompt}" not in question:
        raise ValueError(f"{name}: the question has no {{prompt}}")
    ask = connect(name, judge_url, judge_model, **options)

    def score(samples, prompts, metadata):
        for role in roles:
            if len(samples[role]) != len(prompts):
                raise ValueError(f"{name}: {len(samples[role])} of role {role!r} for {len(prompts)} prompts")
        contents = [message(images, question, p) for *images, p in zip(*(samples[role] for role in roles), prompts)]
        return ask(contents, read, max_completion_tokens=1, logprobs=True, top_logprobs=20, **(extra or {}))

    score.needs, score.strict = tuple(roles), None
    return score


def load(device="cpu", judge_url=None, judge_model=None, question=QUESTION, roles=("image",), extra=None, **options):
    """P(yes) that the judge gives `question` about each sample, 0 .. 1. The judge runs elsewhere, whatever `device` is.

    question: text with {prompt}. roles: which pictures of the sample it sees, in this order, e.g. ("source", "image").
    extra: more fields of the request. options: concurrency, timeout (s), retries of `connect`, which raises.
    """
    return _judge("vlm_judge", p_yes, question, roles, judge_url, judge_model, extra, options)


def load_score(
    device="cpu", judge_url=None, judge_model=None, question=SCORE_QUESTION, roles=("image",), extra=None, **options
):
    """The expected level 1 .. 5 in the judge's answer, as (level - 1) / 4 in 0 .. 1. Arguments as for `load`."""
    return _judge("vlm_score", expected_level, question, roles, judge_url, judge_model, extra, options)
