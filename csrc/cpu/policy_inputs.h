// Reads one token's inputs in double: the per-token maths costs nothing compared with the vocabulary, and a ratio on a
// clipping bound then falls on the same side as in float64.
#pragma once
#include "../kernels.h"

namespace gk {

inline double load_acc(const void* data, int64_t index, bool is_double) {
  return is_double ? static_cast<const double*>(data)[index] : static_cast<const float*>(data)[index];
}
inline void store_acc(void* data, int64_t index, bool is_double, double value) {
  if (is_double)
    static_cast<double*>(data)[index] = value;
  else
    static_cast<float*>(data)[index] = float(value);
}
// noinline: gcc 12 drops the rounding where it can pair two of these into a vector (-fno-tree-slp-vectorize keeps it).
__attribute__((noinline)) inline double round_to_acc(double value, bool is_double) {
  return is_double ? value : float(value);
}
inline double read(const View& v, int64_t row, int64_t tokens, bool is_double, double absent) {
  return v.data ? load_acc(v.data, v.offset(row, tokens), is_double) : absent;
}
inline bool is_active(const View& active, int64_t row, int64_t tokens) {
  return !active.data || static_cast<const uint8_t*>(active.data)[active.offset(row, tokens)] != 0;
}

// The loss's scalars, with the coefficients that were given as tensors.
inline Scalars<double> scalars_of(const PolicyInputs& in, bool is_double) {
  Scalars<double> s = in.scalars;
  if (in.kl_coef) s.kl_coef = load_acc(in.kl_coef, 0, is_double);
  if (in.entropy_coef) s.entropy_coef = load_acc(in.entropy_coef, 0, is_double);
  return s;
}

// `logp` replaces log-probs that are not given: on-policy, a ratio of 1.
inline TokenInputs<double> read_token(const PolicyInputs& in, int64_t row, int64_t tokens, bool is_double,
                                      double logp) {
  const auto get = [&](const View& v, double absent) { return read(v, row, tokens, is_double, absent); };
  const double weight = get(in.weights, 1);
  return {get(in.advantages, 0),
          weight,
          get(in.old_logps, logp),
          get(in.ref_logps, logp),
          get(in.rollout_logps, logp),
          get(in.token_weights, 1),
          get(in.entropy_weights, weight),
          get(in.entropy_mask, 1),
          get(in.selected, 0),
          get(in.pooled_weights, 1)};
}

}  // namespace gk
