// The token kernel: ratio, objective, KL, weights, reduction and every metric, with the derivative, from log-probs.
//
// One launch. A block takes a tile of a sequence and stores its partial sums; the last block to finish adds them up, in
// the order of the tiles. The sums over a sequence that pooled ratios need stay in the block if one tile holds the
// whole sequence. A longer sequence goes through three phases, each with one block per tile: pooling, the tokens, and
// the pooled derivative back to them. A phase waits for the sequence's tiles of the previous phase, which have earlier
// tickets.
#include "grid_sync.cuh"
#include "group.cuh"
#include "launch.h"
#include "policy_inputs.cuh"
#include "sequence_tiles.cuh"

namespace gk {
namespace {

constexpr int kThreads = 256;

using Sums = TokenSums<float>;
static_assert(sizeof(Sums) == kTokenSums * sizeof(float));

struct TokenCounts {  // of a sequence; integers, because blocks add them up in any order
  int32_t tokens, low, high;
};

struct ClipShares {  // the extremes over the sequences
  float low_min = INFINITY, high_max = -INFINITY;
  __device__ ClipShares merge(const ClipShares& o) const {
    return {min_(low_min, o.low_min), max_(high_max, o.high_max)};
  }
  __device__ static ClipShares of(const TokenCounts& c) {
    if (c.tokens == 0) return {};
    return {float(c.low) / float(c.tokens), float(c.high) / float(c.tokens)};
  }
};

struct PoolSums {
  float ratio = 0, counted = 0, tokens = 0, adv = 0, log_weight = 0;
  __device__ PoolSums merge(const PoolSums& o) const {
    return {ratio + o.ratio, counted + o.counted, tokens + o.tokens, adv + o.adv, log_weight + o.log_weight};
  }
};
static_assert(sizeof(PoolSums) == kPoolSums * sizeof(float));

struct PooledGrad {  // d loss / d the pooled log-ratio of a sequence
  float value = 0;
  __device__ PooledGrad merge(const PooledGrad& o) const { return {value + o.value}; }
};

struct TokenArgs {
  TokenParams p;
  Scalars<float> s;
  float advantage_eps;
  int64_t tiles;
  int phases;  // 3 where a sequence may have several tiles and pools its ratios

  __device__ Sums* sums() const { return static_cast<Sums*>(p.workspace.partials); }
  __device__ PoolSums* pools() const { return reinterpret_cast<PoolSums*>(sums() + tiles); }
  __device__ PooledGrad* pooled_grads() const { return reinterpret_cast<PooledGrad*>(pools() + tiles); }
  __device__ int32_t* ticket() const { return p.workspace.counters; }
  __device__ int32_t* finished() const { return p.workspace.counters + 1; }
  __device__ int32_t* done(int phase, int64_t sequence) const {
    return p.workspace.counters + 2 + phase * p.sequences + sequence;
  }
  __device__ TokenCounts* counts() const {
    return reinterpret_cast<TokenCounts*>(p.workspace.counters + 2 + 2 * p.sequences);
  }
};

class TokenBlock {
 public:
  __device__ TokenBlock(const TokenArgs& a, const SequenceTile& tile)
      : a(a), p(a.p), s(with_coefficients(a.s, p.in)), form(p.in.form), tile(tile), adv(sequence_advantage()) {}

  __device__ PoolSums pool() const {
    PoolSums sums;
    for_each_active([&](int64_t t) {
      const float logp = read(p.logps, tile.row, t, 0);
      const TokenInputs<float> in = inputs(t, logp);
      const float count = pooled_count(form, in.token_weight);
      sums = sums.merge(
          {weighted_(count, term(in, logp).value), count, 1, in.adv, log_(in.pooled_weight + float(kGmpoWeightFloor))});
    });
    return block_merge(sums);
  }

  __device__ Sequence<float> sequence_of(const PoolSums& sums) const {
    const float share = form.pooling() == Pooling::sum ? 1 : 1 / max_(sums.counted, 1.0f), n = max_(sums.tokens, 1.0f);
    const float raw = sums.ratio * share, log_ratio = pooled_limit(form, raw, s);
    return {{log_ratio, sums.adv / n, p.in.pooled_weights.data ? exp_(sums.log_weight / n) : 1},
            share,
            clamp_passes_grad(raw, log_ratio)};
  }

  // Stores the tokens' results and the tile's sums; returns the derivative in the sequence's pooled log-ratio.
  __device__ PooledGrad tokens(const Sequence<float>& sequence) const {
    Sums sums;
    PooledGrad d_pooled;
    for (int64_t t = tile.begin + threadIdx.x; t < tile.end; t += blockDim.x)
      if (active(t))
        d_pooled.value += token(t, sequence, sums);
      else
        store(t, 0, 0, 0);
    sums = block_merge(sums);
    if (threadIdx.x == 0) store_partials(sums);
    return block_merge(d_pooled);
  }

  // Adds the pooled derivative to what `tokens` stored, in the same threads or, in a later phase, in another block.
  __device__ void scatter_pooled_grad(const Sequence<float>& sequence, const PooledGrad& d_pooled) const {
    if (!sequence.passes_grad || d_pooled.value == 0) return;  // a NaN is something
    for_each_active([&](int64_t t) {
      const float logp = read(p.logps, tile.row, t, 0);
      const TokenInputs<float> in = inputs(t, logp);
      if (!term(in, logp).passes_grad) return;
      float* g = static_cast<float*>(p.g_logps) + tile.row * p.tokens + t;
      *g = load_from_other_block(g) + weighted_(pooled_count(form, in.token_weight) * sequence.share, d_pooled.value);
    });
  }

 private:
  const TokenArgs& a;
  const TokenParams& p;
  const Scalars<float> s;
  const Form form;
  const SequenceTile tile;
  const float adv;  // of the sequence, where rewards are given

  __device__ float sequence_advantage() const {
    if (form.advantages == Advantages::given || tile.size() == 0) return 0;
    return sample_advantage(BlockTeam{}, p.in.advantages, form.advantages, tile.row, p.in.group_size, a.advantage_eps);
  }
  __device__ bool active(int64_t t) const { return tile.in_sequence && is_active(p.active, tile.row, t); }
  template <typename Fn> __device__ void for_each_active(const Fn& fn) const {
    for (int64_t t = tile.begin + threadIdx.x; t < tile.end; t += blockDim.x)
      if (active(t)) fn(t);
  }
  __device__ TokenInputs<float> inputs(int64_t t, float logp) const {
    TokenInputs<float> in = read_token(p.in, tile.row, t, logp);
    if (form.advantages != Advantages::given) in.adv = adv;
    return in;
  }
  __device__ PooledTerm<float> term(const TokenInputs<float>& in, float logp) const {
    return pooled_term(form, logp - in.old, in.adv, in.pooled_weight, s);
  }
  __device__ void store(int64_t t, float value, float d_logp, float d_entropy) const {
    const int64_t at = tile.row * p.tokens + t;
    static_cast<float*>(p.per_token)[at] = value;
    static_cast<float*>(p.g_logps)[at] = d_logp;
    if (p.g_entropy) static_cast<float*>(p.g_entropy)[at] = d_entropy;
  }

  __device__ float token(int64_t t, const Sequence<float>& sequence, Sums& sums) const {
    const float logp = read(p.logps, tile.row, t, 0), entropy = read(p.entropy, tile.row, t, 0);
    const TokenResult<float> r = token_result(form, inputs(t, logp), logp, entropy, sequence, s);
    store(t, r.value, r.d_logp, r.d_entropy);
    sums = sums.merge(r.sums);
    return r.d_pooled;
  }

  __device__ void store_partials(const Sums& sums) const {
    a.sums()[tile.first_tile + tile.index] = sums;
    if (!tile.in_sequence) return;
    TokenCounts& counts = a.counts()[tile.sequence];
    atomicAdd(&counts.tokens, int32_t(sums.tokens));
    atomicAdd(&counts.low, int32_t(sums.low));
    atomicAdd(&counts.high, int32_t(sums.high));
  }
};

// The last block to store its sums computes the loss and the metrics.
__device__ void finish(const TokenArgs& a) {
  if (!signal_done(a.finished(), a.tiles)) return;
  const Sums sums = sum_partials(a.sums(), a.tiles);
  ClipShares shares;
  for (int64_t i = threadIdx.x; i < a.p.sequences; i += blockDim.x)
    shares = shares.merge(ClipShares::of(load_from_other_block(a.counts() + i)));
  shares = block_merge(shares);
  if (threadIdx.x > 0) return;
  *static_cast<float*>(a.p.loss) = loss_of(sums);
  metrics_of(sums, shares.low_min, shares.high_max, static_cast<float*>(a.p.metrics));
}

__global__ void __launch_bounds__(kThreads) token_kernel(TokenArgs a) {
  const int64_t ticket = a.phases > 1 ? take_ticket(a.ticket()) : blockIdx.x, tile_id = ticket % a.tiles;
  const int phase = int(ticket / a.tiles);
  const SequenceTile tile = SequenceTiles{a.p.cu_seqlens, a.p.sequences, a.p.tokens}[tile_id];
  const bool pooled = a.p.in.form.pooling() != Pooling::none,
             alone = tile.num_tiles <= 1 || !pooled || !tile.in_sequence;
  if (phase > 0 && (alone || tile.size() == 0)) return;
  const TokenBlock block(a, tile);
  if (alone || tile.size() == 0) {
    const Sequence<float> sequence = pooled ? block.sequence_of(block.pool()) : Sequence<float>{};
    block.scatter_pooled_grad(sequence, block.tokens(sequence));
    finish(a);
  } else if (phase == 0) {
    const PoolSums sums = block.pool();
    if (threadIdx.x == 0) a.pools()[tile_id] = sums;
    signal_done(a.done(0, tile.sequence), tile.num_tiles);
  } else {
    block_spin_until(a.done(phase - 1, tile.sequence), tile.num_tiles, "token_kernel");
    const Sequence<float> sequence = block.sequence_of(sum_partials(a.pools() + tile.first_tile, tile.num_tiles));
    if (phase == 2) {
      block.scatter_pooled_grad(sequence, sum_partials(a.pooled_grads() + tile.first_tile, tile.num_tiles));
      return;
    }
    const PooledGrad d_pooled = block.tokens(sequence);
    if (threadIdx.x == 0) a.pooled_grads()[tile_id] = d_pooled;
    signal_done(a.done(1, tile.sequence), tile.num_tiles);
    finish(a);
  }
}

}  // namespace

void token_policy(const TokenParams& p, Stream stream) {
  const int64_t tiles = sequence_tile_count(p.batch, p.tokens, p.cu_seqlens, p.sequences);
  const bool many = p.cu_seqlens || p.tokens > kTokensPerTile, pooled = p.in.form.pooling() != Pooling::none;
  TokenArgs args{p, float_scalars(p.in.scalars), float(p.in.advantage_eps), tiles, many && pooled ? 3 : 1};
  launch("token_kernel", token_kernel, {tiles * args.phases, kThreads}, stream, args);
}

}  // namespace gk
