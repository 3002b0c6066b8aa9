"""
One training iteration of rloo.py against one of TRL's RLOOTrainer, on a CPU: seconds and peak memory.

    pip install trl                                  # 1.16; nothing else here needs it
    python benchmarks/vs_trl.py                      # both vocabularies, about 20 minutes on 4 idle cores
    python benchmarks/vs_trl.py --vocab 2000 --rounds 5

An iteration is rollout, reward, log-probs, loss, backward pass and optimizer step. Both sides get one model folder
(Qwen2, 256 wide, 4 layers, random weights, no end token), prompts of 6 tokens, 8 prompts x 4 completions of exactly 64
tokens at temperature 1, the reward `format` (some tokens are an answer in tags, so that rewards differ), all 32
completions in one forward pass, one AdamW step, fp32, no KL, no gradient checkpointing, no logging. TRL keeps its
defaults otherwise, among them AdamW in one fused kernel. An end token that TRL insists on lies outside of the
vocabulary.

Each run is a process of its own, ours and TRL's by turns. A time is that between the ends of two iterations, whatever
happens in between; ours includes the line of metrics.jsonl, which cannot be switched off. Sampling is what rloo.py
calls seconds_rollout, encoding and decoding included, and `generate` alone on TRL's side. CPU seconds, summed over
threads, say more than wall time where other programs run. Peak memory is all of the process (Linux), Python and
libraries included, over the timed iterations.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

PROMPTS, GROUP, TOKENS, WARMUP = 8, 4, 64, 2  # WARMUP iterations are not counted
LEARNING_RATE = 1e-5
GOALS = {2000: "at least 1.3 times as fast", 151_936: "at least 2 times as fast with at most 50% of the memory"}


def build(folder, vocabulary):
    """Write a random Qwen2 and its tokenizer, which has no end token; every 64th of its tokens is an answer in tags."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast

    pieces = ["<|pad|>", *"0123456789+="]
    pieces += [f"<answer>{i}</answer>" if i % TOKENS == 0 else f"\u0120w{i}" for i in range(len(pieces), vocabulary)]
    Qwen2TokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        pad_token="<|pad|>",
        eos_token=None,
        unk_token=None,
        padding_side="left",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
        model_max_length=128,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# In the process of one run


class Clock:
    """Wall and CPU time at the end of every iteration; memory from the end of the warm-up on."""

    def __init__(self):
        self.ends, self.before = [], status("VmRSS")

    def tick(self):
        self.ends.append((time.perf_counter(), time.process_time()))
        if len(self.ends) == WARMUP:
            with open("/proc/self/clear_refs", "w") as f:  # what VmHWM says later starts from here
                f.write("5")

    def report(self, sampling):
        """What one run measured, medians over its timed iterations. sampling: seconds of all iterations."""
        peak, ends = status("VmHWM"), self.ends[WARMUP - 1 :]
        seconds, cpu = ([b - a for a, b in zip(times, times[1:])] for times in zip(*ends))
        return dict(
            seconds=statistics.median(seconds),
            fastest=min(seconds),
            cpu=statistics.median(cpu),
            sampling=statistics.median(sampling[WARMUP:]),
            peak=peak,
            before=self.before,
        )


def status(name):
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024


def run_ours(folder, iterations):
    """rloo.py from its own `main`, left after the last timed iteration: a checkpoint would follow."""
    import rewards  # noqa: F401  (for the memory before the model)
    import rloo
    from models import run_folder

    class Done(Exception):
        pass

    clock, rows, append = Clock(), [], run_folder.append

    def timed_append(run, row):
        append(run, row)
        clock.tick()
        rows.append(row)
        if len(rows) == WARMUP + iterations:
            raise Done

    run_folder.append = timed_append
    with tempfile.TemporaryDirectory() as out:
        args = replace(
            rloo.recipe("tiny-qwen"),
            lm=folder,
            reward=("format",),
            out=os.path.join(out, "run"),
            num_iterations=10**6,
            num_prompts=PROMPTS,
            group_size=GROUP,
            micro_batch_size=PROMPTS * GROUP,
            max_new_tokens=TOKENS,
            learning_rate=LEARNING_RATE,
            eval_every=10**6,
            eval_size=1,
            save_every=10**6,
        )
        try:
            rloo.main(args)
        except Done:
            pass
    assert all(row["length"] == TOKENS for row in rows), "a completion of ours was not 64 tokens long"
    return clock.report([row["seconds_rollout"] for row in rows])


def run_trl(folder, iterations):
    """TRL's trainer with everything off that can be."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    import rewards
    from data import arithmetic

    clock, sampling, lengths, score = Clock(), [], set(), rewards.load("format")

    def reward(prompts, completions, completion_ids, **_):
        lengths.update(len(ids) for ids in completion_ids)
        return score({"text": completions}, prompts, None).tolist()

    class Ticker(TrainerCallback):
        def on_step_end(self, *args, **_):
            clock.tick()

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})  # one id past the vocabulary of the model
    with tempfile.TemporaryDirectory() as out:
        trainer = RLOOTrainer(
            model=folder,
            reward_funcs=reward,
            args=RLOOConfig(
                output_dir=out,
                model_init_kwargs={"dtype": "float32"},
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=PROMPTS * GROUP,
                num_generations=GROUP,
                steps_per_generation=1,
                num_iterations=1,
                max_completion_length=TOKENS,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                beta=0.0,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_steps=WARMUP + iterations,
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": problem["prompt"]} for problem in arithmetic.train_problems()]),
            processing_class=tokenizer,
            callbacks=[Ticker()],
        )
        generate = trainer.model.generate

        def timed_generate(*args, **kwargs):
            started = time.perf_counter()
            result = generate(*args, **kwargs)
            sampling.append(time.perf_counter() - started)
            return result

        trainer.model.generate = timed_generate
        trainer.train()
    assert lengths == {TOKENS}, f"completions of TRL's were {lengths} tokens long"
    return clock.report(sampling)


# ----------------------------------------------------------------------------------------------------------------------


def run(side, folder, args):
    """Start one run and return what it measured."""
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1")
    command = [sys.executable, os.path.abspath(__file__), "--side", side, "--folder", folder]
    done = subprocess.run([*command, "--iterations", str(args.iterations)], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"error: the run of {side} failed:\n" + done.stdout[-1000:] + done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def row(vocabulary, side, runs):
    """A row of the table: medians over rounds, and the fastest iteration of all."""
    middle = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
    fastest = min(r["fastest"] for r in runs)
    times = f"{middle['seconds']:.3f} | {fastest:.3f} | {middle['sampling']:.3f} | {middle['cpu']:.2f}"
    memory = " | ".join(f"{middle[name] / 2**20:,.0f} MiB" for name in ("peak", "before"))
    return f"| {vocabulary:,} | {side} | {times} | {memory} |"


def ratios(vocabulary, ours, trl):
    """How the sides compare: medians over the rounds, each a pair of neighbours in time."""
    faster, cpu, memory = (
        statistics.median(theirs[name] / mine[name] for mine, theirs in zip(ours, trl))
        for name in ("seconds", "cpu", "peak")
    )
    goal = f" (goal: {GOALS[vocabulary]})" if vocabulary in GOALS else ""
    measured = f"{faster:.2f} times as fast ({cpu:.2f} in CPU time) with {1 / memory:.1%} of the memory"
    return f"vocabulary {vocabulary:,}: {measured}{goal}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[*GOALS], help="vocabularies (default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations of a run (default: 5)")
    parser.add_argument("--threads", type=int, default=4, help="CPU threads of either side (default: 4)")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        sys.exit("error: this benchmark compares with TRL, which is not installed: pip install trl")
    if args.side:
        run_side = {"ours": run_ours, "trl": run_trl}[args.side]
        print("\n" + json.dumps(run_side(args.folder, args.iterations)))
        return

    import transformers
    import trl

    rows, summary = [], []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * args.rounds * len(args.vocab), leave=False) as bar:
        for vocabulary in args.vocab:
            model = os.path.join(folder, str(vocabulary))
            build(model, vocabulary)
            runs = {"ours": [], "trl": []}
            for _ in range(args.rounds):
                for side in runs:
                    bar.set_postfix_str(f"{vocabulary:,}, {side}")
                    runs[side].append(run(side, model, args))
                    bar.update()
            rows += [row(vocabulary, "rloo.py", runs["ours"]), row(vocabulary, "TRL", runs["trl"])]
            summary.append(ratios(vocabulary, runs["ours"], runs["trl"]))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    print(f"CPU, {args.threads} threads; {versions}; {args.rounds} rounds of {args.iterations} iterations\n")
    print("| vocabulary | by | s / iteration | fastest | of which sampling | CPU s | peak memory | before the model |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows), end="\n\n")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
