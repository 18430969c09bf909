// The clipped value loss with its derivative and metrics, in one launch.
#include <cmath>
#include <vector>

#include "../math/value.h"
#include "parallel.h"
#include "policy_inputs.h"

namespace gk {
namespace {

constexpr int64_t kTokensWorthAThread = 4096;

struct Sums {
  double loss = 0, tokens = 0, clipped = 0, value = 0, target = 0;
};

Sums run(const ValueParams& p, int64_t begin, int64_t end) {
  Sums sums;
  for (int64_t r = begin; r < end; ++r) {
    const auto get = [&](const View& v) { return read(v, r, p.tokens, p.is_double, 0); };
    ValueTerm<double> term{};
    double weight = 0;
    if (is_active(p.active, r, p.tokens)) {
      const double value = get(p.values), target = get(p.returns);
      term = value_term(value, p.old_values.data ? get(p.old_values) : value, target, p.clip);
      weight = get(p.weights);
      sums.loss += weight * term.value;
      ++sums.tokens, sums.clipped += term.clipped, sums.value += value, sums.target += target;
    }
    store_real(p.per_token, r, p.is_double, term.value);
    store_real(p.g_values, r, p.is_double, weight * term.d_value);
  }
  return sums;
}

}  // namespace

void value_loss(const ValueParams& p, Stream) {
  const int64_t rows = p.batch * p.tokens, pieces = (rows + kTokensWorthAThread - 1) / kTokensWorthAThread;
  std::vector<Sums> sums(pieces);  // added up in their order: the result does not depend on the threads
  parallel_for(pieces, p.threads, [&](int64_t i) {
    sums[i] = run(p, i * kTokensWorthAThread, std::min(rows, (i + 1) * kTokensWorthAThread));
  });
  Sums t;
  for (const Sums& s : sums)
    t.loss += s.loss, t.tokens += s.tokens, t.clipped += s.clipped, t.value += s.value, t.target += s.target;
  const double n = max_(t.tokens, 1.0);
  double metrics[kValueMetricCount];
  metrics[kValueTokens] = t.tokens, metrics[kValueClipped] = t.clipped / n;
  metrics[kValueMean] = t.value / n, metrics[kReturnMean] = t.target / n;
  store_real(p.loss, 0, p.is_double, t.loss);
  for (int i = 0; i < kValueMetricCount; ++i) store_real(p.metrics, i, p.is_double, metrics[i]);
}

}  // namespace gk
