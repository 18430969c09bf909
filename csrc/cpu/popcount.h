// How many bits rows of a bit matrix share: the inner loop of frequent n-grams (ngram_sets.h).
#pragma once
#include <cstdint>

namespace gk {

constexpr int kPopcountRows = 4;   // one load of the other row serves four
constexpr int64_t kWordAlign = 8;  // rows are multiples of this many words

// out[k] += popcount(rows[k] & other), k < kPopcountRows; words is a multiple of kWordAlign.
using SharedBits = void (*)(const uint64_t* const* rows, const uint64_t* other, int64_t words, uint32_t* const* out);

SharedBits shared_bits();  // of the instruction set in use

}  // namespace gk
