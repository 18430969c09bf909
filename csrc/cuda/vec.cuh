// 16-byte accesses, and the conversions between float and the logits' storage dtypes.
#pragma once
#include <cstring>

#include "launch.h"
#ifdef GK_EMULATED
#include "../cpu/element.h"
#endif

namespace gk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int kVectorBytes = 16;
template <typename T> constexpr int kPerVector = kVectorBytes / int(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

#ifdef GK_EMULATED

inline float to_float(f16 x) { return half_to_float(x.bits); }
inline unsigned pack(float low, float high, bf16) { return float_to_bf16(low) | unsigned(float_to_bf16(high)) << 16; }
inline unsigned pack(float low, float high, f16) { return float_to_half(low) | unsigned(float_to_half(high)) << 16; }
// Like the instruction: flushes denormals, keeps a NaN.
inline float exp2_approx(float y) {
  const float e = std::exp2(y);
  return e < 1.17549435e-38f ? 0.0f : e;
}
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? b : a; }
inline uint4 load16(const void* aligned) {
  emulation::check_aligned(aligned);
  return *static_cast<const uint4*>(aligned);
}
inline void store16(void* aligned, uint4 v) {
  emulation::check_aligned(aligned);
  *static_cast<uint4*>(aligned) = v;
}

#else

__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ unsigned pack(float low, float high, bf16) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ unsigned pack(float low, float high, f16) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
// 2^y to 2 ulp, denormals flushed.
__device__ __forceinline__ float exp2_approx(float y) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
__device__ __forceinline__ uint4 load16(const void* aligned) { return *static_cast<const uint4*>(aligned); }
__device__ __forceinline__ void store16(void* aligned, uint4 v) { *static_cast<uint4*>(aligned) = v; }

#endif

__device__ __forceinline__ float from_float(float x, float) { return x; }
template <typename Half> __device__ __forceinline__ Half from_float(float x, Half) {
  return {uint16_t(pack(x, 0.0f, Half{}))};
}

template <typename T> struct Vector {
  static constexpr int kCount = kPerVector<T>;
  float values[kCount];

  __device__ __forceinline__ static Vector unpack(uint4 raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    Vector v;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(T) == 4) {
        v.values[i] = __uint_as_float(words[i]);
      } else {
        v.values[i] = to_float(T{uint16_t(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)});
      }
    }
    return v;
  }
  __device__ __forceinline__ uint4 packed() const {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(values[i]);
      } else {
        words[i] = pack(values[2 * i], values[2 * i + 1], T{});
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

// An address's offset from a 16-byte boundary, in elements.
template <typename T> GK_HD int past_boundary(const void* p) {
  return int(reinterpret_cast<uintptr_t>(p) % kVectorBytes) / int(sizeof(T));
}

// Splits `count` elements, the first of them `past` elements after a boundary, into a scalar head, whole vectors and a
// scalar tail.
template <typename T> struct Cut {
  int count, head, vectors;

  __device__ Cut(int count, int past)
      : count(count), head(min_(past ? kPerVector<T> - past : 0, count)), vectors((count - head) / kPerVector<T>) {}
  // The i-th scalar of head and tail, which together are fewer than 2 vectors; `count` where there is none.
  __device__ int scalar_column(int i) const {
    const int behind = head + vectors * kPerVector<T>;
    return i < head ? i : min_(behind + i - head, count);
  }
};

}  // namespace gk
