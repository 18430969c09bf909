// The machine under cuda_on_cpu.h: one coroutine per CUDA thread, one cluster of blocks at a time.
//
// A thread runs until it has to wait; which of those that can go on does so is the schedule's choice. A kernel without
// races gives the same bits under every schedule, so tests run them all. Asynchronous copies are done when they are
// asked for (eager), when no thread can go on without them (late), or at any time between. Threads that all wait for
// each other are a deadlock, and an exception; so is what a GPU leaves undefined, where the machine can see it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace gk::emulation {

// In this order, copies are eager, late, late, and at random.
enum class Schedule : int { round_robin, one_warp_ahead, shuffled, shuffled_copies };

struct Machine {  // what cuda/launch.h finds in place of a GPU
  int multiprocessors = 2, threads = 64, shared_bytes = 10 << 10;
  bool bulk_copies = true;  // and clusters: sm_90
  Schedule schedule = Schedule::round_robin;
};
Machine& machine();

constexpr int kWarp = 32;
constexpr size_t kWidest = 64;  // bytes that a shuffle can move
constexpr size_t kSharedAlign = 128;
constexpr unsigned kMaxThreadsPerBlock = 1024, kMaxBlocksPerCluster = 8;

struct Barrier {
  int arrived = 0;
  uint64_t phase = 0;
  int expected = 0;             // by bar.sync
  std::vector<uint32_t> lanes;  // of each warp, that have come to bar.sync
};

struct MbarrierState {  // in addition to what the barrier counts itself
  int64_t missing_bytes = 0;
  bool published = false;
};

struct Block;

struct Warp {
  std::map<uint32_t, Barrier> barriers;  // by mask
  alignas(16) unsigned char slots[2][kWarp][kWidest];
  uint32_t lanes = 0;  // that exist: a block need not be whole warps
};

struct Thread {
  Block* block;
  dim3 index;
  unsigned rank;  // in the block
  uint64_t collectives = 0;
  const void* awaits = nullptr;
  bool done = false;
  int copies = 0;  // that have not landed
  Warp& warp() const;
  unsigned lane() const { return rank % kWarp; }
};

struct FreeShared {
  void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(kSharedAlign)); }
};

struct Block {
  dim3 index;
  unsigned cluster_rank;
  std::unique_ptr<unsigned char, FreeShared> shared;
  size_t shared_bytes = 0;
  uint64_t touched = 0;  // one past the cluster barrier's phase at the last access from or to another block; 0: none
  bool ended = false;    // all threads have; `shared` is NaNs again
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Barrier> barriers;  // bar.sync's names; 0: __syncthreads
  int live;
  int votes[2] = {0, 0};  // of __syncthreads_count, by the barrier's phase
};

inline Warp& Thread::warp() const { return block->warps[rank / kWarp]; }

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

Thread& self();
Cluster& cluster();

// Waits until `condition` holds; `key` is what wake() is called with when it may have changed.
void wait(const void* key, const std::function<bool()>& condition);
void wake(const void* key);
void check(bool holds, const char* what);  // throws from the kernel

// An arrival at a barrier of `expected` threads, then a wait for the others.
void arrive_and_wait(Barrier&, int expected);
void arrive(Barrier&, int expected);

void sync_warps(int name, int threads);  // bar.sync

// Immediately if copies are eager. `behind_own`: not before the copies that the thread has issued so far.
void copy_later(std::function<void()> copy, bool behind_own = false);

// The initialised mbarriers in the shared memory of blocks that have not ended.
std::map<const void*, MbarrierState>& mbarriers();

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_size,
              const std::function<void()>& kernel);

}  // namespace gk::emulation

// CUDA's built-in variables, of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = gk::emulation::kWarp;
