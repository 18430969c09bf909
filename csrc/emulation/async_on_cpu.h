// The stand-ins for cuda/async.cuh: barriers that count in shared memory, and copies that the schedule delays.
#pragma once
#include <cstring>

#include "cuda_on_cpu.h"

namespace gk {

constexpr bool kSm90 = true;

struct Mbarrier {  // 8 bytes, as there
  uint16_t arrivals, expected;
  int16_t phase;
  int16_t unused;
};
struct MbarrierBytes {  // what a barrier still waits for, beside the arrivals
  std::map<const Mbarrier*, int64_t> missing;
};
inline MbarrierBytes& mbarrier_bytes() {
  static MbarrierBytes one;
  return one;
}

inline void complete_if_all_came(Mbarrier* barrier) {
  if (barrier->arrivals != barrier->expected || mbarrier_bytes().missing[barrier] != 0) return;
  barrier->arrivals = 0, barrier->phase ^= 1;
  emulation::wake(barrier);
}

inline void init_barrier(Mbarrier* barrier, int arrivals) {
  *barrier = {0, uint16_t(arrivals), 0, 0};
  mbarrier_bytes().missing[barrier] = 0;
}
inline void publish_barriers() {}

inline void arrive(Mbarrier* barrier) {
  emulation::check(barrier->arrivals < barrier->expected, "more arrivals at a barrier than it expects");
  ++barrier->arrivals;
  complete_if_all_came(barrier);
}
inline void arrive_expecting(Mbarrier* barrier, int bytes) {
  mbarrier_bytes().missing[barrier] += bytes;
  arrive(barrier);
}
inline void wait(Mbarrier* barrier, int phase) {
  emulation::wait(barrier, [=] { return barrier->phase != phase; });
}
inline void watch(Mbarrier*, int, const char*) {}  // a deadlock is found without a clock
inline void wait_cluster(Mbarrier* barrier, int phase) { wait(barrier, phase); }

inline void check_aligned(const void* a, const void* b, int bytes) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | uintptr_t(bytes);
  emulation::check(all % 16 == 0, "an asynchronous copy that is not of aligned 16 bytes");
}
inline void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier) {
  check_aligned(to, from, bytes);
  emulation::copy_later([=] {
    std::memcpy(to, from, size_t(bytes));
    mbarrier_bytes().missing[barrier] -= bytes;
    complete_if_all_came(barrier);
  });
}
inline void async_copy16(void* to, const void* from) {
  check_aligned(to, from, 16);
  emulation::copy_later([=] { std::memcpy(to, from, 16); });
}
inline void arrive_when_copied(Mbarrier* barrier) {
  emulation::copy_later([=] { arrive(barrier); });
}
inline void wait_for_own_copies() {}  // nothing outlives the grid here

inline void sync_threads(int name, int threads) {
  emulation::arrive_and_wait(emulation::self().block->barriers[name], threads);
}

inline int cluster_rank() { return int(emulation::self().block->cluster_rank); }
inline int cluster_size() { return int(emulation::cluster().blocks.size()); }
inline void cluster_sync() {
  auto& cluster = emulation::cluster();
  emulation::arrive_and_wait(cluster.barrier, int(cluster.blocks.size() * cluster.blocks[0].threads.size()));
}
template <typename T> T* at_rank(T* own, int rank) {
  unsigned char* begin = emulation::self().block->shared.get();
  const auto offset = reinterpret_cast<unsigned char*>(own) - begin;
  return reinterpret_cast<T*>(emulation::cluster().blocks[size_t(rank)].shared.get() + offset);
}
template <typename T> void store_remote(T* own, int rank, const T& value) { *at_rank(own, rank) = value; }
inline void arrive_remote(Mbarrier* own, int rank) { arrive(at_rank(own, rank)); }
inline void store_streaming(void* aligned, uint4 v) { *static_cast<uint4*>(aligned) = v; }

}  // namespace gk
