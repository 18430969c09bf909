#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace gk::emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;

struct Stop {};  // unwinds a thread whose grid has failed

#ifdef __x86_64__

// What a call preserves goes on the stack; ucontext would make two system calls a switch.
asm(".text\n"
    ".type gk_switch_stack, @function\n"
    "gk_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
extern "C" void gk_switch_stack(void** from, void* to);

struct Context {
  void* top = nullptr;
  void start(char* stack, size_t size, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) / 16 * 16) - 8;
    std::fill(frame, frame + 8, nullptr);  // six registers, where to return to, and from there to nowhere
    frame[6] = reinterpret_cast<void*>(entry);
    top = frame;
  }
  void switch_to(const Context& other) { gk_switch_stack(&top, other.top); }
};

#else

struct Context {
  ucontext_t registers;
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack, registers.uc_stack.ss_size = size, registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
  void switch_to(const Context& other) { swapcontext(&registers, &other.registers); }
};

#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

// Tells AddressSanitizer which stack is in use.
class StackSwitch {
 public:
#if defined(__SANITIZE_ADDRESS__)
  StackSwitch(const void* bottom, size_t size, bool last) {
    __sanitizer_start_switch_fiber(last ? nullptr : &saved, bottom, size);
  }
  ~StackSwitch() { __sanitizer_finish_switch_fiber(saved, nullptr, nullptr); }
  void* saved = nullptr;
#else
  StackSwitch(const void*, size_t, bool) {}
#endif
};

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
      if (ready.empty())
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
  void copy(std::function<void()> copy) {
    if (machine().schedule == Schedule::round_robin) return copy();
    pending.push_back(std::move(copy));
  }

 private:
  const std::function<void()>* body = nullptr;
  std::exception_ptr failed;
  std::deque<Thread*> ready;
  std::vector<Thread*> waiting;
  std::deque<std::function<void()>> pending;
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
    if (machine().schedule == Schedule::shuffled) at += draw() % ready.size();
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
    leave();
    running->done = true;
    suspend();
  }

  // An exited thread is waited for no more.
  void leave() {
    Block& block = *running->block;
    --block.live;
    for (auto& [name, barrier] : block.barriers)
      if (name == 0 && barrier.arrived > 0 && barrier.arrived == block.live) {
        barrier.arrived = 0, ++barrier.phase;
        wake(&barrier);
      }
  }

  void fail(std::exception_ptr error) {
    if (!failed) failed = error;
    for (Thread* t : waiting) ready.push_back(t);
    waiting.clear();
  }

  void land_or_fail() {
    if (pending.empty()) {
      const std::string count = std::to_string(waiting.size());
      return fail(std::make_exception_ptr(std::runtime_error("deadlock: " + count + " threads wait for each other")));
    }
    const auto copy = std::move(pending.front());
    pending.pop_front();
    copy();
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
    b.cluster_rank = rank;
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

void copy_later(std::function<void()> copy) { scheduler().copy(std::move(copy)); }

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster_size,
              const std::function<void()>& kernel) {
  static std::mutex one_grid_at_a_time;
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  check(grid.x % cluster_size == 0, "the grid is not whole clusters");
  gridDim = grid, blockDim = block;
  const bool backwards = machine().schedule != Schedule::round_robin;  // the order of blocks is not promised
  try {
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
