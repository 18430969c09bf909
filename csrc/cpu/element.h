// Scalar conversions, for the target's column.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../kernels.h"

namespace gk {

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                         : std::ldexp(float(mantissa), -24);
  return h & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float x) {
  if (x != x) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place; rounding may carry into the exponent, as it must
  const int mantissa = int(std::nearbyint(std::ldexp(magnitude, -unit)));
  return uint16_t(sign | (mantissa + (unit > -24 ? (unit + 24) * 1024 : 0)));
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline double load_element(const char* data, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return reinterpret_cast<const float*>(data)[i];
    case DType::f64:
      return reinterpret_cast<const double*>(data)[i];
    case DType::bf16:
      return bf16_to_float(reinterpret_cast<const uint16_t*>(data)[i]);
    case DType::f16:
      return half_to_float(reinterpret_cast<const uint16_t*>(data)[i]);
  }
  return NAN;
}
inline void store_element(char* data, int64_t i, DType dtype, double value) {
  switch (dtype) {
    case DType::f32:
      reinterpret_cast<float*>(data)[i] = float(value);
      break;
    case DType::f64:
      reinterpret_cast<double*>(data)[i] = value;
      break;
    case DType::bf16:
      reinterpret_cast<uint16_t*>(data)[i] = float_to_bf16(float(value));
      break;
    case DType::f16:
      reinterpret_cast<uint16_t*>(data)[i] = float_to_half(float(value));
      break;
  }
}

}  // namespace gk
