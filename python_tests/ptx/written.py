"""Hand-written kernels, for the tests of the machine itself."""

from __future__ import annotations

import numpy as np

from .machine import Grid, Options, program

REGISTERS = """
  .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .f32 %f<8>; .reg .b64 %d<16>; .reg .f64 %g<4>;
"""


def kernel(body: str, arguments: int, shared: str = "") -> str:
    """The arguments' addresses are in %d0, %d1, ...; the thread's number is in %r0."""
    parameters = ",\n".join(f"  .param .u64 k_param_{i}" for i in range(arguments))
    loads = "\n".join(f"  ld.param.u64 %d{i}, [k_param_{i}];" for i in range(arguments))
    return (
        f".version 9.0\n.target sm_90\n.address_size 64\n{shared}\n.visible .entry k(\n{parameters}\n)\n{{\n"
        f"{REGISTERS}{loads}\n  mov.u32 %r0, %tid.x;\n{body}\n  ret;\n}}\n"
    )


def run(
    body: str, *arrays: np.ndarray, blocks: int = 1, threads: int = 32, shared: str = "", cluster: int = 1, **options
):
    """Runs a grid on these arrays, and returns it."""
    spans = sorted((x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays)
    parameters = b"".join(x.ctypes.data.to_bytes(8, "little") for x in arrays)
    made = program(kernel(body, len(arrays), shared), "k")
    return Grid(
        made, (blocks, 1, 1), threads, parameters, cluster=cluster, spans=spans, options=Options(**options)
    ).run()  # fmt: skip
