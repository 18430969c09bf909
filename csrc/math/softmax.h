// Online softmax statistics of a set of logits, and the coefficients of a row's gradient.
#pragma once
#include "numeric.h"

namespace gk {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kShiftFloor = -1100;  // 2^y is 0 here, in double too

// With y = (z - max) * log2(e): sum of 2^y, of y 2^y and of 4^y. A monoid: any split of a row merges to the same
// answer, and everything is relative to the maximum, so adding a constant to the logits changes no digit of the
// entropy.
template <typename T> struct Softmax {
  T max = -INFINITY, sum = 0, dot = 0, sum2 = 0;

  // `unit` = log2(e) / temperature turns a difference of logits into y.
  GK_HD Softmax relative_to(T m, T unit) const {
    if (sum == 0) return {m, T(0), T(0), T(0)};
    // Bounded: for finite logits far apart (finfo.min as a mask) it would be -inf, and 0 * -inf would make every sum
    // NaN.
    const T shift = max_((max - m) * unit, T(kShiftFloor)), scale = exp_(shift * T(kLn2));
    return {m, scale * sum, scale * (dot + shift * sum), scale * scale * sum2};
  }
  GK_HD Softmax merge(const Softmax& other, T unit) const {
    const T m = max_(max, other.max);
    if (m == -INFINITY) return {m, sum + other.sum, dot + other.dot, sum2 + other.sum2};
    const Softmax a = relative_to(m, unit), b = other.relative_to(m, unit);
    return {m, a.sum + b.sum, a.dot + b.dot, a.sum2 + b.sum2};
  }
  GK_HD T log_sum() const { return log_(sum); }
  GK_HD T entropy() const { return log_(sum) - T(kLn2) * dot / sum; }
  GK_HD T sum_p2() const { return sum2 / (sum * sum); }
};

// d loss / d logit_j = slope * 2^y (a + b y), except at the target, which also receives slope * g.
// slope holds what lies between logit and z: logit_scale * softcap' / temperature.
template <typename T> struct LogitGradient {
  T a = 0, b = 0;

  // From d loss / d logp, d loss / d entropy and the row's statistics:  -p (g + h (log p + H)).
  GK_HD static LogitGradient of(T d_logp, T d_entropy, T log_sum, T entropy) {
    const T inv_sum = exp_(-log_sum);
    return {-inv_sum * (d_logp + weighted_(d_entropy, entropy - log_sum)), -inv_sum * d_entropy * T(kLn2)};
  }
};

// The target's entry without the slope. 1 - p is formed as -expm1(logp): exact for a peaked row.
template <typename T> GK_HD T target_gradient(T d_logp, T d_entropy, T logp, T entropy) {
  const T of_entropy = times_(exp_(logp), logp + entropy);  // p log p is 0 where p is
  return -d_logp * expm1_(logp) - weighted_(d_entropy, of_entropy);
}

}  // namespace gk
