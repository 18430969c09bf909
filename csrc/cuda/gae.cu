// Generalised advantage estimation: a reverse scan of each sequence in one launch. With lam = 1 and no values it gives
// discounted returns.
//
// A block takes a tile of a sequence, the last tiles first. The effect of a tile on the running sum is an affine map,
// which it stores for the tiles before it; each of those composes the maps of the later tiles itself, in their order,
// so that the result does not depend on timing.
#include "grid_sync.cuh"
#include "launch.h"
#include "policy_inputs.cuh"
#include "scan.cuh"
#include "sequence_tiles.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256, kTokensPerThread = int(kTokensPerTile) / kThreads;

// The effect of a run of tokens on the running sum A and the next value V that come from the tokens after it: A ->
// factor A + slope V + sum, and V -> the value of the run's first active token. Where none is active both pass through.
struct AffineMap {
  float factor = 1, slope = 0, sum = 0, value = 0;
  int active = 0;

  __device__ AffineMap compose(const AffineMap& later) const {
    if (!active) return later;
    if (!later.active) return *this;
    return {factor * later.factor, factor * later.slope, sum + slope * later.value + factor * later.sum, value, 1};
  }
};

struct GaeArgs {
  GaeParams p;
  float gamma, decay;
  int64_t tiles;

  __device__ AffineMap* maps() const { return static_cast<AffineMap*>(p.workspace.partials); }
  __device__ int32_t* done(int64_t tile_id) const { return p.workspace.counters + 1 + tile_id; }
};
static_assert(sizeof(AffineMap) == kGaeSums * sizeof(float));

class GaeBlock {
 public:
  __device__ GaeBlock(const GaeArgs& a, const SequenceTile& tile, float* staged)
      : a(a), p(a.p), tile(tile), rewards(staged), values(staged + kStaged) {}

  static constexpr int kStaged = int(kTokensPerTile) + int(kTokensPerTile) / kTokensPerThread;  // no bank conflicts

  // Loads are coalesced; afterwards each thread owns kTokensPerThread consecutive tokens. Masked ones are not read.
  __device__ void load() {
    for (int i = threadIdx.x; i < int(tile.size()); i += kThreads) {
      const int64_t t = tile.begin + i;
      const bool active = is_active(p.active, tile.row, t);
      rewards[at(i)] = active ? read(p.rewards, tile.row, t, 0) : 0;
      values[at(i)] = active ? read(p.values, tile.row, t, 0) : 0;
    }
    __syncthreads();
    for (int k = 0; k < kTokensPerThread; ++k) {
      const int i = int(threadIdx.x) * kTokensPerThread + k;
      const bool active = i < int(tile.size()) && is_active(p.active, tile.row, tile.begin + i);
      active_bits |= unsigned(active) << k;
    }
  }

  // The map of the thread's own tokens.
  __device__ AffineMap map() const {
    AffineMap all;
    for (int k = kTokensPerThread - 1; k >= 0; --k) all = token(k).compose(all);
    return all;
  }

  // Replaces the staged inputs by the results, given the map of all later tokens, and stores them.
  __device__ void store(const AffineMap& behind) {
    AffineMap all = behind;
    for (int k = kTokensPerThread - 1; k >= 0; --k) {
      if (!(active_bits >> k & 1)) continue;
      const int i = at(int(threadIdx.x) * kTokensPerThread + k);
      const float value = values[i];
      all = token(k).compose(all);
      rewards[i] = all.sum, values[i] = all.sum + value;
    }
    __syncthreads();
    const int64_t out = tile.row * p.tokens + tile.begin;
    for (int i = threadIdx.x; i < int(tile.size()); i += kThreads) {
      static_cast<float*>(p.advantages)[out + i] = rewards[at(i)];
      if (p.returns) static_cast<float*>(p.returns)[out + i] = values[at(i)];
    }
  }

  __device__ void store_zeros() const {
    const int64_t out = tile.row * p.tokens + tile.begin;
    for (int i = threadIdx.x; i < int(tile.size()); i += kThreads) {
      static_cast<float*>(p.advantages)[out + i] = 0;
      if (p.returns) static_cast<float*>(p.returns)[out + i] = 0;
    }
  }

 private:
  const GaeArgs& a;
  const GaeParams& p;
  const SequenceTile tile;
  float *rewards, *values;
  unsigned active_bits = 0;  // one for each of the thread's tokens

  __device__ static int at(int i) { return i + i / kTokensPerThread; }
  __device__ AffineMap token(int k) const {
    if (!(active_bits >> k & 1)) return {};
    const int i = at(int(threadIdx.x) * kTokensPerThread + k);
    return {a.decay, a.gamma, temporal_difference(rewards[i], values[i], 0.0f, a.gamma), values[i], 1};
  }
};

// The composed maps of the sequence's later tiles: each thread composes some, then the block all. A thread waits for
// the tiles that it reads itself, all threads at once: one after the other would cost a round trip per tile.
__device__ AffineMap later_tiles(const GaeArgs& a, const SequenceTile& tile) {
  const int64_t later = tile.num_tiles - 1 - tile.index, share = (later + kThreads - 1) / kThreads;
  const int64_t tile_id = tile.first_tile + tile.index;
  AffineMap all;
  for (int64_t k = min_((threadIdx.x + 1) * share, later); k > threadIdx.x * share; --k) {
    spin_until(a.done(tile_id + k), 1, "gae_kernel");
    all = load_from_other_block(a.maps() + tile_id + k).compose(all);
  }
  AffineMap total;
  exclusive_suffix<kThreads>(all, total);
  return total;
}

__global__ void __launch_bounds__(kThreads) gae_kernel(GaeArgs a) {
  __shared__ float staged[2 * GaeBlock::kStaged];
  const int64_t tile_id = a.tiles - 1 - take_ticket(a.p.workspace.counters);
  const SequenceTile tile = SequenceTiles{a.p.cu_seqlens, a.p.sequences, a.p.tokens}[tile_id];
  if (tile.size() == 0) return;
  GaeBlock block(a, tile, staged);
  if (!tile.in_sequence) {
    block.store_zeros();
    return;
  }
  block.load();
  AffineMap total;
  const AffineMap behind = exclusive_suffix<kThreads>(block.map(), total);
  if (tile.index > 0) {
    if (threadIdx.x == 0) a.maps()[tile_id] = total;
    signal_done(a.done(tile_id), 1);
  }
  block.store(tile.index + 1 < tile.num_tiles ? behind.compose(later_tiles(a, tile)) : behind);
}

}  // namespace

void gae(const GaeParams& p, Stream stream) {
  const int64_t tiles = sequence_tile_count(p.batch, p.tokens, p.cu_seqlens, p.sequences);
  const GaeArgs args{p, float(p.gamma), float(p.gamma * p.lam), tiles};
  launch("gae_kernel", gae_kernel, {tiles, kThreads}, stream, args);
}

}  // namespace gk
