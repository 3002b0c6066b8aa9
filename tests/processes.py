"""
Functions in fresh processes, alone or as the ranks of a process group: for tests of what a process does once (a process
group, signal handlers, the whole of a script's main) and of what several ranks must agree on.

    results = processes.run(target, *args, ranks=2)        # [target(*args) of rank 0, of rank 1]
    ranks = processes.start(target, *args, ranks=2)        # running; for tests that kill or signal them

Processes are forked from a server that has imported the heavy packages once (5 s), so that each starts in 20 ms.
`target` must be a function at the top of a test module. A process finds the environment that torchrun would give it
(RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or none of it where ranks = 1, as in
`python flow_grpo.py`; the store that the ranks meet in is the test's own, so that no port is guessed.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from multiprocessing import connection

import torch
from torch.distributed import TCPStore

# Before the server starts: parallel.init looks in the launcher's environment for whether the user chose the threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "safetensors.torch", "pytest"),
        *("diffusers.pipelines.flux.pipeline_flux", "transformers.models.t5.modeling_t5", "peft", "PIL.Image"),
        *("transformers.models.clip.modeling_clip", "matplotlib.figure", "matplotlib.backends.backend_agg"),
        *("diffusers.loaders", "flow_grpo", "models.flux", "models.tiny", "rewards.jpeg", "rewards.shapes"),
    ]
)


def start(target, *args, ranks=1, threads=1, folder=None):
    """target(*args) in `ranks` new processes of `threads` CPU threads each; returns the multiprocessing.Process of each
    rank, in rank order, already running.

    Their exit codes are those of a script: 0, what SystemExit says, 1 for any other error, minus the signal that killed
    them. They die with the test process at the latest. With `folder` (an existing directory), rank r writes what it
    prints to folder/rank-<r>.txt and what target returned or raised to folder/rank-<r>.pickle.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
    started = []
    for rank in range(ranks):
        environment = {"OMP_NUM_THREADS": threads}
        if store:
            environment |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
            environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port)
            # What torchrun says to its ranks: the store is the launcher's, do not open one in rank 0.
            environment |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=0)
        environment = {name: str(value) for name, value in environment.items()}
        process = context.Process(target=_rank, args=(target, args, rank, threads, environment, folder), daemon=True)
        process.start()
        process.store = store  # lives as long as the ranks need it
        started.append(process)
    return started


def run(target, *args, ranks=1, threads=1, timeout=120):
    """target(*args) in `ranks` new processes; returns what each returned (anything that can be pickled), in rank order.

    What a rank raises, SystemExit too, is raised here, with the rank's traceback and output as its cause, and the other
    ranks are killed. RuntimeError if a rank died without raising, TimeoutError after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start(target, *args, ranks=ranks, threads=threads, folder=folder)
        try:
            deadline, running = time.monotonic() + timeout, list(processes)
            while running:
                if not connection.wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"{target.__name__}: {timeout} s have passed\n{_output(folder, 0)}")
                running = [p for p in running if p.is_alive()]
                for rank, process in enumerate(processes):
                    if process.exitcode:
                        _raise(folder, rank, process.exitcode)
            return [_result(folder, rank)[1] for rank in range(ranks)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(target, args, rank, threads, environment, folder):
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if folder:
        sys.stdout.flush()
        output = os.open(os.path.join(folder, f"rank-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable(2)
    try:
        result = ("returned", target(*args), None)
    except BaseException as error:
        _write(folder, rank, ("raised", error, traceback.format_exc()))
        raise
    _write(folder, rank, result)


def _write(folder, rank, result):
    if folder:
        try:
            data = pickle.dumps(result)
            pickle.loads(data)
        except Exception:  # an error whose constructor takes something else than its message
            data = pickle.dumps(("raised", RuntimeError(f"cannot be pickled: {result[1]!r}"), result[2]))
        with open(os.path.join(folder, f"rank-{rank}.pickle"), "wb") as f:
            f.write(data)


def _result(folder, rank):
    with open(os.path.join(folder, f"rank-{rank}.pickle"), "rb") as f:
        return pickle.load(f)


def _output(folder, rank):
    with open(os.path.join(folder, f"rank-{rank}.txt"), errors="replace") as f:
        return f.read()[-4000:]


def _raise(folder, rank, exitcode):
    if not os.path.exists(os.path.join(folder, f"rank-{rank}.pickle")):
        raise RuntimeError(f"rank {rank} died with exit code {exitcode}\n{_output(folder, rank)}")
    _, error, trace = _result(folder, rank)
    raise error from RuntimeError(f"rank {rank}:\n{trace}\n{_output(folder, rank)}")
