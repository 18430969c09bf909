#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>

#include "fiber.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace gk::emulation {
namespace {

struct Stop {};  // unwinds a thread whose grid has failed

class Scheduler {
 public:
  Cluster cluster;
  Thread* running = nullptr;

  void run(Cluster&& started, const std::function<void()>& kernel) {
    cluster = std::move(started), body = &kernel, failed = nullptr;
    ready.clear(), waiting.clear(), pending.clear();
    for (Block& block : cluster.blocks)
      for (Thread& thread : block.threads) start(thread);
    live = ready.size();
    while (live > 0) {
      if (copies_at_random() && !pending.empty() && draw() % 4 == 0)
        land(any_pending());
      else if (ready.empty())
        land_or_fail();
      else
        resume(*next());
    }
    if (failed) std::rethrow_exception(failed);
  }

  void wait(const void* key, const std::function<bool()>& condition) {
    while (!condition()) {
      running->awaits = key;
      waiting.push_back(running);
      suspend();
      if (failed) throw Stop{};
    }
  }
  void wake(const void* key) {
    const auto sleeps = [&](Thread* t) { return t->awaits != key; };
    const auto woken = std::stable_partition(waiting.begin(), waiting.end(), sleeps);
    ready.insert(ready.end(), woken, waiting.end());
    waiting.erase(woken, waiting.end());
  }
  void copy(std::function<void()> copy, bool behind_own) {
    const bool waits = behind_own && running->copies > 0;
    if (machine().schedule == Schedule::round_robin || (copies_at_random() && !waits && draw() % 2)) return copy();
    ++running->copies;
    pending.push_back({running, behind_own, std::move(copy)});
  }

 private:
  struct Copy {
    Thread* owner;
    bool behind_own;
    std::function<void()> land;
  };

  const std::function<void()>* body = nullptr;
  std::exception_ptr failed;
  std::deque<Thread*> ready;
  std::vector<Thread*> waiting;
  std::deque<Copy> pending;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::mt19937 draw{7};
  Context home;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  size_t live = 0;

  static size_t number(const Thread& t) { return t.block->cluster_rank * t.block->threads.size() + t.rank; }

  void start(Thread& thread) {
    const size_t i = number(thread);
    while (fibers.size() <= i) fibers.push_back(std::make_unique<Fiber>());
    fibers[i]->context.start(fibers[i]->stack.get(), kStackBytes, [] { scheduler().main(); });
    ready.push_back(&thread);
  }

  Thread* next() {
    auto at = ready.begin();
    if (machine().schedule == Schedule::one_warp_ahead) at = ready.end() - 1;
    if (machine().schedule == Schedule::shuffled || copies_at_random()) at += draw() % ready.size();
    Thread* thread = *at;
    ready.erase(at);
    return thread;
  }

  void resume(Thread& thread) {
    running = &thread;
    threadIdx = thread.index, blockIdx = thread.block->index;
    {
      StackSwitch to(fibers[number(thread)]->stack.get(), kStackBytes, false);
      home.switch_to(fibers[number(thread)]->context);
    }
    live -= thread.done;
  }
  void suspend() {
    StackSwitch to(home_stack, home_size, running->done);
    fibers[number(*running)]->context.switch_to(home);
  }

  void main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &home_stack, &home_size);
#endif
    try {
      (*body)();
    } catch (const Stop&) {
    } catch (...) {
      fail(std::current_exception());
    }
    retire();
    running->done = true;
    suspend();
  }

  // Barriers no longer wait for a thread that has exited; a block's shared memory goes with its last thread.
  void retire() {
    Block& block = *running->block;
    if (--block.live == 0) end(block);
    for (auto& [name, barrier] : block.barriers)
      if (name == 0 && barrier.arrived > 0 && barrier.arrived == block.live) {
        barrier.arrived = 0, ++barrier.phase;
        wake(&barrier);
      }
  }

  void end(Block& block) {
    const auto own = [&](const Copy& copy) { return copy.owner->block == &block; };
    if (std::any_of(pending.begin(), pending.end(), own)) fail("a block has ended before its copies");
    // Only from a later barrier of the whole cluster can a block tell that nobody still accesses its memory.
    if (block.touched == cluster.barrier.phase + 1)
      fail("a block has ended without a cluster_sync behind remote accesses");
    block.ended = true;
    std::memset(block.shared.get(), 0xff, block.shared_bytes);
    auto& barriers = mbarriers();
    barriers.erase(barriers.lower_bound(block.shared.get()),
                   barriers.lower_bound(block.shared.get() + block.shared_bytes));
  }

  void fail(const std::string& what) { fail(std::make_exception_ptr(std::runtime_error(what))); }
  void fail(std::exception_ptr error) {
    if (!failed) failed = error;
    pending.clear();
    for (Thread* t : waiting) ready.push_back(t);
    waiting.clear();
  }

  static bool copies_at_random() { return machine().schedule == Schedule::shuffled_copies; }

  void land_or_fail() {
    if (pending.empty()) return fail("deadlock: " + std::to_string(waiting.size()) + " threads wait for each other");
    land(copies_at_random() ? any_pending() : 0);
  }
  size_t any_pending() {
    const size_t i = draw() % pending.size();
    if (!pending[i].behind_own) return i;
    const auto same = [&](const Copy& copy) { return copy.owner == pending[i].owner; };
    return size_t(std::find_if(pending.begin(), pending.end(), same) - pending.begin());
  }
  void land(size_t i) {
    const Copy copy = std::move(pending[i]);
    pending.erase(pending.begin() + i);
    --copy.owner->copies;
    try {
      copy.land();
    } catch (...) {
      fail(std::current_exception());
    }
    wake(copy.owner);
  }

 public:
  static Scheduler& scheduler() {
    static Scheduler one;
    return one;
  }
};

Scheduler& scheduler() { return Scheduler::scheduler(); }

Cluster cluster_at(dim3 grid, dim3 block, size_t shared_bytes, unsigned size, uint64_t first) {
  Cluster cluster;
  cluster.blocks.resize(size);
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& b = cluster.blocks[rank];
    const uint64_t i = first + rank;
    b.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    b.cluster_rank = rank, b.shared_bytes = shared_bytes;
    b.shared.reset(static_cast<unsigned char*>(::operator new(shared_bytes, std::align_val_t(kSharedAlign))));
    std::memset(b.shared.get(), 0xff, shared_bytes);  // NaNs
    b.live = int(block.x * block.y * block.z);
    b.warps.resize((b.live + kWarp - 1) / kWarp);
    b.threads.resize(b.live);
    for (unsigned t = 0; t < b.threads.size(); ++t) {
      Thread& thread = b.threads[t];
      thread.rank = t, thread.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      b.warps[t / kWarp].lanes |= 1u << t % kWarp;
    }
  }
  return cluster;
}

}  // namespace

Machine& machine() {
  static Machine one;
  return one;
}
Thread& self() { return *scheduler().running; }
Cluster& cluster() { return scheduler().cluster; }
void wait(const void* key, const std::function<bool()>& condition) { scheduler().wait(key, condition); }
void wake(const void* key) { scheduler().wake(key); }
void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

void arrive(Barrier& barrier, int expected) {
  if (++barrier.arrived < expected) return;
  barrier.arrived = 0, ++barrier.phase;
  wake(&barrier);
}
void arrive_and_wait(Barrier& barrier, int expected) {
  const uint64_t phase = barrier.phase;
  arrive(barrier, expected);
  wait(&barrier, [&barrier, phase] { return barrier.phase != phase; });
}

void sync_warps(int name, int threads) {
  check(name >= 0 && name < 16, "bar.sync of a barrier that is none of the 16");
  check(threads > 0 && threads % kWarp == 0, "bar.sync of a number of threads that is not whole warps");
  Block& block = *self().block;
  Barrier& barrier = block.barriers[name];
  if (barrier.arrived == 0) barrier.expected = threads;
  check(barrier.expected == threads, "bar.sync of one barrier by two numbers of threads");
  barrier.lanes.resize(block.warps.size());
  barrier.lanes[self().rank / kWarp] |= 1u << self().lane();
  if (barrier.arrived + 1 == threads)
    for (size_t w = 0; w < block.warps.size(); ++w) {
      check(barrier.lanes[w] == 0 || barrier.lanes[w] == block.warps[w].lanes, "bar.sync by part of a warp");
      barrier.lanes[w] = 0;
    }
  arrive_and_wait(barrier, threads);
}

void copy_later(std::function<void()> copy, bool behind_own) { scheduler().copy(std::move(copy), behind_own); }
std::map<const void*, MbarrierState>& mbarriers() {
  static std::map<const void*, MbarrierState> all;
  return all;
}

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_size,
              const std::function<void()>& kernel) {
  static std::mutex one_grid_at_a_time;
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  gridDim = grid, blockDim = block;
  const bool backwards = machine().schedule != Schedule::round_robin;  // CUDA promises no order of blocks
  try {
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    check(grid.x % cluster_size == 0, "the grid is not whole clusters");
    check(cluster_size >= 1 && cluster_size <= kMaxBlocksPerCluster, "a cluster of more blocks than every GPU has");
    check(threads >= 1 && threads <= kMaxThreadsPerBlock, "a block of no thread, or of more than 1024");
    check(int64_t(shared_bytes) <= machine().shared_bytes, "more shared memory than the machine has");
    for (uint64_t i = 0; i < blocks; i += cluster_size) {
      Cluster started = cluster_at(grid, block, shared_bytes, cluster_size, backwards ? blocks - cluster_size - i : i);
      for (Block& b : started.blocks)
        for (Thread& thread : b.threads) thread.block = &b;
      scheduler().run(std::move(started), kernel);
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("kernel ") + name + ": " + error.what());
  }
}

}  // namespace gk::emulation
