"""The bounds of packed sequences. On a GPU nothing checks the boundaries, since that would synchronise: wrong ones give
wrong results, but no access outside the tokens."""

import triton
import triton.language as tl


@triton.jit
def boundary(cu_seqlens, i, mask, tokens):
    """Where sequence `i` begins, within the tokens whatever is written there; 0 where the mask is off."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + i, mask, 0), 0), tokens)


@triton.jit
def sequence_bounds(cu_seqlens, sequence, here, tokens):
    """The tokens [begin, end) of a sequence, none where it is not `here`."""
    begin = boundary(cu_seqlens, sequence, here, tokens)
    return begin, tl.maximum(begin, boundary(cu_seqlens, sequence + 1, here, tokens))


@triton.jit
def first_of_tail(cu_seqlens, sequences, tokens, BLOCK: tl.constexpr):
    """Where this program's first block of the tokens past the last boundary begins; the next one is `num_programs`
    blocks further on."""
    return boundary(cu_seqlens, sequences, sequences >= 0, tokens) + tl.program_id(0).to(tl.int64) * BLOCK
