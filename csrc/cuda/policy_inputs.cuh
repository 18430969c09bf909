// Reads one token's inputs, as csrc/cpu/policy_inputs.h does.
#pragma once
#include <algorithm>
#include <cstring>

#include "../kernels.h"

namespace gk {

inline Scalars<float> float_scalars(const Scalars<double>& s) {
  static_assert(sizeof(s) == kScalars * sizeof(double), "");
  double from[kScalars];
  float to[kScalars];
  std::memcpy(from, &s, sizeof s);
  std::copy(from, from + kScalars, to);
  Scalars<float> scalars;
  std::memcpy(&scalars, to, sizeof scalars);
  return scalars;
}

// `s` with the coefficients that were given as tensors, read here so that a replayed graph follows their values.
__device__ inline Scalars<float> with_coefficients(Scalars<float> s, const PolicyInputs& in) {
  if (in.kl_coef) s.kl_coef = *static_cast<const float*>(in.kl_coef);
  if (in.entropy_coef) s.entropy_coef = *static_cast<const float*>(in.entropy_coef);
  return s;
}

__device__ inline float read(const View& v, int64_t row, int64_t t, float absent) {
  return v.data ? static_cast<const float*>(v.data)[row * v.stride_b + t * v.stride_t] : absent;
}
__device__ inline bool is_active(const View& v, int64_t row, int64_t t) {
  return !v.data || static_cast<const uint8_t*>(v.data)[row * v.stride_b + t * v.stride_t] != 0;
}

// `logp` replaces log-probs that are not given: on-policy, a ratio of 1.
__device__ inline TokenInputs<float> read_token(const PolicyInputs& in, int64_t row, int64_t t, float logp) {
  const float weight = read(in.weights, row, t, 1);
  return {read(in.advantages, row, t, 0),
          weight,
          read(in.old_logps, row, t, logp),
          read(in.ref_logps, row, t, logp),
          read(in.rollout_logps, row, t, logp),
          read(in.token_weights, row, t, 1),
          read(in.entropy_weights, row, t, weight),
          read(in.entropy_mask, row, t, 1),
          read(in.selected, row, t, 0),
          read(in.pooled_weights, row, t, 1)};
}

}  // namespace gk
