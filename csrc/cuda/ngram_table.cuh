// Hash tables of 64-bit n-gram hashes, open addressing; 0 is a free slot, so a hash of 0 counts as 1.
#pragma once
#include "../kernels.h"
#include "../math/hash.h"

namespace gk {

using Hash = unsigned long long;  // what atomicCAS takes

// The key of n consecutive tokens.
__device__ inline Hash key_of(const Hash* mixed, int64_t n) {
  const Hash h = ngram_hash(mixed, n);
  return h ? h : 1;
}

struct NgramTable {
  Hash* slots;
  uint32_t count;  // of slots; more than there are hashes

  __device__ bool insert(Hash h) const {  // false: it was there already
    for (uint32_t at = home(h);; at = next(at)) {
      const Hash before = atomicCAS(slots + at, Hash(0), h);
      if (before == 0 || before == h) return before == 0;
    }
  }
  __device__ bool has(Hash h) const {
    for (uint32_t at = home(h);; at = next(at)) {
      const Hash key = slots[at];
      if (key == 0 || key == h) return key == h;
    }
  }

 private:
  __device__ uint32_t home(Hash h) const { return uint32_t((h >> 32) * count >> 32); }
  __device__ uint32_t next(uint32_t at) const { return at + 1 < count ? at + 1 : 0; }
};

}  // namespace gk
