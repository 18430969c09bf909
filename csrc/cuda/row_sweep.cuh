// The two sweeps on one vector of a row, in the units of csrc/math/softmax.h.
#pragma once
#include "../math/softmax.h"
#include "vec.cuh"

namespace gk {

// How a logit becomes z, which is the logit or cap * tanh(logit * inner), and how a difference of z becomes one of
// logarithms.
struct Transform {
  float natural, unit;  // logarithms of base e and of base 2
  float slope;          // d z / d logit, without softcap'
  float inner, cap;
};

constexpr float kExp2Floor = -126.75f;  // 2^y is exactly 0 here

template <bool kSoftcap> __device__ __forceinline__ float z_of(float logit, const Transform& f) {
  return kSoftcap ? f.cap * tanhf(logit * f.inner) : logit;
}

__device__ __forceinline__ float origin_of(float max) { return max == -INFINITY ? 0.0f : max; }

// One exponential per element: the vector's maximum is found first, and the sums are rescaled only if it is a new one.
template <bool kSoftcap, bool kSquares, int kCount>
__device__ __forceinline__ void add_statistics(Softmax<float>& s, const float (&logits)[kCount], const Transform& f) {
  float top = logits[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, logits[i]);
  top = z_of<kSoftcap>(top, f);  // softcap is monotonic
  if (top > s.max) s = s.relative_to(top, f.unit);
  const float origin = origin_of(s.max);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float y = max_nan((z_of<kSoftcap>(logits[i], f) - origin) * f.unit, kExp2Floor), e = exp2_approx(y);
    s.sum += e;
    s.dot = fmaf(y, e, s.dot);
    if (kSquares) s.sum2 = fmaf(e, e, s.sum2);
  }
}

struct Slopes {  // d loss / d logit = 2^y (a + b y) softcap'
  float max, a, b;
};

template <bool kSoftcap, bool kEntropy>
__device__ __forceinline__ float gradient_of(float logit, const Transform& f, const Slopes& g) {
  const float t = kSoftcap ? tanhf(logit * f.inner) : 0.0f;
  const float y = ((kSoftcap ? t * f.cap : logit) - g.max) * f.unit;
  float d;
  if (kEntropy) {
    const float bounded = max_nan(y, kExp2Floor);
    d = exp2_approx(bounded) * fmaf(bounded, g.b, g.a);
  } else {
    d = exp2_approx(y) * g.a;
  }
  return kSoftcap ? d * fmaf(-t, t, 1.0f) : d;
}

template <bool kSoftcap, bool kEntropy, int kCount>
__device__ __forceinline__ void to_gradient(float (&logits)[kCount], const Transform& f, const Slopes& g) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) logits[i] = gradient_of<kSoftcap, kEntropy>(logits[i], f, g);
}

}  // namespace gk
