// Whitening: the moments of the active values in one launch, and x -> (x - shift) * factor + offset in another.
#include "flat_tiles.cuh"
#include "grid_sync.cuh"
#include "launch.h"
#include "policy_inputs.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256, kTokensPerThread = int(kTokensPerTile) / kThreads;

// The mean is mean + rest: on a large offset with a small spread, the rounding error of `mean` alone would be large
// compared with the spread.
struct MaskedMoments {
  float count = 0, mean = 0, rest = 0, squares = 0, low = INFINITY, high = -INFINITY;  // squares: about the mean

  __device__ MaskedMoments merge(const MaskedMoments& o) const {
    if (o.count == 0) return *this;
    if (count == 0) return o;
    const float gap = (o.mean - mean) + (o.rest - rest), all = count + o.count, share = o.count / all;
    const float step = gap * share, moved = mean + step, taken = moved - mean;
    const float lost = (mean - (moved - taken)) + (step - taken);
    return {all,
            moved,
            rest + lost,
            squares + o.squares + gap * gap * count * share,
            fminf(low, o.low),
            fmaxf(high, o.high)};
  }
};
static_assert(sizeof(MaskedMoments) == kMomentSums * sizeof(float));

struct ActiveSums {  // of a tile
  float sum = 0, low = INFINITY, high = -INFINITY;
  int count = 0;
  __device__ ActiveSums merge(const ActiveSums& o) const {
    return {sum + o.sum, fminf(low, o.low), fmaxf(high, o.high), count + o.count};
  }
  // Exactly that value if all are equal.
  __device__ float mean() const { return low <= high ? clamp_(sum / float(count), low, high) : sum / float(count); }
};

struct Deviations {  // from the mean
  float sum = 0, squares = 0;
  __device__ Deviations merge(const Deviations& o) const { return {sum + o.sum, squares + o.squares}; }
};

struct WhitenArgs {
  WhitenParams p;
  int64_t tiles;
};

// The moments of the block's tile; the values stay in registers for the second pass.
__device__ MaskedMoments moments_of_tile(const WhitenParams& p) {
  const int64_t begin = blockIdx.x * kTokensPerTile + threadIdx.x, end = p.batch * p.tokens;
  float x[kTokensPerThread];
  unsigned active_bits = 0;
  ActiveSums sums;
#pragma unroll
  for (int k = 0; k < kTokensPerThread; ++k) {
    const int64_t i = begin + k * kThreads;
    const Place at = i < end ? place_of(i, p.tokens) : Place{0, 0};
    x[k] = 0;
    if (i >= end || !is_active(p.active, at.row, at.t)) continue;
    x[k] = read(p.values, at.row, at.t, 0), active_bits |= 1u << k;
    sums = sums.merge({x[k], x[k], x[k], 1});
  }
  sums = block_merge(sums);
  if (sums.count == 0) return {};
  const float mean = sums.mean();
  Deviations d;
#pragma unroll
  for (int k = 0; k < kTokensPerThread; ++k)
    if (active_bits >> k & 1) d = d.merge({x[k] - mean, (x[k] - mean) * (x[k] - mean)});
  d = block_merge(d);
  const float n = float(sums.count), rest = d.sum / n;
  return {n, mean, rest, d.squares - rest * d.sum, sums.low, sums.high};
}

__global__ void __launch_bounds__(kThreads) moments_kernel(WhitenArgs a) {
  MaskedMoments moments = moments_of_tile(a.p), *partials = static_cast<MaskedMoments*>(a.p.workspace.partials);
  if (threadIdx.x == 0) partials[blockIdx.x] = moments;
  if (!signal_done(a.p.workspace.counters, a.tiles)) return;
  moments = sum_partials(partials, a.tiles);
  if (threadIdx.x > 0) return;
  double* out = a.p.moments;
  out[0] = moments.count, out[1] = double(moments.mean) + moments.rest, out[2] = moments.squares;
  out[3] = moments.low, out[4] = moments.high;
}

__global__ void __launch_bounds__(kThreads) whiten_kernel(WhitenArgs a) {
  const WhitenParams& p = a.p;
  const double* c = p.coefficients;
  const float shift = float(c[0]), rest = float(c[0] - shift), factor = float(c[1]), offset = float(c[2]);
  for_each_in_tile(p.batch, p.tokens, [&](int64_t i, Place at) {
    const bool active = is_active(p.active, at.row, at.t);
    static_cast<float*>(p.whitened)[i] =
        active ? ((read(p.values, at.row, at.t, 0) - shift) - rest) * factor + offset : 0;
  });
}

}  // namespace

void masked_moments(const WhitenParams& p, Stream stream) {
  const WhitenArgs args{p, flat_tile_count(p.batch, p.tokens)};
  launch("moments_kernel", moments_kernel, {args.tiles, kThreads}, stream, args);
}

void whiten(const WhitenParams& p, Stream stream) {
  const WhitenArgs args{p, flat_tile_count(p.batch, p.tokens)};
  launch("whiten_kernel", whiten_kernel, {args.tiles, kThreads}, stream, args);
}

}  // namespace gk
