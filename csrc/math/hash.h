// 64-bit hashes of n-grams.
#pragma once
#include "numeric.h"

namespace gk {

GK_HD uint64_t mix(uint64_t x) {  // a bijection: single tokens never collide
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93;
  return x ^ x >> 32;
}

// The hash of n consecutive tokens, each already mixed.
template <typename Hash> GK_HD Hash ngram_hash(const Hash* mixed, int64_t n) {
  Hash h = Hash(n);
  for (int64_t k = 0; k < n; ++k) h = h * 0x9e3779b97f4a7c15 + mixed[k];
  return h;
}

}  // namespace gk
