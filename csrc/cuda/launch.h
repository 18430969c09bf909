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
  int multiprocessors, shared_bytes;  // dynamic shared memory of a block; two blocks have half of it each
  int threads;                        // of a block that has a multiprocessor for itself
  bool bulk_copies;                   // sm_90 and later: bulk copies and clusters
};

#ifdef GK_EMULATED

template <typename Kernel> Machine machine(const char*, Kernel) {
  const emulation::Machine& m = emulation::machine();
  return {m.multiprocessors, m.shared_bytes, m.threads, m.bulk_copies};
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

// Of the current device, for a kernel: what it was compiled for decides what it can use. No synchronisation.
template <typename Kernel> Machine machine(const char* name, Kernel kernel) {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  cudaFuncAttributes compiled;
  check(name, cudaGetDevice(&device));
  check(name, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(name, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(name, cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel)));
  return {multiprocessors, shared_bytes, 512, compiled.ptxVersion >= 90};
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, Stream stream, const Args&... args) {
  if (grid.shared_bytes > 48 << 10)
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     int(grid.shared_bytes)));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(name, cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

#endif

}  // namespace gk
