// A fresh gradient as large as the logits costs several copies in page faults of 4 KiB; with 2 MiB pages it is nearly
// free.
#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gk {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing is no error
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace gk
