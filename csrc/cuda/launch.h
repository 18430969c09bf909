// The only launch site, and the properties of the GPU that kernels depend on.
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
  int shared_bytes;  // dynamic shared memory per block; two blocks have half of it each
  int threads;       // per block that has a multiprocessor to itself
  bool bulk_copies;  // sm_90 and later: bulk copies and clusters
};

#ifdef GK_EMULATED

template <typename Kernel> Machine machine(const char*, Kernel) {
  const emulation::Machine& m = emulation::machine();
  return {m.shared_bytes, m.threads, m.bulk_copies};
}

// How many clusters of this shape run at a time.
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

// The current device, for a kernel: what it can use depends on what it was compiled for. No host sync.
template <typename Kernel> Machine machine(const char* name, Kernel kernel) {
  cudaFuncAttributes compiled;
  check(name, cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)));
  return {device_attribute(name, cudaDevAttrMaxSharedMemoryPerBlockOptin), 512, compiled.ptxVersion >= 90};
}

constexpr int64_t kSharedBytesByDefault = 48 << 10;

// Allows all the dynamic shared memory that the device has for a block, however much this launch needs: another thread
// may be about to launch the same kernel with more. Asks for the largest carveout too, or the driver may leave room for
// one block where two would fit.
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

// How many clusters, or blocks, of this shape run at a time; grid.blocks is ignored. A cluster must fit in one group of
// multiprocessors, so there are fewer than the number of multiprocessors would allow.
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
