// The clipped value loss with its derivative and metrics, in one launch.
#include "../math/value.h"
#include "flat_tiles.h"

namespace gk {
namespace {

struct Sums {
  double loss = 0, tokens = 0, clipped = 0, value = 0, target = 0;
};

template <typename T> void run(const ValueParams& p, int64_t first, int64_t count, Sums& sums) {
  const auto values = lane<T>(p.values, first, p.tokens), old_values = lane<T>(p.old_values, first, p.tokens),
             returns = lane<T>(p.returns, first, p.tokens), weights = lane<T>(p.weights, first, p.tokens);
  const auto active = lane<uint8_t>(p.active, first, p.tokens);
  T *per_token = static_cast<T*>(p.per_token) + first, *g_values = static_cast<T*>(p.g_values) + first;
  for (int64_t i = 0; i < count; ++i) {
    if (!active(i)) {
      per_token[i] = g_values[i] = 0;
      continue;
    }
    const double value = values(i), target = returns(i), weight = weights(i);
    const ValueTerm<double> term = value_term(value, old_values ? double(old_values(i)) : value, target, p.clip);
    per_token[i] = T(term.value), g_values[i] = T(weighted_(weight, term.d_value));
    sums.loss += weighted_(weight, term.value);
    ++sums.tokens, sums.clipped += term.clipped, sums.value += value, sums.target += target;
  }
}

}  // namespace

void value_loss(const ValueParams& p, Stream) {
  const auto tiles = for_each_tile<Sums>(p.batch * p.tokens, p.threads, [&](int64_t tile, Sums& sums) {
    for_each_row_part(tile, p.batch, p.tokens, [&](int64_t first, int64_t count) {
      p.is_double ? run<double>(p, first, count, sums) : run<float>(p, first, count, sums);
    });
  });
  Sums t;
  for (const Sums& s : tiles)
    t.loss += s.loss, t.tokens += s.tokens, t.clipped += s.clipped, t.value += s.value, t.target += s.target;
  const double n = max_(t.tokens, 1.0);
  double metrics[kValueMetricCount];
  metrics[kValueTokens] = t.tokens, metrics[kValueClipped] = t.clipped / n;
  metrics[kValueMean] = t.value / n, metrics[kReturnMean] = t.target / n;
  store_acc(p.loss, 0, p.is_double, t.loss);
  for (int i = 0; i < kValueMetricCount; ++i) store_acc(p.metrics, i, p.is_double, metrics[i]);
}

}  // namespace gk
