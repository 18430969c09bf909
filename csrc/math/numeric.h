// Scalar helpers shared by host and device code.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define GK_HD __host__ __device__ __forceinline__
#else
// always_inline: these headers are compiled with several instruction sets into one module, and an out-of-line copy
// built for AVX-512 must never be the one the linker keeps.
#define GK_HD inline __attribute__((always_inline))
#endif

namespace gk {

// Overloads, not std::exp: unqualified exp(float) is double on the host and float on the device.
GK_HD float exp_(float x) { return expf(x); }
GK_HD double exp_(double x) { return ::exp(x); }
GK_HD float expm1_(float x) { return expm1f(x); }
GK_HD double expm1_(double x) { return ::expm1(x); }
GK_HD float log_(float x) { return logf(x); }
GK_HD double log_(double x) { return ::log(x); }

template <typename T> GK_HD T min_(T a, T b) { return b < a ? b : a; }
template <typename T> GK_HD T max_(T a, T b) { return a < b ? b : a; }
template <typename T> GK_HD T clamp_(T x, T low, T high) { return min_(max_(x, low), high); }

// e^x - 1 - x without cancellation: near 0 its series x^2/2 (1 + x/3 (1 + x/4 (...))), to the type's last bit.
template <typename T> GK_HD T expm1_minus_x_(T x) {
  if (!(x < T(0.5) && x > T(-0.5))) return exp_(x) - 1 - min_(x, T(1000));  // of infinity: e^1000 is no number already
  constexpr int kLast = sizeof(T) == 8 ? 17 : 10;
  T series = 1;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = kLast; k > 2; --k) series = 1 + x * series * (T(1) / k);
  return x * x * T(0.5) * series;
}

template <typename T> GK_HD bool is_finite_(T x) { return x - x == 0; }

// weight * x, but exactly 0 for a weight of 0, even if x is infinite or NaN.
template <typename T> GK_HD T weighted_(T weight, T x) { return weight == 0 ? T(0) : weight * x; }
// a * b, but 0 times infinity is 0; a NaN stays one.
template <typename T> GK_HD T times_(T a, T b) {
  const T product = a * b;  // a NaN made of two numbers is 0 times infinity
  return product != product && a == a && b == b ? T(0) : product;
}

}  // namespace gk
