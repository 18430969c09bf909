#include "popcount.h"

#include "sweep.h"

#ifdef GK_X86
#include <immintrin.h>
#endif

namespace gk {
namespace {

inline __attribute__((always_inline)) void shared_words(const uint64_t* const* rows, const uint64_t* other,
                                                        int64_t words, uint32_t* const* out) {
  uint64_t count[kPopcountRows] = {};
  for (int64_t w = 0; w < words; ++w)
    for (int k = 0; k < kPopcountRows; ++k) count[k] += uint64_t(__builtin_popcountll(rows[k][w] & other[w]));
  for (int k = 0; k < kPopcountRows; ++k) *out[k] += uint32_t(count[k]);
}

void generic(const uint64_t* const* rows, const uint64_t* other, int64_t words, uint32_t* const* out) {
  shared_words(rows, other, words, out);
}

#ifdef GK_X86
__attribute__((target("popcnt"))) void popcnt(const uint64_t* const* rows, const uint64_t* other, int64_t words,
                                              uint32_t* const* out) {
  shared_words(rows, other, words, out);
}

__attribute__((target("avx512f,avx512vpopcntdq"))) void vpopcntdq(const uint64_t* const* rows, const uint64_t* other,
                                                                  int64_t words, uint32_t* const* out) {
  __m512i count[kPopcountRows] = {};
  for (int64_t w = 0; w < words; w += 8) {
    const __m512i o = _mm512_loadu_si512(other + w);
    for (int k = 0; k < kPopcountRows; ++k) {
      const __m512i both = _mm512_and_si512(_mm512_loadu_si512(rows[k] + w), o);
      count[k] = _mm512_add_epi64(count[k], _mm512_popcnt_epi64(both));
    }
  }
  for (int k = 0; k < kPopcountRows; ++k) *out[k] += uint32_t(_mm512_reduce_add_epi64(count[k]));
}
#endif

}  // namespace

SharedBits shared_bits() {
#ifdef GK_X86
  if (isa_in_use() >= Isa::avx512 && __builtin_cpu_supports("avx512vpopcntdq")) return vpopcntdq;
  if (isa_in_use() >= Isa::avx2 && __builtin_cpu_supports("popcnt")) return popcnt;
#endif
  return generic;
}

}  // namespace gk
