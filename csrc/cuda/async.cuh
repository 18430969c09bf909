// Barriers in shared memory, asynchronous copies into it, and blocks of a cluster: PTX in small functions.
#pragma once
#include <cstring>

#include "watchdog.cuh"

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
// Makes initialised barriers visible to other blocks and to the copy engine. After the inits, before the block's
// barrier.
__device__ __forceinline__ void publish_barriers() {
#if GK_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(Mbarrier* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

#if GK_SM90
#define GK_OVER "mbarrier.try_wait.parity.shared.b64 over, "
#define GK_PAUSE ""  // try_wait suspends the warp for a while
#else
#define GK_OVER "mbarrier.test_wait.parity.shared.b64 over, "
#define GK_PAUSE "nanosleep.u32 32; "  // otherwise a waiting warp takes issue slots from working ones
#endif

// Waits until the phase of this parity is over. The loop holds nothing but the test and a pause, the form in which
// SentryWard, a verifier of PTX, recognises what is waited for.
__device__ __forceinline__ void wait(Mbarrier* barrier, int phase) {
  asm volatile(
      "{ .reg .pred over; "
      "AGAIN: " GK_OVER
      "[%0], %1; "
      "@over bra DONE; " GK_PAUSE
      "bra AGAIN; "
      "DONE: }" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}
// A watchdog ahead of the same wait, for a thread that can afford to read the clock: if the wait would never end,
// `kernel` stops with an error. GK_UNWATCHED leaves it out, for the verifier.
__device__ __forceinline__ void watch(Mbarrier* barrier, int phase, const char* kernel) {
#ifndef GK_UNWATCHED
  unsigned late;
  asm volatile(
      "{ .reg .pred over, early; .reg .b64 now, end; "
      "mov.u32 %0, 0; mov.u64 end, %%globaltimer; add.u64 end, end, %3; "
      "AGAIN: " GK_OVER
      "[%1], %2; "
      "@over bra DONE; " GK_PAUSE
      "mov.u64 now, %%globaltimer; setp.lt.u64 early, now, end; "
      "@early bra AGAIN; "
      "mov.u32 %0, 1; "
      "DONE: }"
      : "=&r"(late)
      : "r"(shared_address(barrier)), "r"(phase), "l"(kStuckAfterNs)
      : "memory");
  if (late) stuck(kernel);
#endif
}

// Copies 16 bytes, bypassing L1. arrive_when_copied() counts as one arrival once this thread's copies so far have
// landed.
__device__ __forceinline__ void async_copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void arrive_when_copied(Mbarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void wait_for_own_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A named barrier of `threads` threads, in whole warps; name 0 belongs to __syncthreads.
__device__ __forceinline__ void sync_threads(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Evicted first: the cache holds other data that will be read again.
__device__ __forceinline__ void store_streaming(void* aligned, uint4 v) { __stcs(static_cast<uint4*>(aligned), v); }

#if GK_SM90

__device__ __forceinline__ void arrive_expecting(Mbarrier* barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Addresses and size must be multiples of 16 bytes.
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
// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
// Stores at the same offset in another block's shared memory.
template <typename T> __device__ __forceinline__ void store_remote(T* own, int rank, const T& value) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  unsigned there, words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i)
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(there + 4 * i), "r"(words[i]) : "memory");
}
// Arrives at the barrier at the same offset in another block, and releases this thread's earlier writes to that block.
__device__ __forceinline__ void arrive_remote(Mbarrier* own, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void wait_cluster(Mbarrier* barrier, int phase) {
  asm volatile(
      "{ .reg .pred over; AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1; "
      "@over bra DONE; bra AGAIN; DONE: }" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

#else  // never called: behind `if constexpr (kSm90)`

__device__ void arrive_expecting(Mbarrier*, int);
__device__ void bulk_copy(void*, const void*, int, Mbarrier*);
__device__ int cluster_rank();
__device__ int cluster_size();
__device__ void cluster_sync();
template <typename T> __device__ void store_remote(T*, int, const T&);
__device__ void arrive_remote(Mbarrier*, int);
__device__ void wait_cluster(Mbarrier*, int);

#endif

}  // namespace gk

#endif
