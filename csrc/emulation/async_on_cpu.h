// The stand-ins for cuda/async.cuh: barriers that count in shared memory, and copies that the schedule delays.
#pragma once
#include <cstring>

#include "cuda_on_cpu.h"

namespace gk {

constexpr bool kSm90 = true;

struct Mbarrier {  // 8 bytes, as on a GPU
  uint16_t arrivals, expected;
  int16_t phase;
  int16_t unused;
};

inline emulation::MbarrierState& state_of(const Mbarrier* barrier) {
  const auto entry = emulation::mbarriers().find(barrier);
  emulation::check(entry != emulation::mbarriers().end(), "a barrier not initialised, or of a block that has ended");
  return entry->second;
}
inline void complete_if_all_came(Mbarrier* barrier) {
  if (barrier->arrivals != barrier->expected || state_of(barrier).missing_bytes != 0) return;
  barrier->arrivals = 0, barrier->phase ^= 1;
  emulation::wake(barrier);
}

inline void init_barrier(Mbarrier* barrier, int arrivals) {
  emulation::check(arrivals > 0 && arrivals <= UINT16_MAX, "a barrier of no arrivals, or of too many");
  *barrier = {0, uint16_t(arrivals), 0, 0};
  emulation::mbarriers()[barrier] = {};
}
inline void publish_barriers() {
  const emulation::Block& block = *emulation::self().block;
  auto& all = emulation::mbarriers();
  const auto end = all.lower_bound(block.shared.get() + block.shared_bytes);
  for (auto at = all.lower_bound(block.shared.get()); at != end; ++at) at->second.published = true;
}
inline void check_published(const Mbarrier* barrier) {
  emulation::check(state_of(barrier).published, "a barrier that is not published, by a copy or from another block");
}

inline void arrive(Mbarrier* barrier) {
  state_of(barrier);
  emulation::check(barrier->arrivals < barrier->expected, "more arrivals at a barrier than it expects");
  ++barrier->arrivals;
  complete_if_all_came(barrier);
}
inline void arrive_expecting(Mbarrier* barrier, int bytes) {
  constexpr int64_t kMost = (1 << 20) - 1;
  int64_t& missing = state_of(barrier).missing_bytes;
  missing += bytes;
  emulation::check(missing <= kMost, "more bytes than a barrier can wait for");
  arrive(barrier);
}
inline void wait(Mbarrier* barrier, int phase) {
  state_of(barrier);
  emulation::wait(barrier, [=] { return barrier->phase != phase; });
}
inline void watch(Mbarrier*, int, const char*) {}  // a deadlock is found without a clock
inline void wait_cluster(Mbarrier* barrier, int phase) { wait(barrier, phase); }

inline void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier) {
  for (const void* end : {static_cast<const void*>(to), from}) emulation::check_aligned(end);
  emulation::check(bytes > 0 && bytes % 16 == 0, "a bulk copy that is not of whole 16 bytes");
  check_published(barrier);
  emulation::copy_later([=] {
    std::memcpy(to, from, size_t(bytes));
    state_of(barrier).missing_bytes -= bytes;
    complete_if_all_came(barrier);
  });
}
inline void async_copy16(void* to, const void* from) {
  for (const void* end : {static_cast<const void*>(to), from}) emulation::check_aligned(end);
  emulation::copy_later([=] { std::memcpy(to, from, 16); });
}
inline void arrive_when_copied(Mbarrier* barrier) {
  emulation::copy_later([=] { arrive(barrier); }, true);
}
inline void wait_for_own_copies() {
  const emulation::Thread& thread = emulation::self();
  emulation::wait(&thread, [&] { return thread.copies == 0; });
}

inline void sync_threads(int name, int threads) { emulation::sync_warps(name, threads); }

inline int cluster_rank() { return int(emulation::self().block->cluster_rank); }
inline int cluster_size() { return int(emulation::cluster().blocks.size()); }
inline void cluster_sync() {
  auto& cluster = emulation::cluster();
  emulation::arrive_and_wait(cluster.barrier, int(cluster.blocks.size() * cluster.blocks[0].threads.size()));
}
// The result is to be used at once: only here is it checked that the other block still exists.
template <typename T> T* at_rank(T* own, int rank) {
  auto& cluster = emulation::cluster();
  emulation::Block& here = *emulation::self().block;
  emulation::check(rank >= 0 && rank < cluster_size(), "a block outside the cluster");
  emulation::Block& there = cluster.blocks[size_t(rank)];
  emulation::check(!there.ended, "an access to the shared memory of a block that has ended");
  if (&there != &here) here.touched = there.touched = cluster.barrier.phase + 1;
  return reinterpret_cast<T*>(there.shared.get() + (reinterpret_cast<unsigned char*>(own) - here.shared.get()));
}
template <typename T> void store_remote(T* own, int rank, const T& value) { *at_rank(own, rank) = value; }
inline void arrive_remote(Mbarrier* own, int rank) {
  Mbarrier* there = at_rank(own, rank);
  check_published(there);
  arrive(there);
}
inline void store_streaming(void* aligned, uint4 v) {
  emulation::check_aligned(aligned);
  *static_cast<uint4*>(aligned) = v;
}

}  // namespace gk
