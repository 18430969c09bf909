// Barriers in shared memory, asynchronous copies into it, and blocks of a cluster: PTX in small functions.
#pragma once
#include "launch.h"

#ifdef GK_EMULATED
#include "../emulation/async_on_cpu.h"
#else

namespace gk {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GK_SM90 1
#else
#define GK_SM90 0
#endif
constexpr bool kSm90 = GK_SM90;  // bulk copies and clusters

struct Mbarrier {
  uint64_t state;
};

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void init_barrier(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, before the block's barrier: to the other blocks and to the copy engine.
__device__ __forceinline__ void publish_barriers() {
#if GK_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(Mbarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void wait(Mbarrier* barrier, int phase) {
#if GK_SM90
#define GK_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define GK_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  unsigned over = 0;
  while (!over)
    asm volatile("{ .reg .pred p; " GK_WAIT " p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(phase)
                 : "memory");
#undef GK_WAIT
}

// 16 bytes past L1; the thread's copies so far then count as one arrival when they are done.
__device__ __forceinline__ void async_copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void arrive_when_copied(Mbarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void wait_for_own_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A barrier of the first `threads` threads that come, whole warps; name 0 is __syncthreads'.
__device__ __forceinline__ void sync_threads(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Past the caches' other contents, which are wanted again.
__device__ __forceinline__ void store_streaming(void* aligned, uint4 v) { __stcs(static_cast<uint4*>(aligned), v); }

#if GK_SM90

__device__ __forceinline__ void arrive_expecting(Mbarrier* barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Addresses and size in whole 16 bytes.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ __forceinline__ int cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
// Of every thread of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
// The same place in another block's shared memory.
template <typename T> __device__ __forceinline__ T* at_rank(T* own, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(own)), "r"(rank));
  return reinterpret_cast<T*>(there);
}
// At the barrier in the same place of another block; publishes what this thread has written to that block.
__device__ __forceinline__ void arrive_remote(Mbarrier* own, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void wait_cluster(Mbarrier* barrier, int phase) {
  unsigned over = 0;
  while (!over)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(phase)
        : "memory");
}

#else  // never called: behind `if constexpr (kSm90)`

__device__ void arrive_expecting(Mbarrier*, int);
__device__ void bulk_copy(void*, const void*, int, Mbarrier*);
__device__ int cluster_rank();
__device__ int cluster_size();
__device__ void cluster_sync();
template <typename T> __device__ T* at_rank(T*, int);
__device__ void arrive_remote(Mbarrier*, int);
__device__ void wait_cluster(Mbarrier*, int);

#endif

}  // namespace gk

#endif
