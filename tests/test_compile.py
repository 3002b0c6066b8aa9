"""Every kernel, at every configuration in use, compiled for GPUs that are not here: what it takes of a chip."""

import os
import re
import subprocess

import pytest
import torch

from kernels import INTERPRET, linear_logp, sde_step, tl

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")

ARCHITECTURES = [80, 90, 100]  # A100, H100 and H200, B200
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have (CUDA C guide, table 30)
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    int: "i32",
}


def compiled(kernel, architecture, types, constants, options):
    """types: argument name -> torch dtype of the pointer, or int for a size. Pointers and sizes named in upper case are
    multiples of 16, as the launchers see to it and as the common shapes are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, multiple_of_16 = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = ("*" if name.endswith("_ptr") else "") + TYPES[types[name]]
            if name.endswith("_ptr") or types.get(f"{name} % 16") == 0:
                multiple_of_16[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiple_of_16)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def spills(kernel, tmp_path):
    """Bytes of spill stores and loads that the assembler reports. Its stack frame is no spill: sin and cos have one for
    arguments that ours never take."""
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    target = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
    assembler = "ptxas-blackwell" if target.startswith("sm_10") else "ptxas"
    (tmp_path / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [os.path.join(folder, assembler), "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
    command += [] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert found, report
    return sum(int(n) for pair in found for n in pair)


def assert_fits(kernel, architecture, tmp_path):
    assert kernel.metadata.shared <= SHARED_MEMORY[architecture]
    assert spills(kernel, tmp_path) <= 16


# ---------------------------------------------------------------------------------------------------------------------

SDE_POINTERS = "v ref x next a b c z2 d2 logp mse grad_logp grad_mse".split()


def sde_types(v, ref, multiple):
    """Of all three kernels; D a multiple of 16, or not."""
    types = {f"{name}_ptr": torch.float32 for name in SDE_POINTERS} | dict(D=int, blocks=int)
    types |= {"v_ptr": v, "ref_ptr": ref, "grad_ptr": v, "D % 16": 0 if multiple else 1}
    return types


def sum_layouts(kernel):
    """The thread layouts under the sums of a kernel: which thread has which elements, and so the order of summing."""
    text = kernel.asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", text, re.M))
    used = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<[^,>]+, (#\w+)>\)', text, re.S)
    return [named[name] for name in used]


@pytest.mark.parametrize("multiple", [True, False])
@pytest.mark.parametrize("v", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sde_step_and_replay_fit_and_sum_in_one_order(architecture, v, multiple, tmp_path):
    kernels = {}
    for draw, has_ref in [(True, False), (False, False), (False, True)]:
        types = sde_types(v, v, multiple) | {"seed_ptr": torch.int64 if draw else torch.float32}
        constants = dict(DRAW=draw, HAS_REF=has_ref, BLOCK=sde_step.BLOCK)
        kernel = compiled(sde_step._forward_kernel, architecture, types, constants, sde_step.LAUNCH)
        assert_fits(kernel, architecture, tmp_path)
        kernels[draw, has_ref] = kernel
    step, replay, with_ref = (sum_layouts(kernel) for kernel in kernels.values())
    assert len(step) == len(replay) == 1 and len(with_ref) == 2
    assert step[0] == replay[0] == with_ref[0]
    # Nothing is contracted: the only fused operations are those of sin, cos and log, which the replay does not have.
    assert "fma" not in kernels[False, True].asm["ptx"] and "fma" in kernels[True, False].asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sde_combine_and_backward_fit(architecture, tmp_path):
    for blocks in (1, 64, 8192):  # of 1024: a tiny latent, SD3 at 512 px, 8 M elements of video
        constants = dict(HAS_REF=True, BLOCKS=blocks)
        types = sde_types(torch.bfloat16, torch.bfloat16, True)
        kernel = compiled(sde_step._combine_kernel, architecture, types, constants, sde_step.LAUNCH)
        assert_fits(kernel, architecture, tmp_path)
    for v in (torch.bfloat16, torch.float16, torch.float32):
        for has_ref in (False, True):
            constants = dict(HAS_REF=has_ref, BLOCK=sde_step.BLOCK)
            kernel = compiled(
                sde_step._backward_kernel, architecture, sde_types(v, v, True), constants, sde_step.LAUNCH
            )
            assert_fits(kernel, architecture, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------

HEADS = [(151_936, 896), (152_064, 3584), (50_257, 768)]  # V, D: Qwen2.5-0.5B, 7B; an odd vocabulary


def logp_types(dtype):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    names = "inv_temperature z_target m s e logp lse entropy g_logp g_entropy".split()
    types = {f"{name}_ptr": acc for name in names} | {f"{name}_ptr": dtype for name in ("h", "w", "dx")}
    return types | {"target_ptr": torch.int64, "N": int, "start": int, "width": int, "stride": int, "stride % 16": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_logp_fits(architecture, dtype, tmp_path):
    for (V, D), softcap, entropy in [(HEADS[0], None, False), (HEADS[1], None, True), (HEADS[2], 30.0, True)]:
        acc = tl.float64 if dtype == torch.float64 else tl.float32
        tiles = linear_logp.CONFIGS[architecture // 10][dtype.itemsize]
        shared = dict(D=D, SOFTCAP=softcap, ENTROPY=entropy, GROUP=linear_logp.GROUP, ACC=acc, INTERPRET=False)
        for kernel, constants, long_epilogue in [
            (linear_logp.forward_kernel, dict(V=V, SPLIT=linear_logp.SPLIT), softcap is not None),
            (linear_logp.backward_kernel, {}, softcap is not None or entropy),
        ]:
            constants = shared | constants | tiles[long_epilogue]
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            constants |= {} if entropy else dict.fromkeys(("e_ptr", "entropy_ptr", "g_entropy_ptr"))
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            assert_fits(compiled(kernel, architecture, logp_types(dtype), constants, options), architecture, tmp_path)


def test_linear_logp_combine_fits(tmp_path):
    for architecture in ARCHITECTURES:
        constants = dict(S=75, ENTROPY=True, BN=128, ACC=tl.float32)
        kernel = compiled(linear_logp.combine_kernel, architecture, logp_types(torch.bfloat16), constants, {})
        assert_fits(kernel, architecture, tmp_path)
