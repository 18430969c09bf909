// Runs on the threads of the OpenMP runtime that torch has loaded. Threads of our own would share the cores with
// torch's, which spin for milliseconds after torch's last parallel loop; a second OpenMP runtime would spin too.
#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <thread>
#include <vector>

namespace gk {

// A forked child inherits an OpenMP runtime without its threads, and would wait for them forever.
static const pid_t kLoadedIn = getpid();

void run_on_threads(int threads, void (*body)(void*), void* data) {
  // GNU's entry point; LLVM's and Intel's runtimes have it too. The work gets done however many threads it gives.
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (threads <= 1) return body(data);
  if (openmp && getpid() == kLoadedIn) return openmp(body, data, unsigned(threads), 0);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, data);
  body(data);
  for (auto& thread : others) thread.join();
}

}  // namespace gk
