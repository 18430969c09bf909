// The token kernel: ratio, objective, KL, weights, reduction and every metric, with the derivative, from log-probs.
#include <cstring>
#include <vector>

#include "parallel.h"
#include "policy_inputs.h"

namespace gk {
namespace {

constexpr int64_t kTokensWorthAThread = 4096;

struct Segment {
  int64_t begin, end;
};

// Sums over tokens; merged in the order of the segments, so the result does not depend on the threads.
struct Sums {
  double policy = 0, kl = 0, entropy = 0;  // as they enter the loss
  double tokens = 0, raw_entropy = 0, raw_kl = 0, approx_kl = 0, approx_kl_k3 = 0;
  double ratio = 0, ratio_min = INFINITY, ratio_max = -INFINITY, low = 0, high = 0, cap = 0;
  double low_min = INFINITY, high_max = -INFINITY;  // of the sequences' shares
  double gradient_weight = 0, rejected = 0, weight = 0, weight_squares = 0, weight_min = INFINITY,
         weight_max = -INFINITY;
  double rollout_kl = 0, rollout_kl_k3 = 0, rollout_abs_diff = 0;

  void merge(const Sums& o) {
    policy += o.policy, kl += o.kl, entropy += o.entropy;
    tokens += o.tokens, raw_entropy += o.raw_entropy, raw_kl += o.raw_kl;
    approx_kl += o.approx_kl, approx_kl_k3 += o.approx_kl_k3;
    ratio += o.ratio, ratio_min = min_(ratio_min, o.ratio_min), ratio_max = max_(ratio_max, o.ratio_max);
    low += o.low, high += o.high, cap += o.cap;
    low_min = min_(low_min, o.low_min), high_max = max_(high_max, o.high_max);
    gradient_weight += o.gradient_weight, rejected += o.rejected;
    weight += o.weight, weight_squares += o.weight_squares;
    weight_min = min_(weight_min, o.weight_min), weight_max = max_(weight_max, o.weight_max);
    rollout_kl += o.rollout_kl, rollout_kl_k3 += o.rollout_kl_k3, rollout_abs_diff += o.rollout_abs_diff;
  }
  void end_sequence() {
    if (tokens > 0) low_min = low / tokens, high_max = high / tokens;
  }
};

// What a sequence's tokens share: the pooled log-ratio with the factor that takes its derivative back to each token,
// whether the bound on it passes the gradient, and what gmpo asks of the sequence.
struct Sequence {
  Pooled<double> pooled{0, 0, 1};
  double share = 0;
  bool open = true;
};

class TokenKernel {
 public:
  explicit TokenKernel(const TokenParams& p)
      : p(p), s(p.in.scalars), form(p.in.form), level(form.ratio_level), pooling(form.pooling()) {}

  Sums run(Segment segment) const {
    Sums sums;
    const Sequence sequence = pooling == Pooling::none ? Sequence{} : pool(segment);
    double pull = 0;  // d loss / d the pooled log-ratio
    for (int64_t r = segment.begin; r < segment.end; ++r)
      if (active(r)) pull += token(r, sequence, sums);
    if (sequence.open && pull != 0)  // a NaN is something
      for (int64_t r = segment.begin; r < segment.end; ++r)
        if (active(r)) push_back(r, sequence.share * pull);
    return sums;
  }

 private:
  const TokenParams& p;
  const Scalars<double>& s;
  const Form form;
  const RatioLevel level;
  const Pooling pooling;

  bool active(int64_t r) const { return is_active(p.active, r, p.tokens); }
  double logp(int64_t r) const { return read(p.logps, r, p.tokens, p.is_double, 0); }
  TokenInputs inputs(int64_t r) const { return read_token(p.in, r, p.tokens, p.is_double, logp(r)); }
  void store(void* out, int64_t r, double value) const {
    if (out) store_real(out, r, p.is_double, value);
  }
  PooledTerm<double> term(int64_t r, const TokenInputs& t) const {
    return pooled_term(form, logp(r) - t.old, t.adv, t.pooled_weight, s);
  }
  // How much a token counts in a pooled mean: gmpo leaves out what the entropy mask does.
  double count_of(const TokenInputs& t) const { return form.objective == Objective::gmpo ? t.token_weight : 1; }

  Sequence pool(Segment segment) const {
    double sum = 0, counted = 0, tokens = 0, adv = 0, log_weight = 0;
    for (int64_t r = segment.begin; r < segment.end; ++r) {
      if (!active(r)) continue;
      const TokenInputs t = inputs(r);
      sum += count_of(t) * term(r, t).value, counted += count_of(t), ++tokens;
      adv += t.adv, log_weight += log_(t.pooled_weight + kGmpoWeightFloor);
    }
    const double share = pooling == Pooling::sum ? 1 : 1 / max_(counted, 1.0), n = max_(tokens, 1.0);
    const double raw = sum * share, log_ratio = pooled_limit(form, raw, s);
    return {{log_ratio, adv / n, p.in.pooled_weights.data ? exp_(log_weight / n) : 1}, share, inside(raw, log_ratio)};
  }

  void push_back(int64_t r, double pull) const {
    const TokenInputs t = inputs(r);
    if (term(r, t).open) store(p.g_logps, r, load_real(p.g_logps, r, p.is_double) + count_of(t) * pull);
  }

  // Stores the token's results; returns what it adds to the derivative in the sequence's pooled log-ratio.
  double token(int64_t r, const Sequence& sequence, Sums& sums) const {
    const double logp = this->logp(r);
    const TokenInputs t = inputs(r);
    const double raw = logp - t.old, clamped = clamp_log_ratio(raw, s);
    const double log_ratio = level == RatioLevel::token ? clamped : sequence.pooled.log_ratio;
    const TokenLoss<double> loss = token_loss(form, token_values(t, logp, log_ratio, sequence.pooled), s);
    const double entropy = read(p.entropy, r, p.tokens, p.is_double, 0), bonus = s.entropy_coef * t.entropy_mask;

    const bool own =
        level == RatioLevel::token ? inside(raw, clamped) : level == RatioLevel::sequence_token && sequence.open;
    const bool shared = level == RatioLevel::sequence || level == RatioLevel::sequence_product;
    store(p.per_token, r, loss.value(s) - bonus * entropy);
    store(p.g_logps, r, t.weight * (loss.d_logp + (own ? loss.d_log_ratio : 0)));
    store(p.g_entropy, r, -bonus * t.entropy_weight);
    count(t, logp, exp_(log_ratio), entropy, loss, sums);
    sums.entropy -= bonus * t.entropy_weight * entropy;
    return t.weight * (loss.d_pooled + (shared ? loss.d_log_ratio : 0));
  }

  void count(const TokenInputs& t, double logp, double ratio, double entropy, const TokenLoss<double>& loss,
             Sums& sums) const {
    Sums one;
    const double moved = logp - t.old, drift = logp - t.rollout, w = t.token_weight * t.pooled_weight;
    one.policy = t.weight * loss.policy, one.kl = t.weight * s.kl_coef * loss.kl;
    one.tokens = 1, one.raw_entropy = entropy, one.raw_kl = loss.kl;
    one.approx_kl = -moved, one.approx_kl_k3 = expm1_(moved) - moved;
    one.ratio = one.ratio_min = one.ratio_max = ratio;
    one.low = (loss.flags & kClippedLow) != 0, one.high = (loss.flags & kClippedHigh) != 0;
    one.cap = (loss.flags & kCapped) != 0;
    one.gradient_weight = loss.gradient_weight, one.rejected = w == 0;
    one.weight = one.weight_min = one.weight_max = w, one.weight_squares = w * w;
    one.rollout_kl = -drift, one.rollout_kl_k3 = expm1_(drift) - drift, one.rollout_abs_diff = max_(drift, -drift);
    sums.merge(one);
  }
};

// Whole sequences, or equal pieces of the one there is; `whole` says which.
std::vector<Segment> segments_of(const TokenParams& p, bool& whole) {
  std::vector<Segment> segments;
  const int64_t rows = p.batch * p.tokens;
  whole = p.in.form.pooling() != Pooling::none || p.cu_seqlens || p.batch != 1;
  for (int64_t r = 0; !whole && r < rows; r += kTokensWorthAThread)
    segments.push_back({r, std::min(r + kTokensWorthAThread, rows)});
  for (int64_t i = 0; whole && i < p.sequences; ++i)
    segments.push_back(p.cu_seqlens ? Segment{p.cu_seqlens[i], p.cu_seqlens[i + 1]}
                                    : Segment{i * p.tokens, (i + 1) * p.tokens});
  return segments;
}

// Runs of segments that are worth a thread together, as indices into them.
std::vector<Segment> work_of(const std::vector<Segment>& segments) {
  std::vector<Segment> work;
  for (int64_t i = 0, begin = 0, tokens = 0; i < int64_t(segments.size()); ++i) {
    tokens += segments[i].end - segments[i].begin;
    if (tokens < kTokensWorthAThread && i + 1 < int64_t(segments.size())) continue;
    work.push_back({begin, i + 1});
    begin = i + 1, tokens = 0;
  }
  return work;
}

void store_metrics(const TokenParams& p, const Sums& t) {
  const double n = max_(t.tokens, 1.0);
  const bool any = t.tokens > 0;
  double m[kMetricCount];
  m[kPolicyLoss] = t.policy, m[kKlLoss] = t.kl, m[kEntropyLoss] = t.entropy, m[kTokens] = t.tokens;
  m[kEntropy] = t.raw_entropy / n, m[kKl] = t.raw_kl / n;
  m[kApproxKl] = t.approx_kl / n, m[kApproxKlK3] = t.approx_kl_k3 / n;
  m[kRatioMean] = any ? t.ratio / n : 1, m[kRatioMin] = any ? t.ratio_min : 1, m[kRatioMax] = any ? t.ratio_max : 1;
  m[kClipLow] = t.low / n, m[kClipHigh] = t.high / n, m[kClipRegion] = (t.low + t.high) / n, m[kClipCap] = t.cap / n;
  m[kClipLowMin] = any ? t.low_min : 0, m[kClipHighMax] = any ? t.high_max : 0;
  m[kGradientWeight] = any ? t.gradient_weight / n : 1, m[kRejected] = t.rejected / n;
  m[kWeightMean] = any ? t.weight / n : 1, m[kWeightMin] = any ? t.weight_min : 1;
  m[kWeightMax] = any ? t.weight_max : 1;
  m[kWeightEss] = !any ? 1 : t.weight_squares == 0 ? 0 : t.weight * t.weight / (n * t.weight_squares);
  m[kRolloutKl] = t.rollout_kl / n, m[kRolloutKlK3] = t.rollout_kl_k3 / n, m[kRolloutAbsDiff] = t.rollout_abs_diff / n;
  for (int i = 0; i < kMetricCount; ++i) store_real(p.metrics, i, p.is_double, m[i]);
}

}  // namespace

void token_policy(const TokenParams& p, Stream) {
  const int64_t rows = p.batch * p.tokens, bytes = p.is_double ? 8 : 4;
  for (void* out : {p.per_token, p.g_logps, p.g_entropy})
    if (out) std::memset(out, 0, rows * bytes);
  bool whole;
  const std::vector<Segment> segments = segments_of(p, whole), work = work_of(segments);
  std::vector<Sums> sums(work.size());
  const TokenKernel kernel(p);
  parallel_for(int64_t(work.size()), p.threads, [&](int64_t i) {
    for (int64_t k = work[i].begin; k < work[i].end; ++k) {
      Sums one = kernel.run(segments[k]);
      if (whole) one.end_sequence();
      sums[i].merge(one);
    }
  });
  Sums total;
  for (const Sums& one : sums) total.merge(one);
  if (!whole) total.end_sequence();
  store_real(p.loss, 0, p.is_double, total.policy + total.kl + total.entropy);
  store_metrics(p, total);
}

}  // namespace gk
