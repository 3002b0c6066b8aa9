"""
The kernels against what else computes the same, in one table: time, share of the machine's limit, memory, error.

    python benchmarks/kernels.py                    # the GPU if there is one, else the CPU (reference paths)
    python benchmarks/kernels.py --device cpu --only logp

The limit of an SDE step is the bytes that must move (v, x, x' once) over the copy bandwidth measured here; that of a
token log-prob is 2 N V D (forward) or 6 N V D (forward and backward, nothing recomputed) over the matmul rate measured
here. Time is a median; on a CPU it is given relative to a peer (eager, materialised logits), and of a log-prob it is
that of 3 runs, interleaved with the other contestants', each in a process of its own. Memory is the peak above the
inputs, results and gradients included (not measured for SDE steps on a CPU). Errors are against fp64 on the same
inputs.
"""

import argparse
import importlib.util
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from kernels.linear_logp import linear_logp  # noqa: E402
from kernels.sde_step import fold_seed, sde_logp, sde_step  # noqa: E402

SDE_SHAPES = {  # B C h w and B C F h w
    "SD3 512 px": (16, 16, 64, 64),
    "FLUX 1024 px": (16, 16, 128, 128),
    "video 480p, 81 frames": (8, 16, 21, 60, 104),
}
LOGP_SHAPES = {  # tokens, width, vocabulary
    "Qwen2.5-0.5B": (8192, 896, 151_936),
    "Qwen2.5-1.5B": (8192, 1536, 151_936),
    "Qwen2.5-3B": (8192, 2048, 151_936),
    "Qwen2.5-7B": (8192, 3584, 152_064),
    "8192 x 4096 x 131072": (8192, 4096, 131_072),
}
CPU_LOGP_SHAPES = {"Qwen2.5-0.5B, 4096 tokens": (4096, 896, 151_936)}

# ----------------------------------------------------------------------------------------------------------------------
# SDE step. The peers draw their noise with torch.randn, whose values depend on the batch.


def step_formula(v, x, a, b, c, seed):
    col = (-1,) + (1,) * (x.dim() - 1)
    mean = a.view(col) * x + b.view(col) * v.float()
    x_next = mean + c.view(col) * torch.randn_like(x)
    return x_next, logp_formula(v, x, x_next, a, b, c)


def logp_formula(v, x, x_next, a, b, c):
    col = (-1,) + (1,) * (x.dim() - 1)
    z = (x_next - a.view(col) * x - b.view(col) * v.float()) / c.view(col)
    return (-0.5 * z.square() - c.log().view(col) - 0.5 * math.log(2 * math.pi)).mean(tuple(range(1, x.dim())))


def sde_inputs(shape, device):
    g = torch.Generator().manual_seed(0)
    v, x = torch.randn(shape, generator=g).bfloat16().to(device), torch.randn(shape, generator=g).to(device)
    a, b, c = (torch.full(shape[:1], value, device=device) for value in (0.97, -0.12, 0.25))
    return v, x, a, b, c, fold_seed(0, torch.arange(shape[0])).to(device)


def sde_contestants(device):
    """name -> (step, logp)"""
    ours = (sde_step, lambda *args: sde_logp(*args)[0])
    compiled = (torch.compile(step_formula, dynamic=False), torch.compile(logp_formula, dynamic=False))
    return {"ours": ours, "eager": (step_formula, logp_formula), "torch.compile": compiled}


def sde_jobs(step, logp, v, x, a, b, c, seed):
    """op -> (function, bytes an element that must move). What a backward reads and writes is v, x, x' and dv."""
    x_next = step(v, x, a, b, c, seed)[0].clone()
    g = torch.randn(len(x), device=x.device)
    v_grad = v.clone().requires_grad_()

    def train():
        return torch.autograd.grad(logp(v_grad, x, x_next, a, b, c), v_grad, g)[0]

    return {
        "sde_step": (lambda: step(v, x, a, b, c, seed), 10),
        "sde_logp, no gradient": (lambda: logp(v, x, x_next, a, b, c), 10),
        "sde_logp, forward + backward": (train, 22),
    }


def sde_error(op, result, job_inputs):
    """Largest error of log-probs in nats, or relative error of the gradient."""
    v, x, a, b, c, _, x_next = (t.double() for t in job_inputs)
    if op == "sde_step":
        return (result[1] - logp_formula64(v, x, result[0].double(), a, b, c)).abs().max().item()
    if op == "sde_logp, no gradient":
        return (result - logp_formula64(v, x, x_next, a, b, c)).abs().max().item()
    return None


def logp_formula64(v, x, x_next, a, b, c):
    col = (-1,) + (1,) * (x.dim() - 1)
    normal = torch.distributions.Normal(a.view(col) * x + b.view(col) * v, c.view(col).expand_as(x))
    return normal.log_prob(x_next).mean(tuple(range(1, x.dim())))


def bench_sde(device, bandwidth, progress):
    for shape_name, shape in SDE_SHAPES.items():
        inputs = sde_inputs(shape, device)
        for name, (step, logp) in sde_contestants(device).items():
            torch.manual_seed(0)
            for op, (job, bytes_each) in sde_jobs(step, logp, *inputs).items():
                progress.set_postfix_str(f"{op}, {shape_name}, {name}")
                result = job()
                x_next = result[0] if op == "sde_step" else sde_step(*inputs)[0]
                error = sde_error(op, result, (*inputs, x_next)) if name == "ours" or op == "sde_step" else None
                del result
                seconds, peak = measure(job, device)
                share = bytes_each * inputs[1].numel() / bandwidth / seconds
                progress.update()
                yield [op, shape_name, name, seconds, share, peak, "" if error is None else f"{error:.1e} nats"]


# ----------------------------------------------------------------------------------------------------------------------
# Token log-probs


def logp_materialised(hidden, weight, target):
    return -F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")


def logp_torch(hidden, weight, target):
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none")


def logp_liger(hidden, weight, target):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, target)


def logp_contestants(device):
    found = {"ours": linear_logp, "materialised logits": logp_materialised}
    if device == "cuda":
        found["materialised, torch.compile"] = torch.compile(logp_materialised, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13
        found["F.linear_cross_entropy"] = logp_torch
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = logp_liger
    return found


def logp_inputs(shape, device):
    N, D, V = shape
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(N, D, generator=g).to(device, dtype).requires_grad_()
    weight = torch.empty(V, D, device=device, dtype=dtype)
    for rows in weight.split(8192):  # logits of standard deviation 2, as a trained model's have
        rows.copy_(torch.randn(rows.shape, generator=g) * 2 / D**0.5)
    target = torch.randint(V, (N,), generator=g).to(device)
    return hidden, weight.requires_grad_(), target, torch.randn(N, generator=g).to(device)


def logp_errors(logp, hidden, weight, target, rows=64):
    """Largest error of logp in nats over the first rows, against fp64; fp64 in chunks, since it is 4 times as large."""
    h = hidden.detach()[:rows].double()
    z = torch.cat([h @ w.double().T for w in weight.detach().split(16_384)], dim=1)
    want = z.log_softmax(1).gather(1, target[:rows, None]).squeeze(1)
    return (logp[:rows].double() - want).abs().max().item()


def gradient_errors(hidden, weight, target, g, d_hidden, d_weight, rows=64):
    """Relative Frobenius errors of dH (first rows) and dW (first rows) against fp64."""
    W = weight.detach()
    lse = torch.cat(
        [
            torch.cat([h.double() @ w.double().T for w in W.split(16_384)], dim=1).logsumexp(1)
            for h in hidden.detach().split(256)
        ]
    )
    h = hidden.detach()[:rows].double()
    p = torch.cat([h @ w.double().T for w in W.split(16_384)], dim=1).sub_(lse[:rows, None]).exp_()
    pw = sum(p[:, i : i + 16_384] @ W[i : i + 16_384].double() for i in range(0, len(W), 16_384))
    want_h = g[:rows, None] * (W[target[:rows]].double() - pw)
    z = hidden.detach().double() @ W[:rows].double().T
    dz = g[:, None] * ((target[:, None] == torch.arange(rows, device=z.device)).double() - (z - lse[:, None]).exp())
    want_w = dz.T @ hidden.detach().double()
    error_h = (d_hidden[:rows].double() - want_h).norm() / want_h.norm()
    error_w = (d_weight[:rows].double() - want_w).norm() / want_w.norm()
    return f"dH {error_h:.1e}, dW {error_w:.1e}"


def logp_train(function, hidden, weight, target, g):
    logp = function(hidden, weight, target)
    return torch.autograd.grad(logp, (hidden, weight), g.to(logp.dtype))


def bench_logp_cuda(device, flops, progress):
    for shape_name, shape in LOGP_SHAPES.items():
        inputs = logp_inputs(shape, device)
        for name, function in logp_contestants(device).items():
            for op, factor in (("linear_logp, no gradient", 2), ("linear_logp, forward + backward", 6)):
                progress.set_postfix_str(f"{op}, {shape_name}, {name}")

                def job():
                    if factor == 6:
                        return logp_train(function, *inputs)
                    with torch.no_grad():
                        return function(*inputs[:3])

                try:
                    result = job()
                    error = f"{logp_errors(result, *inputs[:3]):.1e} nats" if factor == 2 else ""
                    if factor == 6 and shape_name in ("Qwen2.5-0.5B", "8192 x 4096 x 131072"):
                        error = gradient_errors(*inputs, *result)
                    del result
                    seconds, peak = measure(job, device)
                    share = factor * math.prod(shape) / flops / seconds
                    row = [op, shape_name, name, seconds, share, peak, error]
                except torch.OutOfMemoryError:
                    row = [op, shape_name, name, math.nan, math.nan, math.nan, "out of memory"]
                torch.cuda.empty_cache()
                progress.update()
                yield row


def run_logp_on_cpu(name, shape):
    """In a fresh process: seconds, peak bytes above the inputs, error of logp, of forward + backward."""
    inputs = logp_inputs(shape, "cpu")
    function = logp_contestants("cpu")[name]
    small = logp_inputs((64, 64, 1000), "cpu")
    logp_train(function, *small)  # threads, workspaces
    base = reset_peak()
    started = time.perf_counter()
    logp = function(*inputs[:3])
    gradients = torch.autograd.grad(logp, inputs[:2], inputs[3])
    seconds = time.perf_counter() - started
    peak = peak_memory() - base
    del gradients
    return seconds, peak, logp_errors(logp.detach(), *inputs[:3], rows=16)


def bench_logp_cpu(flops, repeats, progress):
    context = multiprocessing.get_context("spawn")
    for shape_name, shape in CPU_LOGP_SHAPES.items():
        names = [*logp_contestants("cpu")]
        runs = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                progress.set_postfix_str(f"linear_logp, {shape_name}, {name}")
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    runs[name].append(pool.submit(run_logp_on_cpu, name, shape).result())
                progress.update()
        for name in names:
            seconds, peak, error = (statistics.median(values) for values in zip(*runs[name]))
            share = 6 * math.prod(shape) / flops / seconds
            op = "linear_logp, forward + backward"
            yield [op, shape_name, name, seconds, share, peak, f"{error:.1e} nats"]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(job, device):
    """Median seconds and peak bytes above what is allocated now."""
    if device == "cuda":
        import triton

        seconds = triton.testing.do_bench(job, warmup=50, rep=200, return_mode="median") / 1e3
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return seconds, torch.cuda.max_memory_allocated() - base
    job()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        job()
        times.append(time.perf_counter() - started)
    base = reset_peak()
    job()
    return statistics.median(times), peak_memory() - base


def reset_peak():
    """Resident bytes of this process now; what peak_memory() says later starts from here (Linux)."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return peak_memory()


def peak_memory():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024


def copy_bandwidth(device):
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**28 if device == "cuda" else 2**25, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device)[0]


def matmul_rate(device):
    """FLOP per second of a large matmul, bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / measure(lambda: a @ b, device)[0]


def machine(device):
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if importlib.util.find_spec("triton"):
        import triton

        versions += f", triton {triton.__version__}"
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} threads; {versions}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}; {versions}"


def text(row, peers):
    """A row of the table. peers: (op, shape) -> seconds of the peer that times are relative to; {} = milliseconds."""
    op, shape, name, seconds, share, peak, error = row
    took = f"{seconds / peers[op, shape]:.2f}" if peers else f"{seconds * 1e3:.3g} ms"
    memory = "" if peers and op.startswith("sde") else f"{peak / 2**20:,.0f} MiB"
    return f"| {op} | {shape} | {name} | {took} | {share:.0%} | {memory} | {error} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default, help=f"default: {default}")
    parser.add_argument("--only", choices=["sde", "logp"], help="one of the two kernels (default: both)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of a log-prob on the CPU (default: 3)")
    args = parser.parse_args()
    rows = []
    with tqdm(desc="kernels", unit=" measurements", leave=False) as progress:
        bandwidth, flops = copy_bandwidth(args.device), matmul_rate(args.device)
        if args.only != "logp":
            rows += bench_sde(args.device, bandwidth, progress)
        if args.only != "sde" and args.device == "cuda":
            rows += bench_logp_cuda(args.device, flops, progress)
        if args.only != "sde" and args.device == "cpu":
            rows += bench_logp_cpu(flops, args.repeats, progress)
    print(machine(args.device))
    print(f"copy {bandwidth / 1e9:,.0f} GB/s, matmul {flops / 1e12:,.2f} TFLOP/s\n")
    peers = {(row[0], row[1]): row[3] for row in rows if row[2] in ("eager", "materialised logits")}
    peers, unit = (peers, "time relative to eager or materialised") if args.device == "cpu" else ({}, "time")
    print(f"| op | shape | by | {unit} | of the limit | memory above inputs | error |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(text(row, peers) for row in rows))


if __name__ == "__main__":
    main()
