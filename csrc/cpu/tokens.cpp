// The token kernel: ratio, objective, KL, weights, reduction and every metric, with the derivative, from log-probs.
#include <cstring>
#include <vector>

#include "parallel.h"
#include "policy_inputs.h"

namespace gk {
namespace {

struct Segment {
  int64_t begin, end;
};

// Merged in the order of the segments, so the result does not depend on the threads.
struct Sums {
  TokenSums<double> tokens;
  double low_min = INFINITY, high_max = -INFINITY;  // of the sequences' shares

  void merge(const Sums& o) {
    tokens = tokens.merge(o.tokens);
    low_min = min_(low_min, o.low_min), high_max = max_(high_max, o.high_max);
  }
  void end_sequence() {
    if (tokens.tokens > 0) low_min = tokens.low / tokens.tokens, high_max = tokens.high / tokens.tokens;
  }
};

class TokenKernel {
 public:
  explicit TokenKernel(const TokenParams& p)
      : p(p), s(scalars_of(p.in, p.is_double)), form(p.in.form), pooling(form.pooling()) {}

  Sums run(Segment segment) const {
    Sums sums;
    const Sequence<double> sequence = pooling == Pooling::none ? Sequence<double>{} : pool(segment);
    double d_pooled = 0;  // d loss / d the pooled log-ratio
    for (int64_t r = segment.begin; r < segment.end; ++r)
      if (active(r)) d_pooled += token(r, sequence, sums);
    if (sequence.passes_grad && d_pooled != 0)  // a NaN is something
      for (int64_t r = segment.begin; r < segment.end; ++r)
        if (active(r)) scatter_pooled_grad(r, sequence.share * d_pooled);
    return sums;
  }

 private:
  const TokenParams& p;
  const Scalars<double> s;
  const Form form;
  const Pooling pooling;

  bool active(int64_t r) const { return is_active(p.active, r, p.tokens); }
  double logp(int64_t r) const { return read(p.logps, r, p.tokens, p.is_double, 0); }
  TokenInputs<double> inputs(int64_t r) const { return read_token(p.in, r, p.tokens, p.is_double, logp(r)); }
  void store(void* out, int64_t r, double value) const {
    if (out) store_acc(out, r, p.is_double, value);
  }
  PooledTerm<double> term(int64_t r, const TokenInputs<double>& t) const {
    return pooled_term(form, logp(r) - t.old, t.adv, t.pooled_weight, s);
  }

  Sequence<double> pool(Segment segment) const {
    double sum = 0, counted = 0, tokens = 0, adv = 0, log_weight = 0;
    for (int64_t r = segment.begin; r < segment.end; ++r) {
      if (!active(r)) continue;
      const TokenInputs<double> t = inputs(r);
      const double count = pooled_count(form, t.token_weight);
      sum += weighted_(count, term(r, t).value), counted += count, ++tokens;
      adv += t.adv, log_weight += log_(t.pooled_weight + kGmpoWeightFloor);
    }
    const double share = pooling == Pooling::sum ? 1 : 1 / max_(counted, 1.0), n = max_(tokens, 1.0);
    const double raw = sum * share, log_ratio = pooled_limit(form, raw, s);
    return {{log_ratio, adv / n, p.in.pooled_weights.data ? exp_(log_weight / n) : 1},
            share,
            clamp_passes_grad(raw, log_ratio)};
  }

  void scatter_pooled_grad(int64_t r, double d_pooled) const {
    const TokenInputs<double> t = inputs(r);
    if (term(r, t).passes_grad)
      store(p.g_logps, r,
            load_acc(p.g_logps, r, p.is_double) + weighted_(pooled_count(form, t.token_weight), d_pooled));
  }

  // Stores the token's results; returns what it adds to the derivative in the sequence's pooled log-ratio.
  double token(int64_t r, const Sequence<double>& sequence, Sums& sums) const {
    const double entropy = read(p.entropy, r, p.tokens, p.is_double, 0);
    const TokenResult<double> result = token_result(form, inputs(r), logp(r), entropy, sequence, s);
    store(p.per_token, r, result.value);
    store(p.g_logps, r, result.d_logp);
    store(p.g_entropy, r, result.d_entropy);
    sums.tokens = sums.tokens.merge(result.sums);
    return result.d_pooled;
  }
};

// Whole sequences, or equal tiles of the only one; `per_sequence` says which.
std::vector<Segment> segments_of(const TokenParams& p, bool& per_sequence) {
  std::vector<Segment> segments;
  const int64_t rows = p.batch * p.tokens;
  per_sequence = p.in.form.pooling() != Pooling::none || p.cu_seqlens || p.batch != 1;
  for (int64_t r = 0; !per_sequence && r < rows; r += kMinPolicyTokensPerThread)
    segments.push_back({r, std::min(r + kMinPolicyTokensPerThread, rows)});
  for (int64_t i = 0; per_sequence && i < p.sequences; ++i)
    segments.push_back(p.cu_seqlens ? Segment{p.cu_seqlens[i], p.cu_seqlens[i + 1]}
                                    : Segment{i * p.tokens, (i + 1) * p.tokens});
  return segments;
}

// Groups consecutive segments until they are worth a thread; returns ranges of their indices.
std::vector<Segment> work_of(const std::vector<Segment>& segments) {
  std::vector<Segment> work;
  for (int64_t i = 0, begin = 0, tokens = 0; i < int64_t(segments.size()); ++i) {
    tokens += segments[i].end - segments[i].begin;
    if (tokens < kMinPolicyTokensPerThread && i + 1 < int64_t(segments.size())) continue;
    work.push_back({begin, i + 1});
    begin = i + 1, tokens = 0;
  }
  return work;
}

}  // namespace

void token_policy(const TokenParams& p, Stream) {
  const int64_t rows = p.batch * p.tokens, bytes = p.is_double ? 8 : 4;
  for (void* out : {p.per_token, p.g_logps, p.g_entropy})
    if (out) std::memset(out, 0, rows * bytes);
  bool per_sequence;
  const std::vector<Segment> segments = segments_of(p, per_sequence), work = work_of(segments);
  std::vector<Sums> sums(work.size());
  const TokenKernel kernel(p);
  parallel_for(int64_t(work.size()), p.threads, [&](int64_t i) {
    for (int64_t k = work[i].begin; k < work[i].end; ++k) {
      Sums one = kernel.run(segments[k]);
      if (per_sequence) one.end_sequence();
      sums[i].merge(one);
    }
  });
  Sums total;
  for (const Sums& one : sums) total.merge(one);
  if (!per_sequence) total.end_sequence();
  store_acc(p.loss, 0, p.is_double, loss_of(total.tokens));
  double metrics[kMetricCount];
  metrics_of(total.tokens, total.low_min, total.high_max, metrics);
  for (int i = 0; i < kMetricCount; ++i) store_acc(p.metrics, i, p.is_double, metrics[i]);
}

}  // namespace gk
