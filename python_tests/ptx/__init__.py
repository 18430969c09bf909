"""Executes PTX, as nvcc and Triton make it, on the CPU: what csrc/emulation and Triton's interpreter cannot show, as
they run other code than a GPU would.

`text` parses, `frame` lays registers out, `alu`, `access`, `collective` and `sync` turn instructions into closures,
`machine` runs them: warps of 32 lanes that may diverge, several blocks resident at once, everything in random order.
`memory` lets stores of a block reach the others as late as the PTX memory model allows, `races` reports accesses of two
warps to one address that nothing orders. `triton_launch` and `nvcc` put both GPU backends on it.

What it does not show: races between the lanes of a warp, loads that are satisfied early (a stale L1 line), the last bits
of approximate instructions (ex2, lg2, rcp, div.full: rounded here, within some units in the last place there), and
speed beyond the number of instructions.
"""
