// A wait for another block, or for a copy, that lasts for seconds will never end: it stops the grid with an error that
// names the kernel, instead of hanging the process and the GPU with it.
#pragma once
#include <stdexcept>
#include <string>

#include "launch.h"

#ifndef GK_EMULATED
// What assert() calls in a kernel; CUDA does not declare it under NDEBUG. The text goes to stderr; the launch ends with
// "device-side assert triggered".
extern "C" __device__ __attribute__((noreturn)) void __assertfail(const char* message, const char* file, unsigned line,
                                                                  const char* function, size_t char_size);
#endif

namespace gk {

constexpr uint64_t kStuckAfterNs = 10'000'000'000;

#ifdef GK_EMULATED

inline uint64_t nanoseconds() { return 0; }  // an emulated deadlock is found at once
[[noreturn]] inline void stuck(const char* kernel) { throw std::runtime_error(std::string(kernel) + " is stuck"); }

#else

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// `kernel`: a string literal, such as "gae_kernel".
[[noreturn]] __device__ __forceinline__ void stuck(const char* kernel) {
  __assertfail("a wait of 10 s: this kernel would never have ended", "grpo_kernels", 0, kernel, sizeof(char));
}

#endif

}  // namespace gk
