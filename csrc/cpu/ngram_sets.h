// The n-gram sets of one group's samples, arranged for counting what two of them share: exactly, and with a bound on
// the work that holds for every input.
//
// An n-gram of one sample only counts in the set's size. A *rare* one, in few of the samples, is the list of those
// samples; a *frequent* one is a column of a bit matrix. A pair of samples costs a frequent n-gram one bit of a
// popcount, and a rare one an addition if both hold it. So N tokens in S samples cost at most N * S / 64 additions,
// or N * 32 / S columns; where an n-gram is in a share of 1 / kFrequent of the samples, both cost about the same.
#pragma once
#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "memory.h"

namespace gk {

class NgramSets {
 public:
  // samples[0, count): the group, in order; they become 0 .. count - 1.
  NgramSets(const DiversityParams&, const int64_t* samples, int64_t count, int threads);

  int64_t size(int64_t i) const { return sizes[i]; }
  // shared[i - first][j] = |set i and set j| for first <= i < end and, of j < i, those in `others` or from `block` on.
  // Rows of `shared` are `stride` apart; whatever else lies before their column `end` is overwritten.
  void count_shared(int64_t first, int64_t end, const std::vector<int64_t>& others, int64_t block, uint32_t* shared,
                    int64_t stride) const;

 private:
  struct Bucket {  // n-grams whose hashes agree in their leading bits
    int64_t entries = 0, list_begin = 0, columns = 0, column_begin = 0;
  };

  void hash(const DiversityParams&, const int64_t* samples, int threads);
  void list(int64_t bucket, int64_t frequent);
  void finish(int64_t i);
  int64_t bucket_of(uint64_t hash) const { return int64_t(hash >> 1 >> (63 - bucket_bits)); }
  uint32_t* ends_of(int64_t i) { return ends.data() + i * int64_t(buckets.size()); }
  template <typename Fn> void visit(int64_t bucket, const Fn& fn);

  int64_t count;
  int bucket_bits = 0;
  std::vector<Bucket> buckets;
  std::vector<int64_t> sizes, begin, rare_end;  // rare n-grams of sample i: entries[begin[i], rare_end[i])
  std::vector<uint32_t> ends;                   // [count, buckets]: ends of a sample's buckets, from begin[i]
  Buffer<uint64_t> entries;                     // hashes at first, then what stands for an n-gram in ngram_sets.cpp
  Buffer<uint32_t> lists;
  int64_t words = 0;
  Buffer<uint64_t> bits;  // [count, words]
};

int64_t length_of(const DiversityParams&, int64_t sample);  // its tokens, including masked ones

}  // namespace gk
