// Multiplies a gradient by the upstream one, which only the device knows: every block reads it, and exits if it is 1.
#include "launch.h"
#include "vec.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kColumns = 4096, kBlocks = 2048;  // a few blocks per multiprocessor, which exit within microseconds

template <typename T> __device__ void scale_run(T* x, int count, float factor) {
  const Cut<T> cut(count, past_boundary<T>(x));
  for (int i = int(threadIdx.x); i < cut.vectors; i += kThreads) {
    T* at = x + cut.head + i * kPerVector<T>;
    Vector<T> v = Vector<T>::unpack(load16(at));
#pragma unroll
    for (float& value : v.values) value *= factor;
    store16(at, v.packed());
  }
  const int scalar = cut.scalar_column(int(threadIdx.x));
  if (scalar < count) x[scalar] = from_float(to_float(x[scalar]) * factor, T{});
}

template <typename T> __global__ void __launch_bounds__(kThreads) scale_kernel(ScaleParams p) {
  const float factor = *static_cast<const float*>(p.factor);
  if (factor == 1) return;
  const int64_t runs = (p.columns + kColumns - 1) / kColumns, all = p.batch * p.tokens * runs;
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t row = i / runs, first = i % runs * kColumns;
    T* x = static_cast<T*>(p.matrix.data) + row / p.tokens * p.matrix.stride_b + row % p.tokens * p.matrix.stride_t;
    scale_run(x + first, int(min_(kColumns, p.columns - first)), factor);
  }
}

template <typename T> void launch_scale(const ScaleParams& p, Stream stream) {
  const int64_t runs = p.batch * p.tokens * ((p.columns + kColumns - 1) / kColumns);
  if (runs == 0) return;
  launch("scale_kernel", scale_kernel<T>, {min_(runs, kBlocks), kThreads}, stream, p);
}

}  // namespace

void scale(const ScaleParams& p, Stream stream) {
  if (p.dtype == DType::f32) return launch_scale<float>(p, stream);
  p.dtype == DType::bf16 ? launch_scale<bf16>(p, stream) : launch_scale<f16>(p, stream);
}

}  // namespace gk
