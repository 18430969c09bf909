// A [batch, tokens] array as one run of tokens, in tiles of equal size, whatever the rows are.
#pragma once
#include "sequence_tiles.cuh"

namespace gk {

struct Place {
  int64_t row, t;
};

// A 64-bit division takes about a hundred instructions, a 32-bit one far fewer.
__device__ inline Place place_of(int64_t index, int64_t tokens) {
  if ((index | tokens) >> 32 == 0) {
    const uint32_t row = uint32_t(index) / uint32_t(tokens);
    return {row, int64_t(uint32_t(index) - row * uint32_t(tokens))};
  }
  return {index / tokens, index % tokens};
}

// Calls fn(index, place) for this thread's tokens of the block's tile.
template <typename Fn> __device__ void for_each_in_tile(int64_t batch, int64_t tokens, const Fn& fn) {
  const int64_t begin = blockIdx.x * kTokensPerTile, end = min_(begin + kTokensPerTile, batch * tokens);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) fn(i, place_of(i, tokens));
}

inline int64_t flat_tile_count(int64_t batch, int64_t tokens) { return tiles_per_row(batch * tokens); }  // at least 1

}  // namespace gk
