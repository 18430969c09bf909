#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace gk {

// Fewer tokens are not worth another thread. The policy loss does much more work per token than a sweep over values.
constexpr int64_t kMinTokensPerThread = 32768, kMinPolicyTokensPerThread = 4096;

// Calls body(data), which must not throw, on up to `threads` threads, this one among them, and waits for all.
void run_on_threads(int threads, void (*body)(void*), void* data);

// Runs work(i) for i in [0, count), each i on one thread, handed out in order as threads become free. Once one throws,
// no other is begun; when all threads have left the loop, the first exception is thrown here.
template <typename Work> void parallel_for(int64_t count, int threads, const Work& work) {
  threads = int(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct Shared {
    const int64_t count;
    const Work& work;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // of the thread that was the first to fail; read when all have left
  } shared{count, work};
  const auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    try {
      for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.work(i);
    } catch (...) {  // it would end the process, or leave other threads with a loop that is gone
      s.next.store(s.count, std::memory_order_relaxed);
      if (!s.failed.exchange(true, std::memory_order_relaxed)) s.error = std::current_exception();
    }
  };
  run_on_threads(threads, body, &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace gk
