#pragma once
#include <cstdint>

namespace gk {

// Before the first touch of freshly allocated memory.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace gk
