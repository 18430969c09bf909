// The vector of the instruction set that this file is compiled for. Everything is written with the compiler's vector
// extensions, which gcc and clang also lower to SSE2 or NEON; intrinsics are used only where they are faster.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace gk {
namespace {  // one copy for each instruction set

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Float = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using UInt = uint32_t __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline Float splat(float x) { return Float{} + x; }

template <typename V> inline V load_bits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V> inline void store_bits(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// A NaN in `a` is dropped, one in `b` is kept.
inline Float max_of(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Combines lanes in a tree: a short dependency chain, and less rounding.
template <typename T, typename Combine> inline T combine_lanes(Float v, Combine combine) {
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = v[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}
inline float max_lane(Float v) {
  return combine_lanes<float>(v, [](float a, float b) { return a > b ? a : b; });
}
inline double sum_lanes(Float v) {
  return combine_lanes<double>(v, [](double a, double b) { return a + b; });
}

// 2^y, y no lower than kExp2Floor, times a constant that costs nothing: a polynomial in y - floor(y), minimax on [0, 1]
// with the constant term held at 1, so that 2^0 is exactly 1. Relative error before rounding by degree: 4: 3e-6,
// 5: 9e-8, 6: 1e-8.
template <int kDegree> class Exp2 {
 public:
  explicit Exp2(float factor = 1) {
    for (int i = 0; i <= kDegree; ++i) c[i] = splat(kCoefficients[i] * factor);
  }
  Float operator()(Float y) const {
#if defined(__AVX512DQ__)
    const Float f = (Float)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (Float)_mm512_scalef_ps((__m512)polynomial(f), (__m512)y);
#else
    const Float magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Float shifted = (y - 0.5f) + magic;
    const Float power = (Float)(((UInt)shifted + 127u) << 23);
    return polynomial(y - (shifted - magic)) * power;
#endif
  }

 private:
  static constexpr float kDegree4[] = {1, 6.930448524e-1f, 2.412801448e-1f, 5.224260278e-2f, 1.342660424e-2f};
  static constexpr float kDegree5[] = {
      1, 6.931513116e-1f, 2.401644524e-1f, 5.579990466e-2f, 9.017042184e-3f, 1.867124460e-3f};
  static constexpr float kDegree6[] = {
      1, 6.931470444e-1f, 2.402293055e-1f, 5.548528092e-2f, 9.675450850e-3f, 1.246785395e-3f, 2.161288628e-4f};
  static constexpr const float* kCoefficients = kDegree == 4 ? kDegree4 : kDegree == 5 ? kDegree5 : kDegree6;
  Float c[kDegree + 1];

  Float polynomial(Float f) const {
    Float p = c[kDegree];
    for (int i = kDegree - 1; i >= 0; --i) p = p * f + c[i];
    return p;
  }
};

constexpr float kExp2Floor = -126.75f;  // here 2^y is exactly 0

// Clamps to the range of Exp2; a NaN stays. AVX-512's own instructions need no clamp.
inline Float exp2_range(Float y) {
#if defined(__AVX512DQ__)
  return y;
#else
  return max_of(splat(kExp2Floor), y);
#endif
}

// tanh without cancellation near 0: E / (E + 2) with E = 2^y - 1 = 2^n (2^f - 1) + (2^n - 1), y = 2 v log2(e) = n + f.
inline Float tanh_of(Float v) {
  Float y = v * 2.8853900818f;
  y = max_of(splat(-60.0f), y);
  y = -max_of(splat(-60.0f), -y);
  const Float magic = splat(12582912.0f), shifted = y + magic, f = y - (shifted - magic);
  const Float power = (Float)(((UInt)shifted + 127u) << 23);
  Float p = splat(1.5353342e-4f);  // (2^f - 1) / f on [-1/2, 1/2], relative error 3e-8
  p = p * f + 1.3398872e-3f;
  p = p * f + 9.6184374e-3f;
  p = p * f + 5.5503325e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  const Float e = power * (p * f) + (power - 1.0f);
  return e / (e + 2.0f);
}

// ---- loads and stores of 2 * kLanes elements; the two vectors hold them in an order only store2 knows ----

struct Pair {
  Float a, b;
};

inline Pair load2(const float* p) { return {load_bits<Float>(p), load_bits<Float>(p + kLanes)}; }
inline void store2(float* p, Pair v) { store_bits(p, v.a), store_bits(p + kLanes, v.b); }

inline Pair load2(const bf16* p) {
  const UInt x = load_bits<UInt>(p);
  return {(Float)(x << 16), (Float)(x & 0xffff0000u)};
}
inline UInt round_to_bf16(Float v) {  // in the upper half; the lower half is noise
  const UInt x = (UInt)v;
  const UInt rounded = x + 0x7fffu + ((x >> 16) & 1u);
  return v == v ? rounded : (x | 0x400000u);
}
inline UInt pack(Pair v, const bf16*) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);  // a in the low half
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (UInt)_mm512_permutexvar_epi16(interleave, both);
#else
  return (round_to_bf16(v.a) >> 16) | (round_to_bf16(v.b) & 0xffff0000u);
#endif
}

// Half precision in the low half of each lane, by integer arithmetic; exact, denormals and infinities included.
inline Float from_half(UInt h) {
  const UInt magnitude = (h & 0x7fffu) << 13;
  const Float scaled = (Float)magnitude * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  const UInt special = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : (UInt)scaled;
  return (Float)(special | ((h & 0x8000u) << 16));
}
inline UInt to_half(Float v) {  // to the nearest, ties to even
  const UInt x = (UInt)v, sign = (x >> 16) & 0x8000u, magnitude = x & 0x7fffffffu;
  const UInt normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const UInt denormal = (UInt)((Float)magnitude + 0.5f) - 0x3f000000u;  // the addition shifts and rounds
  UInt h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude >= 0x47800000u ? UInt{} + 0x7c00u : h;
  h = magnitude > 0x7f800000u ? UInt{} + 0x7e00u : h;
  return h | sign;
}

inline Pair load2(const f16* p) {
#if defined(__AVX512F__)
  return {(Float)_mm512_cvtph_ps(load_bits<__m256i>(p)), (Float)_mm512_cvtph_ps(load_bits<__m256i>(p + kLanes))};
#elif defined(__F16C__)
  return {(Float)_mm256_cvtph_ps(load_bits<__m128i>(p)), (Float)_mm256_cvtph_ps(load_bits<__m128i>(p + kLanes))};
#else
  const UInt x = load_bits<UInt>(p);
  return {from_half(x & 0xffffu), from_half(x >> 16)};
#endif
}
inline UInt pack(Pair v, const f16*) {
#if defined(__AVX512F__)
  const __m256i a = _mm512_cvtps_ph((__m512)v.a, 0), b = _mm512_cvtps_ph((__m512)v.b, 0);
  return (UInt)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#elif defined(__F16C__)
  return (UInt)_mm256_set_m128i(_mm256_cvtps_ph((__m256)v.b, 0), _mm256_cvtps_ph((__m256)v.a, 0));
#else
  return to_half(v.a) | (to_half(v.b) << 16);
#endif
}
template <typename Half> inline void store2(Half* p, Pair v) { store_bits(p, pack(v, p)); }

// Stores past the cache; p must be aligned to a vector. stream_fence() must come before the memory is touched again.
inline void stream_bits(void* p, UInt v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#else
  store_bits(p, v);
#endif
}
inline void stream2(float* p, Pair v) { stream_bits(p, (UInt)v.a), stream_bits(p + kLanes, (UInt)v.b); }
template <typename Half> inline void stream2(Half* p, Pair v) { stream_bits(p, pack(v, p)); }
inline void stream_fence() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace gk
