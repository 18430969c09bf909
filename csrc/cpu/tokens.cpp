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

  void merge(const Sums& o) {
    policy += o.policy, kl += o.kl, entropy += o.entropy;
    tokens += o.tokens, raw_entropy += o.raw_entropy, raw_kl += o.raw_kl;
    approx_kl += o.approx_kl, approx_kl_k3 += o.approx_kl_k3;
    ratio += o.ratio, ratio_min = min_(ratio_min, o.ratio_min), ratio_max = max_(ratio_max, o.ratio_max);
    low += o.low, high += o.high, cap += o.cap;
  }
};

// One ratio for a whole sequence: its logarithm, the factor that takes its derivative back to each token, and whether
// the clamp on it passes the gradient.
struct SequenceRatio {
  double log_ratio = 0, share = 0;
  bool open = true;
};

class TokenKernel {
 public:
  explicit TokenKernel(const TokenParams& p) : p(p), s(p.in.scalars), level(p.in.form.ratio_level) {}

  Sums run(Segment segment) const {
    Sums sums;
    const bool sequence = level != RatioLevel::token;
    const SequenceRatio ratio = sequence ? sequence_ratio(segment) : SequenceRatio{};
    double pull = 0;  // d loss / d log s of the sequence
    for (int64_t r = segment.begin; r < segment.end; ++r)
      if (active(r)) pull += token(r, sequence ? &ratio : nullptr, sums);
    const bool shared = level == RatioLevel::sequence || level == RatioLevel::sequence_product;
    for (int64_t r = segment.begin; shared && ratio.open && r < segment.end; ++r)
      if (active(r) && passes(r)) store(p.g_logps, r, load_real(p.g_logps, r, p.is_double) + ratio.share * pull);
    return sums;
  }

 private:
  const TokenParams& p;
  const Scalars<double>& s;
  const RatioLevel level;

  bool active(int64_t r) const { return is_active(p.active, r, p.tokens); }
  double logp(int64_t r) const { return read(p.logps, r, p.tokens, p.is_double, 0); }
  void store(void* out, int64_t r, double value) const {
    if (out) store_real(out, r, p.is_double, value);
  }
  double raw_log_ratio(int64_t r) const {
    const double logp = this->logp(r);
    return logp - read(p.in.old_logps, r, p.tokens, p.is_double, logp);
  }
  bool passes(int64_t r) const {
    const double raw = raw_log_ratio(r);
    return inside(raw, clamp_log_ratio(raw, s));
  }

  SequenceRatio sequence_ratio(Segment segment) const {
    double sum = 0, count = 0;
    for (int64_t r = segment.begin; r < segment.end; ++r)
      if (active(r)) sum += clamp_log_ratio(raw_log_ratio(r), s), ++count;
    const double share = level == RatioLevel::sequence_product ? 1 : 1 / max_(count, 1.0);
    const double raw = sum * share, log_ratio = min_(raw, s.sequence_log_ratio_max);
    return {log_ratio, share, inside(raw, log_ratio)};
  }

  // Stores the token's results; returns what it adds to the derivative in the sequence's log-ratio.
  double token(int64_t r, const SequenceRatio* sequence, Sums& sums) const {
    const double logp = this->logp(r);
    const TokenInputs t = read_token(p.in, r, p.tokens, p.is_double, logp);
    const double raw = logp - t.old, clamped = clamp_log_ratio(raw, s),
                 log_ratio = sequence ? sequence->log_ratio : clamped;
    const TokenLoss<double> loss = token_loss(p.in.form, {logp, log_ratio, t.adv, t.token_weight, t.ref, t.rollout}, s);
    const double entropy = read(p.entropy, r, p.tokens, p.is_double, 0), bonus = s.entropy_coef * t.entropy_mask;

    const bool own =
        level == RatioLevel::token ? inside(raw, clamped) : level == RatioLevel::sequence_token && sequence->open;
    store(p.per_token, r, loss.value(s) - bonus * entropy);
    store(p.g_logps, r, t.weight * (loss.d_logp + (own ? loss.d_log_ratio : 0)));
    store(p.g_entropy, r, -bonus * t.entropy_weight);

    const double ratio = exp_(log_ratio);
    sums.merge({t.weight * loss.policy, t.weight * s.kl_coef * loss.kl, -bonus * t.entropy_weight * entropy, 1, entropy,
                loss.kl, -raw, expm1_(raw) - raw, ratio, ratio, ratio, double((loss.flags & kClippedLow) != 0),
                double((loss.flags & kClippedHigh) != 0), double((loss.flags & kCapped) != 0)});
    return t.weight * loss.d_log_ratio;
  }
};

std::vector<Segment> segments_of(const TokenParams& p) {
  std::vector<Segment> segments;
  if (p.in.form.ratio_level == RatioLevel::token) {  // tokens are independent: equal pieces
    const int64_t rows = p.batch * p.tokens;
    for (int64_t r = 0; r < rows; r += kTokensWorthAThread)
      segments.push_back({r, std::min(r + kTokensWorthAThread, rows)});
  } else {
    for (int64_t i = 0; i < p.sequences; ++i)
      segments.push_back(p.cu_seqlens ? Segment{p.cu_seqlens[i], p.cu_seqlens[i + 1]}
                                      : Segment{i * p.tokens, (i + 1) * p.tokens});
  }
  return segments;
}

void store_metrics(const TokenParams& p, const Sums& t) {
  const double n = max_(t.tokens, 1.0);
  const bool any = t.tokens > 0;
  double metrics[kMetricCount];
  metrics[kPolicyLoss] = t.policy, metrics[kKlLoss] = t.kl, metrics[kEntropyLoss] = t.entropy,
  metrics[kTokens] = t.tokens;
  metrics[kEntropy] = t.raw_entropy / n, metrics[kKl] = t.raw_kl / n;
  metrics[kApproxKl] = t.approx_kl / n, metrics[kApproxKlK3] = t.approx_kl_k3 / n;
  metrics[kRatioMean] = any ? t.ratio / n : 1, metrics[kRatioMin] = any ? t.ratio_min : 1,
  metrics[kRatioMax] = any ? t.ratio_max : 1;
  metrics[kClipLow] = t.low / n, metrics[kClipHigh] = t.high / n, metrics[kClipRegion] = (t.low + t.high) / n;
  metrics[kClipCap] = t.cap / n;
  for (int i = 0; i < kMetricCount; ++i) store_real(p.metrics, i, p.is_double, metrics[i]);
}

}  // namespace

void token_policy(const TokenParams& p, Stream) {
  const int64_t rows = p.batch * p.tokens, bytes = p.is_double ? 8 : 4;
  for (void* out : {p.per_token, p.g_logps, p.g_entropy})
    if (out) std::memset(out, 0, rows * bytes);
  const std::vector<Segment> segments = segments_of(p);
  std::vector<Sums> sums(segments.size());
  const int threads = int(std::min<int64_t>(p.threads, 1 + rows / kTokensWorthAThread));
  const TokenKernel kernel(p);
  parallel_for(int64_t(segments.size()), threads, [&](int64_t i) { sums[i] = kernel.run(segments[i]); });
  Sums total;
  for (const Sums& one : sums) total.merge(one);
  store_real(p.loss, 0, p.is_double, total.policy + total.kl + total.entropy);
  store_metrics(p, total);
}

}  // namespace gk
