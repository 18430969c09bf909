"""Executes the PTX of nvcc and Triton on the CPU. It shows what csrc/emulation and Triton's interpreter cannot, since
they run other code than a GPU does.

`text` parses; `frame` assigns registers; `alu`, `access`, `collective` and `sync` turn instructions into closures;
`machine` runs them, with warps of 32 lanes that may diverge and several resident blocks, in random order. `memory` lets
a block's stores reach the others as late as the PTX memory model allows. `races` reports unordered accesses of two
warps to one address. `triton_launch` and `nvcc` run the two GPU backends on it.

It does not show races between the lanes of a warp, loads that are satisfied early (a stale L1 line), the last bits of
approximate instructions (ex2, lg2, rcp and div.full are rounded correctly here, and off by some units in the last place
on a GPU), or speed beyond the number of instructions.
"""
