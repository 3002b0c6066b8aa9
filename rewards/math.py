r"""Is the answer of a reply right? 1 or 0; metadata["answer"] holds what is.

Whole numbers, {"answer": 19}: the reply has to give that number in digits. Nothing is computed, so that repeating the
question, "12 + 7", is no answer to it.

Text, {"answer": "\\frac{1}{2}"}: equal as strings or whole numbers, or else equivalent by math-verify
(https://github.com/huggingface/Math-Verify): 0.5, 1/2, $\frac{2}{4}$. It may come with its working: the answer is what
GSM8K's "####" or MATH's \boxed{} marks in that. What is not mathematics, such as (A), is compared as a string.

A reply makes one guess: the content of its last <answer>...</answer>; of the last \boxed{} in there or, without tags,
in the whole reply; what follows the last "####"; or else the last number or expression of it. Thoughts do not count.

math-verify runs in processes of its own: its own time limit wants the main thread and does not interrupt a power tower
such as 9^9^9^9. One item gets TIME_LIMIT; where that does not do, and where the process dies, it is NaN.
"""

import importlib.util
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# torch is imported in `load`: the processes that run math-verify also load this file, and do without.

TIME_LIMIT = 5.0  # seconds of processor time an item, so that a busy machine does not change rewards
MEMORY_LIMIT = 4 * 2**30  # bytes of address space a process
TAIL = 1000  # characters at the end of a reply without any mark in which its answer is looked for


def boxed(text):
    r"""The content of the last \boxed{...} or \fbox{...} with balanced braces, or of \boxed 5, which goes up to the
    next $ sign or line break, as some solutions of MATH have it; None if there is none."""
    marks = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    rest = text[marks[-1].end() :] if marks else ""
    if marks and not rest.startswith("{") and marks[-1].group()[-1].isspace():
        return re.split(r"[$\n]", rest)[0].strip().removesuffix(".") or None
    depth = 0
    for k, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:k].strip() if k else None
    return None


def marked(text):
    """What `text` marks as its answer, by \\boxed{} or "####"; None if it does not."""
    inside = boxed(text)
    if inside is None and "####" in text:
        inside = text.rpartition("####")[2].strip().partition("\n")[0].strip()
    return inside


def integer(text):
    """The int that `text` spells, maybe with $ signs, thousands separators or ".00"; None if it is none."""
    text = text.strip().strip("*$").replace("\u2212", "-").replace("{,}", ",")
    if not re.fullmatch(r"[+-]?([0-9]{1,400}|[0-9]{1,3}(,[0-9]{3}){1,100})(\.0*)?", text):
        return None
    return int(text.partition(".")[0].replace(",", ""))


def last_integer(text):
    """The last word of `text` with a digit in it, split at white space and "=", as an int; None if it is not one."""
    for word in reversed(text.replace("=", " ").split()):
        if any(letter.isdigit() for letter in word):
            return integer(word.strip("*\\()[]:;,.!?\"'"))
    return None


def judge(text, gold):
    """1. or 0. where that needs no mathematics, or else (gold, guess) for math-verify."""
    from rewards.format import answer, reply

    text = reply(text) if answer(text) is None else answer(text)
    guess = marked(text)
    if isinstance(gold, int):
        return float(gold == (last_integer(text) if guess is None else last_integer(guess)))
    gold = marked(gold) or gold.strip()
    if guess is None:
        guess = text if len(text) <= TAIL else text[-TAIL:].partition(" ")[2]
    if not guess.strip():
        return 0.0
    plain = [re.sub(r"[\s$]", "", side) for side in (gold, guess)]
    if plain[0] == plain[1]:
        return 1.0
    numbers = [integer(side) for side in (gold, guess)]
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return gold, guess if boxed(text) is None else f"\\boxed{{{guess}}}"


# ----------------------------------------------------------------------------------------------------------------------
# The process that runs math-verify


def work():
    """Reads JSON lines [gold, guess, seconds] from stdin and writes true or false, until stdin ends."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a verdict
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, guess, seconds = json.loads(line)
        # No handler: at the limit the kernel ends this process, even inside of one long multiplication.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        gold = parse(gold if "$" in gold else f"${gold}$", extraction, parsing_timeout=None)
        readings = [guess if "$" in guess or "\\boxed" in guess else f"${guess}$"]
        # As mathematics "5 apples" is a product of letters, as text it is 5. But "1, 2" would be 2: many guesses.
        if readings[0] != guess and re.search("[A-Za-z]{2}|\n", guess):
            readings.append(guess)
        right = any(verify(gold, parse(g, extraction, parsing_timeout=None), timeout_seconds=None) for g in readings)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(right)), file=replies, flush=True)


class Verifier:
    """One such process, started at the first call and again after it died."""

    process = None

    def __call__(self, gold, guess, seconds):
        """1., 0. or, where the process died on the way, NaN. Raises RuntimeError if it cannot be started."""
        if self.process is None:
            self.start()
        try:
            print(json.dumps([gold, guess, seconds]), file=self.process.stdin, flush=True)
            return float(json.loads(self.process.stdout.readline()))
        except (OSError, ValueError):  # a closed pipe, an empty line
            self.process.kill()
            self.process.communicate()
            self.process = None
            return float("nan")

    def start(self):
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError("math: answers that are not whole numbers need math-verify.\npip install math-verify")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rewards.math"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self.process.stdout.readline() != "ready\n":
            code, self.process = self.process.wait(), None
            raise RuntimeError(f"math: the process that runs math-verify ended at once, with exit code {code}")


def load(device="cpu", num_processes=None, time_limit=TIME_LIMIT):
    """1 where samples["text"] gives metadata["answer"], 0 where it does not; its strict form is itself.

    Runs on the CPU, math-verify in up to `num_processes` (default: 4, or the cores of this rank) processes that are
    started when the first answer needs them and end with this one. Raises RuntimeError then if math-verify is not
    installed, and ValueError for an item without an answer.
    """
    import torch

    if num_processes is None:
        num_processes = max(1, min(4, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    idle = queue.LifoQueue()  # the last one first: a short list of open answers starts few processes
    for _ in range(num_processes):
        idle.put(Verifier())
    pool = ThreadPoolExecutor(num_processes)

    def verify(pair):
        verifier = idle.get()
        try:
            return verifier(*pair, time_limit)
        finally:
            idle.put(verifier)

    def score(samples, prompts, metadata):
        texts = samples["text"]
        if metadata is None or len(metadata) != len(texts):
            got = "none" if metadata is None else len(metadata)
            raise ValueError(f"math: expected one metadata dict with 'answer' per text, got {got} for {len(texts)}")
        verdicts = []
        for k, (text, item) in enumerate(zip(texts, metadata)):
            gold = item.get("answer") if isinstance(item, dict) else None
            gold = str(gold) if isinstance(gold, float) else gold
            if isinstance(gold, bool) or not isinstance(gold, int | str) or gold == "":
                raise ValueError(f"math, item {k}: metadata 'answer': expected a number or a text, got {gold!r}")
            verdicts.append(judge(text, gold) if isinstance(text, str) else torch.nan)
        open_ones = [k for k, verdict in enumerate(verdicts) if isinstance(verdict, tuple)]
        for k, verdict in zip(open_ones, pool.map(verify, [verdicts[k] for k in open_ones])):
            verdicts[k] = verdict
        return torch.tensor(verdicts, dtype=torch.float32)

    score.needs, score.strict = ("text",), score
    return score


if __name__ == "__main__":
    work()
