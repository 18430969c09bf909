// Threads for one call. They are started anew each time: no pool to survive a fork, none that spins beside torch's own.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace gk {

// Runs work(i) for i in [0, count), each i on one thread, handed out in order as threads become free.
template <typename Work> void parallel_for(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
}

}  // namespace gk
