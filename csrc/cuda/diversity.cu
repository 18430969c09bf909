// Near-duplicates inside a group: each sample against the kept ones before it.
//
// The first launch makes every sample's set of n-gram hashes. In the second, each block takes one sample, in order: it
// puts the sample's set into a table, looks up the sets of the kept samples before it, one warp per sample, and decides
// whether to keep it. It waits for the earlier decisions one by one, so that after the last of them a single comparison
// is left.
#include "grid_sync.cuh"
#include "launch.h"
#include "ngram_table.cuh"
#include "scan.cuh"
#include "sequence_tiles.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kSharedSlots = 5632, kSharedNgrams = kSharedSlots * 3 / 4;
static_assert(kSharedNgrams >= kTokensInTable);
enum Decision : int32_t { kUndecided, kKept, kDropped };

struct Count {
  int value = 0;
  __device__ Count merge(const Count& o) const { return {value + o.value}; }
  __device__ Count compose(const Count& later) const { return merge(later); }
};

struct DiversityArgs {
  DiversityParams p;

  // A sample's tokens in the flat order of all tokens.
  __device__ Boundaries::Span span(int64_t sample) const {
    if (p.cu_seqlens) return Boundaries{p.cu_seqlens, p.samples, p.tokens}[sample];
    return {sample, sample * p.tokens, (sample + 1) * p.tokens};
  }
  __device__ Hash* set(int64_t sample) const {
    return static_cast<Hash*>(p.hashes) + (p.cu_seqlens ? begin(sample) : sample * p.tokens);
  }
  __device__ int32_t* ticket() const { return p.workspace.counters; }
  __device__ int32_t* decision(int64_t sample) const { return p.workspace.counters + 1 + sample; }
  __device__ int32_t* cluster(int64_t leader) const { return p.workspace.counters + 1 + p.samples + leader; }
  // Written by ngram_kernel, used with cu_seqlens: searching for a sample's begin in every comparison would take a
  // dozen loads.
  __device__ int64_t& begin(int64_t sample) const { return static_cast<int64_t*>(p.workspace.partials)[sample]; }
  __device__ int32_t& size(int64_t sample) const { return behind_begins()[sample]; }
  __device__ int32_t& leader(int64_t sample) const { return behind_begins()[p.samples + sample]; }

 private:
  __device__ int32_t* behind_begins() const {
    return reinterpret_cast<int32_t*>(static_cast<int64_t*>(p.workspace.partials) + p.samples);
  }
};

// A table for a set of up to `ngrams`. In `shared` it is emptied here; in its sample's part of global memory it is
// zeros at first, and holds the set after the first launch.
__device__ NgramTable table_for(const DiversityArgs& a, int64_t sample, int64_t ngrams, Hash* shared) {
  if (ngrams > kSharedNgrams) {
    const Boundaries::Span span = a.span(sample);
    return {static_cast<Hash*>(a.p.tables) + 2 * span.begin, uint32_t(2 * span.size())};
  }
  const uint32_t slots = uint32_t(min_(2 * ngrams + 1, kSharedSlots));
  for (uint32_t i = threadIdx.x; i < slots; i += kThreads) shared[i] = 0;
  __syncthreads();
  return {shared, slots};
}

// Writes the active tokens of a sample, mixed, one after the other; returns how many.
template <typename Token> __device__ int64_t gather(const DiversityArgs& a, const Boundaries::Span& span, Hash* out) {
  const DiversityParams& p = a.p;
  const int64_t row = p.cu_seqlens ? 0 : span.sequence, first = p.cu_seqlens ? span.begin : 0, length = span.size();
  const Token* ids = static_cast<const Token*>(p.token_ids.data) + row * p.token_ids.stride_b;
  const uint8_t* mask = static_cast<const uint8_t*>(p.active.data) + row * p.active.stride_b;
  const auto active = [&](int64_t t) { return !p.active.data || mask[t * p.active.stride_t] != 0; };
  const int64_t share = (length + kThreads - 1) / kThreads, begin = first + min_(threadIdx.x * share, length),
                end = first + min_((threadIdx.x + 1) * share, length);
  Count own, all;
  for (int64_t t = begin; t < end; ++t) own.value += active(t);
  const Count behind = exclusive_suffix<kThreads>(own, all);
  int64_t at = all.value - behind.value - own.value;
  for (int64_t t = begin; t < end; ++t)
    if (active(t)) out[at++] = mix(Hash(int64_t(ids[t * p.token_ids.stride_t])));
  __syncthreads();
  return all.value;
}

// Replaces each sample's tokens by its distinct n-grams, in any order. A sample shorter than n is one n-gram.
__global__ void __launch_bounds__(kThreads) ngram_kernel(DiversityArgs a) {
  __shared__ Hash shared[kSharedSlots];
  __shared__ int distinct;
  const int64_t sample = blockIdx.x;
  const Boundaries::Span span = a.span(sample);
  Hash* set = static_cast<Hash*>(a.p.hashes) + span.begin;
  const int64_t count = a.p.narrow ? gather<int32_t>(a, span, set) : gather<int64_t>(a, span, set);
  const int64_t n = min_(count, a.p.ngram), ngrams = count ? count - n + 1 : 0;
  if (threadIdx.x == 0) distinct = 0;
  const NgramTable table = table_for(a, sample, ngrams, shared);
  for (int64_t first = 0; first < ngrams; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const Hash h = i < ngrams ? key_of(set + i, n) : 0;
    __syncthreads();  // the set overwrites tokens that have been read
    if (h && table.insert(h)) set[atomicAdd(&distinct, 1)] = h;
  }
  __syncthreads();
  if (threadIdx.x == 0) a.begin(sample) = span.begin, a.size(sample) = distinct;
}

// The most similar kept sample; the first of equals.
struct Best {
  int both = 0, either = 0;  // 0: none
  int64_t position = 0, leader = 0;

  __device__ bool above(const Best& o) const {
    if (o.either == 0 || either == 0) return o.either == 0;
    const int64_t mine = int64_t(both) * o.either, theirs = int64_t(o.both) * either;
    return mine > theirs || (mine == theirs && position < o.position);
  }
  __device__ Best merge(const Best& o) const { return above(o) ? *this : o; }
};

__device__ Best compare(const DiversityArgs& a, const NgramTable& table, int64_t sample, int64_t other,
                        int64_t position) {
  const Hash* set = a.set(other);
  const int size = a.size(other);
  Count both;
  for (int i = threadIdx.x % kWarp; i < size; i += kWarp) both.value += table.has(set[i]);
  both = warp_merge(both);
  const int either = a.size(sample) + size - both.value;
  if (either == 0) return {1, 1, position, other};  // two empty sets are equal
  return {both.value, either, position, other};
}

__device__ void decide(const DiversityArgs& a, int64_t sample, const Best& best) {
  // In double, as on every backend, so that the quotient is rounded alike before it is compared.
  const bool keep = best.either == 0 || double(best.both) / double(best.either) < a.p.threshold;
  const int64_t leader = keep ? sample : best.leader;
  a.p.keep[sample] = keep;
  a.p.similarity[sample] = best.either == 0 ? 0 : float(best.both) / float(best.either);
  a.leader(sample) = int32_t(leader);
  atomicAdd(a.cluster(leader), 1);
  __threadfence();
  atomicExch(a.decision(sample), keep ? kKept : kDropped);
}

// Waits for a decision, for a warp. Nothing else that its block has written is read in this launch.
__device__ int decision_on(const DiversityArgs& a, int64_t sample) {
  int decision = kUndecided;
  if (lane_of_thread() == 0) decision = spin_until(a.decision(sample), kKept, "decide_kernel");
  return __shfl_sync(kFullWarp, decision, 0);
}

__global__ void __launch_bounds__(kThreads) decide_kernel(DiversityArgs a) {
  __shared__ Hash shared[kSharedSlots];
  const DiversityParams& p = a.p;
  const int64_t position = take_ticket(a.ticket());
  const int64_t sample = p.order ? p.order[position] : position;
  const int64_t first = p.order ? p.first[position] : position / p.group_size * p.group_size;
  const int size = a.size(sample);
  const NgramTable table = table_for(a, sample, size, shared);
  if (size <= kSharedNgrams)
    for (int i = threadIdx.x; i < size; i += kThreads) table.insert(a.set(sample)[i]);
  __syncthreads();
  Best best;
  for (int64_t q = first + threadIdx.x / kWarp; q < position; q += kWarps) {
    const int64_t other = p.order ? p.order[q] : q;
    if (decision_on(a, other) == kKept) best = best.merge(compare(a, table, sample, other, q));
  }
  best = block_merge(best);
  if (threadIdx.x == 0) decide(a, sample, best);
}

__global__ void __launch_bounds__(kThreads) cluster_kernel(DiversityArgs a) {
  const int64_t sample = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (sample < a.p.samples) a.p.weights[sample] = 1 / float(*a.cluster(a.leader(sample)));
}

}  // namespace

void group_diversity(const DiversityParams& p, Stream stream) {
  if (p.samples == 0) return;
  const DiversityArgs args{p};
  launch("ngram_kernel", ngram_kernel, {p.samples, kThreads}, stream, args);
  launch("decide_kernel", decide_kernel, {p.samples, kThreads}, stream, args);
  launch("cluster_kernel", cluster_kernel, {(p.samples + kThreads - 1) / kThreads, kThreads}, stream, args);
}

}  // namespace gk
