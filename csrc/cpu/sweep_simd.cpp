// Compiled once for each instruction set: -DGK_ISA=avx512 and so on, with the flags that setup.py gives it.
#include "simd.h"
#include "sweep.h"

#define GK_JOIN_(a, b) a##b
#define GK_JOIN(a, b) GK_JOIN_(a, b)

namespace gk {
namespace {

constexpr int64_t kStep = 2 * kLanes;

template <typename T> T minus_infinity();
template <> float minus_infinity<float>() { return -INFINITY; }
template <> bf16 minus_infinity<bf16>() { return {0xff80}; }
template <> f16 minus_infinity<f16>() { return {0xfc00}; }

// The last columns of a row, padded to a full step.
template <typename T> struct Tail {
  T values[kStep], penalty[kStep];
  Tail(const T* z, int64_t columns) {
    for (int64_t i = 0; i < kStep; ++i) {
      values[i] = i < columns ? z[i] : T{};
      penalty[i] = i < columns ? T{} : minus_infinity<T>();
    }
  }
};

// What a full step adds to z: nothing, at no cost (adding 0.0 would cost an instruction: -0.0 + 0.0 is not -0.0).
struct Nothing {};
inline Float operator+(Float z, Nothing) { return z; }
struct NoPenalty {
  Nothing a, b;
};

// fn(logits, penalty): the penalty, added to z, is -inf at padded columns, which then add exactly 0 to every sum.
template <int64_t kAhead = 0, typename T, typename Fn>
inline __attribute__((always_inline)) void for_each_pair(const T* z, int64_t columns, Fn fn) {
  int64_t i = 0;
  for (; i + kStep <= columns; i += kStep) {
    for (int64_t line = 0; kAhead && line < kStep; line += 64 / sizeof(T)) __builtin_prefetch(z + i + kAhead + line);
    fn(load2(z + i), NoPenalty{});
  }
  if (i == columns) return;
  const Tail<T> tail(z + i, columns - i);
  fn(load2(tail.values), load2(tail.penalty));
}

template <bool kSoftcap> inline Float capped_tanh(Float logit, const Transform& f) {
  return kSoftcap ? tanh_of(logit * float(f.inner)) : Float{};
}
template <bool kSoftcap> inline Float z_of(Float logit, const Transform& f) {
  return kSoftcap ? capped_tanh<kSoftcap>(logit, f) * float(f.cap) : logit;
}

template <typename T, bool kSoftcap, bool kSquares>
void stats(const void* logits, int64_t columns, const Transform& f, Softmax<double>* out) {
  const T* z = static_cast<const T*>(logits);
  Pair top{splat(-INFINITY), splat(-INFINITY)};
  for_each_pair(z, columns,
                [&](Pair v, auto penalty) { top = {max_of(v.a + penalty.a, top.a), max_of(v.b + penalty.b, top.b)}; });
  const float max = z_of<kSoftcap>(splat(max_lane(max_of(top.a, top.b))), f)[0];  // softcap is monotonic
  const float origin = max == -INFINITY ? 0.0f : max, unit = float(f.unit);
  const Exp2<sizeof(T) == 2 ? 5 : 6> exp2;

  Pair sum{}, dot{}, sum2{};
  for_each_pair<kTileColumns>(
      z, columns, [&](Pair v, auto penalty) {  // prefetches the next tile while this one is computed
        const auto add = [&](Float logit, auto penalty, Float& sum, Float& dot, Float& sum2) {
          const Float y = max_of(splat(kExp2Floor), (z_of<kSoftcap>(logit, f) + penalty - origin) * unit);
          const Float e = exp2(y);
          sum += e;
          dot += y * e;
          if (kSquares) sum2 += e * e;
        };
        add(v.a, penalty.a, sum.a, dot.a, sum2.a);
        add(v.b, penalty.b, sum.b, dot.b, sum2.b);
      });
  *out = {max, sum_lanes(sum.a + sum.b), sum_lanes(dot.a + dot.b), sum_lanes(sum2.a + sum2.b)};
}

// Without an entropy gradient b is 0 and a is folded into the exponential.
template <typename T, bool kSoftcap, bool kEntropy>
void gradient_sweep(const T* z, T* dz, int64_t columns, const Transform& f, float origin, float a, float b,
                    bool stream) {
  const float unit = float(f.unit);
  const Exp2<sizeof(T) == 2 ? 4 : 6> exp2(kEntropy ? 1 : a);
  const auto gradient_of = [&](Float logit) {
    const Float t = capped_tanh<kSoftcap>(logit, f);
    const Float y = ((kSoftcap ? t * float(f.cap) : logit) - origin) * unit;
    const Float bounded = kEntropy ? max_of(splat(kExp2Floor), y) : exp2_range(y);
    const Float dy = kEntropy ? exp2(bounded) * (bounded * b + a) : exp2(bounded);
    return kSoftcap ? dy * (1.0f - t * t) : dy;
  };
  const auto partial = [&](int64_t at, int64_t n) {
    const Pair v = load2(Tail<T>(z + at, n).values);
    T result[kStep];
    store2(result, {gradient_of(v.a), gradient_of(v.b)});
    std::memcpy(dz + at, result, n * sizeof(T));
  };
  int64_t i = 0;
  if (stream) {  // up to the first aligned vector
    i = int64_t(-reinterpret_cast<uintptr_t>(dz) % sizeof(Float) / sizeof(T));
    i = i < columns ? i : columns;
    if (i > 0) partial(0, i);
    for (; i + kStep <= columns; i += kStep) {
      const Pair v = load2(z + i);
      stream2(dz + i, {gradient_of(v.a), gradient_of(v.b)});
    }
    stream_fence();
  } else {
    for (; i + kStep <= columns; i += kStep) {
      const Pair v = load2(z + i);
      store2(dz + i, {gradient_of(v.a), gradient_of(v.b)});
    }
  }
  if (i < columns) partial(i, columns - i);
}

template <typename T, bool kSoftcap>
void gradient(const void* logits, void* out, int64_t columns, const Transform& f, double max, LogitGradient<double> g,
              bool stream) {
  const auto sweep = g.b == 0 ? gradient_sweep<T, kSoftcap, false> : gradient_sweep<T, kSoftcap, true>;
  sweep(static_cast<const T*>(logits), static_cast<T*>(out), columns, f, float(max), float(g.a * f.slope),
        float(g.b * f.slope), stream);
}

template <typename T> Sweeps select(bool softcap, bool squares) {
  if (softcap) return {squares ? stats<T, true, true> : stats<T, true, false>, gradient<T, true>};
  return {squares ? stats<T, false, true> : stats<T, false, false>, gradient<T, false>};
}

}  // namespace

Sweeps GK_JOIN(sweeps_, GK_ISA)(DType dtype, bool softcap, bool squares) {
  switch (dtype) {
    case DType::f32:
      return select<float>(softcap, squares);
    case DType::bf16:
      return select<bf16>(softcap, squares);
    case DType::f16:
      return select<f16>(softcap, squares);
    default:
      return {};  // f64: sweep_double.cpp
  }
}

}  // namespace gk
