// Runs on the threads of the OpenMP runtime that torch has loaded. Threads of our own would share the cores with
// torch's, which spin for milliseconds after torch's last parallel loop; a second OpenMP runtime would spin too.
//
// A forked child inherits GNU's runtime without its threads, and a loop that hands work to them waits forever. There,
// and in its children, each loop starts threads of its own. Whether the runtime had threads before the fork it does not
// say, so having been forked is enough.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

namespace gk {
namespace {

// Whether this process was forked and has not executed a program since. This module may be loaded for the first time
// in a forked child, whose parent's runtime it has never seen; only the kernel knows, as a flag of the main thread.
bool forked_before_load() {
#ifdef __linux__
  constexpr unsigned kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC, in the 9th field of /proc/self/stat
  char line[512] = "";
  if (std::FILE* file = std::fopen("/proc/self/stat", "r")) {
    if (!std::fgets(line, sizeof line, file)) line[0] = 0;
    std::fclose(file);
  }
  unsigned flags = 0;
  const char* after_name = std::strrchr(line, ')');  // the 2nd field is the program's name, with any characters
  const bool told = after_name && std::sscanf(after_name, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && flags != 0;
  return !told || (flags & kForkedWithoutExec);  // gVisor, for one, writes a 0
#else
  return false;  // the runtimes of LLVM and Intel notice a fork themselves
#endif
}

// GNU's entry point; LLVM's and Intel's runtimes have it too. The work gets done however many threads it gives.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Found when this module is loaded, after torch: of a static that is initialised at its first use, a forked child can
// inherit the lock of a thread that it does not have.
const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
std::atomic<bool> forked{forked_before_load()};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void run_on_own_threads(int threads, void (*body)(void*), void* data) {
  std::vector<std::thread> others;
  try {
    others.reserve(threads - 1);
    while (int(others.size()) < threads - 1) others.emplace_back(body, data);
  } catch (const std::exception&) {  // no memory for another thread, or a limit: those that have started do the work
  }
  body(data);
  for (std::thread& thread : others) thread.join();
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*), void* data) {
  if (threads <= 1) return body(data);
  if (openmp && !forked) return openmp(body, data, unsigned(threads), 0);
  run_on_own_threads(threads, body, data);
}

}  // namespace gk
