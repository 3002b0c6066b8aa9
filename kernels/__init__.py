"""Primitives with a Triton kernel and an eager PyTorch reference each, in one file each.

The kernels run for CUDA tensors where Triton is installed. Everywhere else (CPU, macOS, Windows) the reference does,
with the same results up to rounding. TRITON_INTERPRET=1 in the environment before Triton is imported runs the kernels
on CPU tensors, slowly, for tests.
"""

try:
    import triton
    import triton.language as tl
    from triton import jit

    INTERPRET = triton.knobs.runtime.interpret
except ImportError:
    triton, INTERPRET = None, False

    class tl:  # what the kernels' signatures name
        constexpr = None

    def jit(function):
        return function


def on_triton(tensor):
    """Whether the kernels, and not the reference, compute for `tensor`."""
    return triton is not None and (tensor.is_cuda or INTERPRET)
