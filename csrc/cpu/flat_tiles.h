// A [batch, tokens] array in tiles of equal numbers of tokens, whatever the rows are, so that threads share the work
// evenly and partial sums do not depend on them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "policy_inputs.h"

namespace gk {

constexpr int64_t kTokensPerFlatTile = 4096;

inline int threads_for(int64_t tokens, int threads) {
  return int(std::min<int64_t>(threads, 1 + tokens / kMinTokensPerThread));
}

template <typename T> struct Lane {  // a view from one token on; null: not given
  const T* data;
  int64_t stride;
  T operator()(int64_t i) const { return data[i * stride]; }
  explicit operator bool() const { return data != nullptr; }
};
template <typename T> Lane<T> lane(const View& v, int64_t first, int64_t tokens) {
  return {v.data ? static_cast<const T*>(v.data) + v.offset(first, tokens) : nullptr, v.stride_t};
}

// Calls fn(first, count) for the part of each row that lies in the tile.
template <typename Fn> void for_each_row_part(int64_t tile, int64_t batch, int64_t tokens, const Fn& fn) {
  const int64_t end = std::min((tile + 1) * kTokensPerFlatTile, batch * tokens);
  for (int64_t first = tile * kTokensPerFlatTile, next; first < end; first = next) {
    next = std::min(end, (first / tokens + 1) * tokens);
    fn(first, next - first);
  }
}

// One Result per tile, in order: run(tile, result).
template <typename Result, typename Run> std::vector<Result> for_each_tile(int64_t rows, int threads, const Run& run) {
  std::vector<Result> results((rows + kTokensPerFlatTile - 1) / kTokensPerFlatTile);
  parallel_for(int64_t(results.size()), threads_for(rows, threads), [&](int64_t i) { run(i, results[i]); });
  return results;
}

}  // namespace gk
