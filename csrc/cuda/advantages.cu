// Group-normalised advantages in every form, with a warp per group, or a block per group if it is large: one launch, or
// two if the deviation is the batch's. The formulas are in csrc/math/advantage.h.
#include "group.cuh"
#include "launch.h"

namespace gk {
namespace {

constexpr int kThreads = 128, kBatchThreads = 1024;
constexpr int64_t kLargeGroup = 256;

struct AdvantageArgs {
  AdvantageParams p;
  __device__ RewardSource source() const {
    return {static_cast<const float*>(p.rewards), p.components, p.components, p.reward_weights, p.valid, p.order};
  }
};

struct Longest {
  float value = 0;
  __device__ Longest merge(const Longest& o) const { return {fmaxf(value, o.value)}; }
};
struct Any {
  int value = 0;
  __device__ Any merge(const Any& o) const { return {value | o.value}; }
};
struct LengthSums {
  int64_t total = 0, weighted = 0;
  __device__ LengthSums merge(const LengthSums& o) const { return {total + o.total, weighted + o.weighted}; }
};

template <typename Team> class GroupKernel {
 public:
  __device__ GroupKernel(const AdvantageArgs& a, int64_t begin, int64_t end)
      : p(a.p),
        form(a.p.form),
        source(a.source()),
        begin(begin),
        end(end),
        group(statistics(team, source, begin, end, form.ddof)) {}

  __device__ void run() const {
    const bool weighted = form.baseline == Baseline::length_weighted, batch = form.scale == Scale::batch;
    const GroupStatistics<float> statistics = group.of_group(weighted ? length_shift() : 0);
    const bool informs = (group.count >= 2 && !group.constant) || (p.critic_values && critics_disagree());
    const float deviation = batch ? *static_cast<const float*>(p.batch_std) : group.std;
    for_each([&](int64_t i, float r) {
      const bool others = form.scale == Scale::leave_one_out && r == r;
      const float std = others ? deviation_of_others(i) : deviation;
      const float a = r == r ? advantage(form, r, critic(i), std, statistics) : 0;
      const int64_t k = source.sample(i);
      static_cast<float*>(p.advantages)[k] = clamp_(a, float(form.clip_low), float(form.clip_high));
      static_cast<float*>(p.mean)[k] = group.mean();
      static_cast<float*>(p.std)[k] = std;
      p.informative[k] = informs;
    });
  }

 private:
  const Team team{};
  const AdvantageParams& p;
  const AdvantageForm& form;
  const RewardSource source;
  const int64_t begin, end;
  const RewardStatistics group;

  template <typename Fn> __device__ void for_each(const Fn& fn) const {
    for (int64_t i = begin + team.rank(); i < end; i += team.size()) fn(i, source.reward(i));
  }
  __device__ float critic(int64_t i) const { return p.critic_values ? float(p.critic_values[source.sample(i)]) : NAN; }

  __device__ bool critics_disagree() const {
    Any any;
    for_each([&](int64_t i, float r) { any.value |= r == r && critic(i) == critic(i) && r != critic(i); });
    return team.merge(any).value != 0;
  }

  // sum(l R) / sum(l), minus the mean; 0 if no sample has a length.
  __device__ float length_shift() const {
    Longest longest;
    for_each([&](int64_t i, float r) {
      if (r == r) longest = longest.merge({length(i)});
    });
    longest = team.merge(longest);
    const float unit = longest.value > 0 ? longest.value : 1, scale = fixed_scale(group.count);
    LengthSums sums;
    for_each([&](int64_t i, float r) {
      if (r != r) return;
      const float share = length(i) / unit;
      sums.total += fixed(share, scale);
      sums.weighted += fixed(share * ((r - group.low - group.above) / group.span), scale);
    });
    sums = team.merge(sums);
    return sums.total > 0 ? float(sums.weighted) / float(sums.total) * group.span : 0;
  }
  __device__ float length(int64_t i) const { return float(p.lengths[source.sample(i)]); }

  // The standard deviation of the group without the i-th sample, relative to the range of the others: equal ones give
  // exactly 0, and an outlier costs them no precision.
  __device__ float deviation_of_others(int64_t i) const {
    RewardRange range;
    for_each_other(i, [&](float r) { range = range.with(r); });
    const float origin = range.origin(), span = range.span(), scale = fixed_scale(range.count);
    int64_t sum = 0, squares = 0;
    for_each_other(i, [&](float r) { sum += fixed((r - origin) / span, scale); });
    const float n = float(range.count), centre = float(sum) / scale / max_(n, 1.0f);
    for_each_other(i, [&](float r) {
      const float d = (r - origin) / span - centre;
      squares += fixed(d * d, scale);
    });
    if (range.low == range.high || range.count <= form.ddof) return 0;
    return range.finite() ? sqrtf(float(squares) / scale / (n - float(form.ddof))) * span : NAN;
  }
  template <typename Fn> __device__ void for_each_other(int64_t i, const Fn& fn) const {
    for (int64_t j = begin; j < end; ++j)
      if (j != i) fn(source.reward(j));
  }
};

// One team per group of group_size samples. With ids, one team per sorted sample, of which only the first of each group
// works.
template <typename Team> __global__ void __launch_bounds__(kThreads, 4) advantage_kernel(AdvantageArgs a) {
  const int teams = kThreads / Team{}.size();
  const int64_t team = int64_t(blockIdx.x) * teams + threadIdx.x / Team{}.size();
  int64_t begin = team, end = team;
  if (a.p.ends) {
    if (team >= a.p.samples || (team > 0 && a.p.ends[team - 1] != team)) return;
    end = a.p.ends[team];
  } else {
    begin = team * a.p.form.group_size, end = begin + a.p.form.group_size;
    if (begin >= a.p.samples) return;
  }
  GroupKernel<Team>(a, begin, end).run();
}

__global__ void __launch_bounds__(kBatchThreads, 1) batch_kernel(AdvantageArgs a) {
  RewardSource source = a.source();
  source.order = nullptr;
  const RewardStatistics all = statistics(BlockTeam{}, source, 0, a.p.samples, a.p.form.ddof);
  if (threadIdx.x == 0) *static_cast<float*>(a.p.batch_std) = all.std;
}

}  // namespace

void group_advantages(const AdvantageParams& p, Stream stream) {
  if (p.samples == 0) return;
  const AdvantageArgs args{p};
  if (p.form.scale == Scale::batch) launch("batch_kernel", batch_kernel, {1, kBatchThreads}, stream, args);
  const int64_t teams = p.ends ? p.samples : p.samples / p.form.group_size;
  const bool large = p.ends || p.form.group_size > kLargeGroup;  // ragged groups may be of any size
  const int64_t blocks = large ? teams : (teams + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (large)
    launch("advantage_kernel", advantage_kernel<BlockTeam>, {blocks, kThreads}, stream, args);
  else
    launch("advantage_kernel", advantage_kernel<WarpTeam>, {blocks, kThreads}, stream, args);
}

}  // namespace gk
