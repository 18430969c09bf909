// Loops and kernels on several threads, for ThreadSanitizer and AddressSanitizer; test_threads.py compiles this with
// csrc/cpu/*.cpp. Ends with "well", or with the first check that does not hold.
#include <sys/personality.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "cpu/parallel.h"
#include "native_kernels.h"

// An OpenMP runtime as parallel.cpp finds torch's, of threads that the sanitizer knows: of GNU's it would report races
// that are none. It gives one thread fewer than it is asked for.
static std::atomic<int> openmp_loops{0};
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  ++openmp_loops;
  std::vector<std::thread> others;
  spared = true;
  for (unsigned t = 2; t < threads; ++t) others.emplace_back(body, data);
  spared = false;
  body(data);
  for (std::thread& thread : others) thread.join();
}

namespace {

struct Kernel {
  const char* name;
  std::function<Bytes(int threads)> run;
};
const Kernel kKernels[] = {
    {"rows, each on one thread", [](int t) { return rows(37, 3001, true, t); }},
    {"rows, each on all threads", [](int t) { return rows(2, 40009, true, t); }},
    {"rows, two passes", [](int t) { return rows(23, 5003, false, t); }},
    {"tokens", [](int t) { return tokens(8, 2048, t); }},
    {"advantages", [](int t) { return advantages(70000, 7, t); }},
    {"diversity of one group", [](int t) { return diversity(300, 20, 300, t); }},
    {"diversity of many", [](int t) { return diversity(120, 20, 4, t); }},
    {"critic", [](int t) { return critic(9, 8000, t); }},
};

void every_index_once(int threads) {
  std::vector<int> times(10007);
  gk::parallel_for(int64_t(times.size()), threads, [&](int64_t i) { ++times[i]; });
  for (int t : times) check(t == 1, "an index not once");
}

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void exceptions(int threads) {
  constexpr int64_t kCount = 100000;
  std::atomic<int64_t> begun{0}, left{0};
  std::atomic<bool> thrown{false};
  std::string said;
  try {
    gk::parallel_for(kCount, threads, [&](int64_t i) {
      ++begun;
      struct Leave {
        std::atomic<int64_t>& left;
        ~Leave() { ++left; }
      } leave{left};
      if (i == 10) thrown = true, throw Error("number 10");
      if (thrown) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
  } catch (const Error& error) {
    said = error.what();
  }
  check(said == "number 10", "an exception did not arrive");
  check(begun == left, "a thread is still in the loop");
  check(begun < kCount, "the other threads did not stop");
  int caught = 0;  // all throw, in a loop within a loop
  for (int i = 0; i < 20; ++i) try {
      gk::parallel_for(threads, threads, [&](int64_t) {
        gk::parallel_for(8, threads, [](int64_t k) { throw std::string(100, char('a' + k)); });
      });
    } catch (const std::string& text) {
      caught += text.size() == 100;
    }
  check(caught == 20, "an exception of a loop within a loop");
}

void kernels(const std::vector<Bytes>& expected, int threads) {
  for (size_t k = 0; k < expected.size(); ++k)
    check(kKernels[k].run(threads) == expected[k], std::string(kKernels[k].name) + ": other bits on several threads");
}

// Memory runs out at each of a kernel's allocations in turn, or at every few where there are more than `tries`.
void out_of_memory(const std::vector<Bytes>& expected, int threads, int tries) {
  for (size_t k = 0; k < expected.size(); ++k) {
    const Kernel& kernel = kKernels[k];
    allocations = 0;
    kernel.run(threads);
    const int64_t all = allocations, step = all / tries + 1;
    int64_t failed = 0;
    for (int64_t first = 0; first < all; first += step) {
      allocations = 0, fails_from = first;
      try {
        kernel.run(threads);
      } catch (const std::bad_alloc&) {
        ++failed;
      }
      fails_from = INT64_MAX;
    }
    check(failed > 0, std::string(kernel.name) + ": no allocation failed");
    check(kernel.run(threads) == expected[k], std::string(kernel.name) + ": other bits after running out of memory");
  }
}

void on_threads(const std::vector<Bytes>& expected, int tries) {
  for (int threads : {1, 2, 3, 7}) every_index_once(threads);
  exceptions(2), exceptions(5);
  kernels(expected, 3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) callers.emplace_back([&] { every_index_once(3), exceptions(3), kernels(expected, 2); });
  for (std::thread& caller : callers) caller.join();
  out_of_memory(expected, 3, tries);
}

}  // namespace

int main(int, char** arguments) {
  const int tries = std::atoi(arguments[1]);
  std::vector<Bytes> expected;
  for (const Kernel& kernel : kKernels) expected.push_back(kernel.run(1));
  check(openmp_loops == 0, "one thread is not a parallel loop");
  on_threads(expected, tries);
  // Without randomised addresses the flags in /proc/self/stat may be 0, which parallel.cpp takes for "not told".
  const int loops = openmp_loops;
  check(loops > 0 || personality(0xffffffff) & ADDR_NO_RANDOMIZE, "OpenMP's threads are not used");
  const pid_t child = fork();
  if (child == 0) {
    on_threads(expected, tries);
    check(openmp_loops == loops, "OpenMP in a forked child");
    std::_Exit(0);
  }
  int status = -1;
  check(waitpid(child, &status, 0) == child && status == 0, "a forked child failed");
  kernels(expected, 3);
  std::puts("well");
}
