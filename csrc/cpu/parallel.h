#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace gk {

// Fewer tokens are not worth another thread. The policy loss does much more work per token than a sweep over values.
constexpr int64_t kMinTokensPerThread = 32768, kMinPolicyTokensPerThread = 4096;

// Calls body(data) on up to `threads` threads, this one among them, and waits for all.
void run_on_threads(int threads, void (*body)(void*), void* data);

// Runs work(i) for i in [0, count), each i on one thread, handed out in order as threads become free.
template <typename Work> void parallel_for(int64_t count, int threads, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next;
    const int64_t count;
    const Work& work;
  } shared{{0}, count, work};
  const auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.work(i);
  };
  run_on_threads(int(std::min<int64_t>(threads, count)), body, &shared);
}

}  // namespace gk
