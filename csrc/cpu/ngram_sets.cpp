#include "ngram_sets.h"

#include <algorithm>
#include <utility>

#include "../math/hash.h"
#include "parallel.h"
#include "popcount.h"

namespace gk {
namespace {

constexpr int64_t kBucketEntries = 1 << 15;  // a bucket's table stays in the second-level cache
constexpr int kMaxBucketBits = 10;
constexpr int64_t kFrequent = 32;       // frequent: in at least one of this many samples (measured with AVX-512)
constexpr int64_t kAhead = 8;           // rare n-grams whose lists are prefetched
constexpr int64_t kWordsPerStep = 256;  // of a bit row; those of a tile's samples stay in L1

// An entry after list(): begin << kEarlierBits | earlier for a rare n-gram, whose list from `begin` on has `earlier`
// samples before this one.
constexpr int kEarlierBits = 23;
constexpr uint64_t kEarlierMask = (uint64_t(1) << kEarlierBits) - 1;
constexpr uint64_t kFrequentFlag = uint64_t(1) << 63;  // | column within the bucket
constexpr uint64_t kOnce = ~uint64_t(0) - 1;           // in no other sample
constexpr uint64_t kRepeated = ~uint64_t(0);           // seen before in this sample

template <typename Token> void read_tokens(const DiversityParams& p, int64_t sample, std::vector<uint64_t>& mixed) {
  const int64_t row = p.cu_seqlens ? 0 : sample, first = p.cu_seqlens ? p.cu_seqlens[sample] : 0;
  const int64_t length = length_of(p, sample);
  const Token* ids = static_cast<const Token*>(p.token_ids.data) + row * p.token_ids.stride_b;
  const uint8_t* mask = static_cast<const uint8_t*>(p.active.data) + row * p.active.stride_b;
  mixed.clear();
  for (int64_t t = first; t < first + length; ++t)
    if (!p.active.data || mask[t * p.active.stride_t])
      mixed.push_back(mix(uint64_t(int64_t(ids[t * p.token_ids.stride_t]))));
}

// Tokens to n-grams, in place; a sample shorter than n is one n-gram.
void hash_ngrams(std::vector<uint64_t>& mixed, int64_t ngram) {
  if (mixed.empty()) return;
  const size_t n = std::min(mixed.size(), size_t(ngram)), count = mixed.size() - n + 1;
  for (size_t i = 0; i < count; ++i) mixed[i] = ngram_hash(&mixed[i], int64_t(n));
  mixed.resize(count);
}

struct Slot {  // of a bucket's hash table
  uint64_t hash;
  uint32_t samples, last;  // how many hold it; the last of them. No samples: free
};

Slot& find(std::vector<Slot>& table, uint64_t hash) {
  size_t at = hash & (table.size() - 1);
  while (table[at].samples && table[at].hash != hash) at = (at + 1) & (table.size() - 1);
  return table[at];
}

}  // namespace

int64_t length_of(const DiversityParams& p, int64_t sample) {
  return p.cu_seqlens ? p.cu_seqlens[sample + 1] - p.cu_seqlens[sample] : p.tokens;
}

NgramSets::NgramSets(const DiversityParams& p, const int64_t* samples, int64_t count, int threads)
    : count(count), sizes(count), begin(count + 1), rare_end(count) {
  for (int64_t i = 0; i < count; ++i) begin[i + 1] = begin[i] + length_of(p, samples[i]);
  while (bucket_bits < kMaxBucketBits && begin[count] >> bucket_bits > kBucketEntries) ++bucket_bits;
  buckets.resize(size_t(1) << bucket_bits);
  ends.resize(size_t(count) * buckets.size());
  entries = Buffer<uint64_t>(begin[count]);
  lists = Buffer<uint32_t>(begin[count]);

  hash(p, samples, threads);
  const auto n_buckets = int64_t(buckets.size());
  parallel_for(n_buckets, threads, [&](int64_t b) { list(b, (count + kFrequent - 1) / kFrequent); });
  int64_t columns = 0;
  for (Bucket& b : buckets) b.column_begin = columns, columns += b.columns;
  words = (columns + 64 * kWordAlign - 1) / (64 * kWordAlign) * kWordAlign;
  bits = Buffer<uint64_t>(count * words);
  parallel_for(count, threads, [&](int64_t i) { finish(i); });
}

// Hashes every sample's n-grams, bucket by bucket.
void NgramSets::hash(const DiversityParams& p, const int64_t* samples, int threads) {
  parallel_for(count, threads, [&](int64_t i) {
    std::vector<uint64_t> hashes;
    hashes.reserve(size_t(length_of(p, samples[i])));
    p.narrow ? read_tokens<int32_t>(p, samples[i], hashes) : read_tokens<int64_t>(p, samples[i], hashes);
    hash_ngrams(hashes, p.ngram);
    uint32_t* next = ends_of(i);  // counts, then where a bucket's next hash goes, then where the bucket ends
    for (uint64_t h : hashes) ++next[bucket_of(h)];
    uint32_t sum = 0;
    for (size_t b = 0; b < buckets.size(); ++b) sum += std::exchange(next[b], sum);
    for (uint64_t h : hashes) entries[begin[i] + next[bucket_of(h)]++] = h;
  });
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* end = ends_of(i);
    for (size_t b = 0; b < buckets.size(); ++b) buckets[b].entries += b ? end[b] - end[b - 1] : end[b];
  }
  int64_t sum = 0;
  for (Bucket& b : buckets) b.list_begin = sum, sum += b.entries;
}

// Calls fn(sample, entry&) for the entries of a bucket, sample after sample.
template <typename Fn> void NgramSets::visit(int64_t bucket, const Fn& fn) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* end = ends_of(i) + bucket;
    for (uint32_t at = bucket ? end[-1] : 0; at < *end; ++at) fn(uint32_t(i), entries[begin[i] + at]);
  }
}

// Finds which samples share the n-grams of a bucket, and replaces each hash by its entry.
void NgramSets::list(int64_t bucket, int64_t frequent) {
  Bucket& b = buckets[size_t(bucket)];
  size_t slots = 2;
  while (slots < 2 * size_t(b.entries)) slots *= 2;
  std::vector<Slot> table(slots);
  visit(bucket, [&](uint32_t i, uint64_t& entry) {
    Slot& slot = find(table, entry);
    const bool repeated = slot.samples && slot.last == i;
    slot = {entry, slot.samples + !repeated, i};
    entry = repeated ? kRepeated : uint64_t(&slot - table.data());
  });
  for (Slot& slot : table) {
    if (!slot.samples) continue;
    slot.last = 0;  // from here on: how many of its samples have been listed
    slot.hash = slot.samples == 1                   ? kOnce
                : int64_t(slot.samples) >= frequent ? kFrequentFlag | uint64_t(b.columns++)
                                                    : uint64_t(b.list_begin) << kEarlierBits;
    if (slot.hash < kFrequentFlag) b.list_begin += slot.samples;
  }
  visit(bucket, [&](uint32_t i, uint64_t& entry) {
    if (entry == kRepeated) return;
    Slot& slot = table[entry];
    entry = slot.hash;
    if (entry >= kFrequentFlag) return;
    lists[int64_t(entry >> kEarlierBits) + slot.last] = i;
    entry |= slot.last++;
  });
}

// Computes a sample's size and its bit row, and compacts its rare entries.
void NgramSets::finish(int64_t i) {
  uint64_t *row = bits.data() + i * words, *out = entries.data() + begin[i];
  std::fill(row, row + words, 0);
  const uint32_t* end = ends_of(i);
  uint32_t at = 0;
  for (size_t b = 0; b < buckets.size(); ++b)
    for (; at < end[b]; ++at) {
      const uint64_t entry = entries[begin[i] + at];
      sizes[i] += entry != kRepeated;
      if (entry >= kOnce) continue;
      if (entry >= kFrequentFlag) {
        const int64_t column = buckets[b].column_begin + int64_t(entry ^ kFrequentFlag);
        row[column / 64] |= uint64_t(1) << column % 64;
      } else if (entry & kEarlierMask) {
        *out++ = entry;
      }
    }
  rare_end[i] = out - entries.data();
}

void NgramSets::count_shared(int64_t first, int64_t end, const std::vector<int64_t>& others, int64_t block,
                             uint32_t* shared, int64_t stride) const {
  for (int64_t i = first; i < end; ++i) {
    uint32_t* row = shared + (i - first) * stride;
    std::fill(row, row + end, 0);
    for (int64_t e = begin[i]; e < rare_end[i]; ++e) {
      __builtin_prefetch(&lists[int64_t(entries[std::min(e + kAhead, rare_end[i] - 1)] >> kEarlierBits)]);
      const uint32_t* list = &lists[int64_t(entries[e] >> kEarlierBits)];
      for (uint64_t k = 0; k < (entries[e] & kEarlierMask); ++k) ++row[list[k]];
    }
  }
  const SharedBits add_shared_bits = shared_bits();
  for (int64_t w = 0; w < words; w += kWordsPerStep) {
    const auto add = [&](int64_t j) {
      for (int64_t i = first; i < end; i += kPopcountRows) {
        const uint64_t* rows[kPopcountRows];
        uint32_t unused = 0, *out[kPopcountRows];
        for (int k = 0; k < kPopcountRows; ++k) {
          rows[k] = &bits[std::min(i + k, end - 1) * words + w];
          out[k] = i + k < end ? shared + (i + k - first) * stride + j : &unused;
        }
        add_shared_bits(rows, &bits[j * words + w], std::min(kWordsPerStep, words - w), out);
      }
    };
    for (int64_t j : others) add(j);
    for (int64_t j = block; j < end - 1; ++j) add(j);
  }
}

}  // namespace gk
