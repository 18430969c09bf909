// The one launch site, and what is known of the machine the kernels run on.
#pragma once
#include <cstdint>

#include "../kernels.h"

#ifndef GK_EMULATED
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

namespace gk {

constexpr int kWarp = 32;

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks
};

struct Machine {
  int shared_bytes;  // dynamic shared memory of a block; two blocks have half of it each
  int threads;       // of a block that has a multiprocessor for itself
  bool bulk_copies;  // sm_90 and later: bulk copies and clusters
};

#ifdef GK_EMULATED

template <typename Kernel> Machine machine(const char*, Kernel) {
  const emulation::Machine& m = emulation::machine();
  return {m.shared_bytes, m.threads, m.bulk_copies};
}

// How many clusters of this shape run side by side.
template <typename Kernel> int64_t clusters_at_once(const char*, Kernel, const Grid& grid) {
  const emulation::Machine& m = emulation::machine();
  const int64_t on_one = m.shared_bytes / grid.shared_bytes;
  return max_<int64_t>(m.multiprocessors * on_one / grid.cluster, 1);
}

inline unsigned char* dynamic_shared() { return emulation::self().block->shared.get(); }

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, Stream, const Args&... args) {
  emulation::run_grid(name, {unsigned(grid.blocks)}, {unsigned(grid.threads)}, size_t(grid.shared_bytes), grid.cluster,
                      [&] { kernel(args...); });
}

#else

inline void check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(std::string("kernel ") + name + ": " + cudaGetErrorString(error));
}

inline int device_attribute(const char* name, cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(name, cudaGetDevice(&device));
  check(name, cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Of the current device, for a kernel: what it was compiled for decides what it can use. No synchronisation.
template <typename Kernel> Machine machine(const char* name, Kernel kernel) {
  cudaFuncAttributes compiled;
  check(name, cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)));
  return {device_attribute(name, cudaDevAttrMaxSharedMemoryPerBlockOptin), 512, compiled.ptxVersion >= 90};
}

constexpr int64_t kSharedBytesByDefault = 48 << 10;

// All the dynamic shared memory that the device has for a block, whatever this launch needs of it: another thread may
// be about to launch the same kernel with more. And as much of the multiprocessor's memory as goes for it, or the
// driver may leave room for one block where two would fit.
inline void allow_shared_memory(const char* name, const void* kernel) {
  cudaFuncAttributes compiled;
  check(name, cudaFuncGetAttributes(&compiled, kernel));
  const int most = device_attribute(name, cudaDevAttrMaxSharedMemoryPerBlockOptin) - int(compiled.sharedSizeBytes);
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  check(name,
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

class LaunchConfig {
 public:
  LaunchConfig(const char* name, const void* kernel, const Grid& grid, Stream stream) {
    if (grid.shared_bytes > kSharedBytesByDefault) allow_shared_memory(name, kernel);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(grid.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // points into itself
  const cudaLaunchConfig_t* get() const { return &config; }

 private:
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config{};
};

// How many clusters of this shape, or blocks, run side by side; grid.blocks is not looked at. A cluster lies in one
// group of multiprocessors, so there are fewer than their number would allow.
template <typename Kernel> int64_t clusters_at_once(const char* name, Kernel kernel, const Grid& grid) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  const LaunchConfig config(name, address, {grid.cluster, grid.threads, grid.shared_bytes, grid.cluster}, nullptr);
  int count = 0, multiprocessors = 1;
  if (grid.cluster > 1) {
    check(name, cudaOccupancyMaxActiveClusters(&count, kernel, config.get()));
  } else {
    multiprocessors = device_attribute(name, cudaDevAttrMultiProcessorCount);
    check(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, grid.threads, size_t(grid.shared_bytes)));
  }
  return max_<int64_t>(int64_t(count) * multiprocessors, 1);
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, Stream stream, const Args&... args) {
  const LaunchConfig config(name, reinterpret_cast<const void*>(kernel), grid, stream);
  check(name, cudaLaunchKernelEx(config.get(), kernel, Params(args)...));
}

#endif

}  // namespace gk
