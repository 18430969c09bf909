// Generalised advantage estimation: a reverse scan of each sequence, threads over the sequences, in double. With
// lam = 1 and no values it gives discounted returns.
#include <cstring>

#include "flat_tiles.h"

namespace gk {
namespace {

// One sequence lies in one batch row; its first token is `first`.
template <typename T> void scan(const GaeParams& p, int64_t first, int64_t length) {
  const auto rewards = lane<T>(p.rewards, first, p.tokens), values = lane<T>(p.values, first, p.tokens);
  const auto mask = lane<uint8_t>(p.active, first, p.tokens);
  T* advantages = static_cast<T*>(p.advantages) + first;
  T* returns = p.returns ? static_cast<T*>(p.returns) + first : nullptr;
  const double gamma = p.gamma, decay = p.gamma * p.lam;
  double next_value = 0, running = 0;  // both pass through masked tokens unchanged
  for (int64_t t = length; t-- > 0;) {
    const bool active = !mask || mask(t);
    double value = 0;
    if (active) {
      value = values ? double(values(t)) : 0;
      running = temporal_difference(double(rewards(t)), value, next_value, gamma) + decay * running;
      next_value = value;
    }
    advantages[t] = T(active ? running : 0);
    if (returns) returns[t] = T(active ? running + value : 0);
  }
}

}  // namespace

void gae(const GaeParams& p, Stream) {
  const int64_t rows = p.batch * p.tokens, size = p.is_double ? 8 : 4;
  const int64_t covered = p.cu_seqlens ? p.cu_seqlens[p.sequences] : rows;  // the rest belongs to no sequence
  for (void* out : {p.advantages, p.returns})
    if (out) std::memset(static_cast<char*>(out) + covered * size, 0, (rows - covered) * size);
  parallel_for(p.sequences, threads_for(rows, p.threads), [&](int64_t i) {
    const int64_t first = p.cu_seqlens ? p.cu_seqlens[i] : i * p.tokens;
    const int64_t length = p.cu_seqlens ? p.cu_seqlens[i + 1] - first : p.tokens;
    if (length == 0) return;
    p.is_double ? scan<double>(p, first, length) : scan<float>(p, first, length);
  });
}

}  // namespace gk
