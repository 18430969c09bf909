// A gradient times the upstream one, which only the device knows: every block reads it, and ends where it is 1.
#include "launch.h"
#include "vec.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kColumns = 4096, kBlocks = 2048;  // a few blocks on each multiprocessor: many end within microseconds

template <typename T, bool kAligned> __device__ void scale_run(T* x, int64_t count, float factor) {
  if constexpr (kAligned) {
    for (int64_t i = threadIdx.x * kPerVector<T>; i < count; i += kThreads * kPerVector<T>) {
      Vector<T> v = Vector<T>::unpack(load16(x + i));
#pragma unroll
      for (int k = 0; k < kPerVector<T>; ++k) v.values[k] *= factor;
      store16(x + i, v.packed());
    }
  } else {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) x[i] = from_float(to_float(x[i]) * factor, T{});
  }
}

template <typename T, bool kAligned> __global__ void __launch_bounds__(kThreads) scale_kernel(ScaleParams p) {
  const float factor = *static_cast<const float*>(p.factor);
  if (factor == 1) return;
  const int64_t runs = (p.columns + kColumns - 1) / kColumns, all = p.batch * p.tokens * runs;
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t row = i / runs, first = i % runs * kColumns;
    T* x = static_cast<T*>(p.matrix.data) + row / p.tokens * p.matrix.stride_b + row % p.tokens * p.matrix.stride_t;
    scale_run<T, kAligned>(x + first, min_(kColumns, p.columns - first), factor);
  }
}

template <typename T> void launch_scale(const ScaleParams& p, Stream stream) {
  const auto whole = [](int64_t count) { return count * int64_t(sizeof(T)) % kVectorBytes == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(p.matrix.data) % kVectorBytes == 0 && whole(p.matrix.stride_b) &&
                       whole(p.matrix.stride_t) && whole(p.columns);
  const int64_t runs = p.batch * p.tokens * ((p.columns + kColumns - 1) / kColumns);
  if (runs == 0) return;
  launch("scale_kernel", aligned ? scale_kernel<T, true> : scale_kernel<T, false>, {min_(runs, kBlocks), kThreads},
         stream, p);
}

}  // namespace

void scale(const ScaleParams& p, Stream stream) {
  if (p.dtype == DType::f32) return launch_scale<float>(p, stream);
  p.dtype == DType::bf16 ? launch_scale<bf16>(p, stream) : launch_scale<f16>(p, stream);
}

}  // namespace gk
