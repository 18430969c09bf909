// Group-normalised advantages in every form, threads over the groups. The formulas are in csrc/math/advantage.h.
#include "groups.h"
#include "parallel.h"
#include "policy_inputs.h"

namespace gk {
namespace {

constexpr int64_t kSamplesPerTask = 2048, kMinSamplesPerThread = 32768;  // half a millisecond of work

class AdvantageKernel {
 public:
  AdvantageKernel(const AdvantageParams& p, const Groups& groups) : p(p), form(p.form), groups(groups) {}

  void collect(int64_t g) {  // the valid rewards of a group
    rewards.clear();
    for (int64_t i = groups.begin(g); i < groups.end(g); ++i) {
      const double r = reward(groups.sample(i));
      if (!std::isnan(r)) rewards.push_back(r);
    }
    std::sort(rewards.begin(), rewards.end());
    group = moments_of_sorted(rewards);
  }
  const Moments& moments() const { return group; }

  void run(int64_t g, double batch_std) {
    collect(g);
    const double shift = form.baseline == Baseline::length_weighted ? length_weighted_shift(g) : 0;
    const GroupStatistics<double> statistics{group.count, group.mean, shift, group.constant()};
    if (form.scale == Scale::leave_one_out) deviations_of_others(rewards, form.ddof, others);
    bool informative = group.count >= 2 && !group.constant();
    for (int64_t i = groups.begin(g); i < groups.end(g); ++i) {
      const int64_t k = groups.sample(i);
      const double r = reward(k), critic = p.critic_values ? p.critic_values[k] : NAN;
      const double std = deviation(r, batch_std);
      const double a = std::isnan(r) ? 0 : advantage(form, r, critic, std, statistics);
      informative = informative || (!std::isnan(r) && !std::isnan(critic) && r != critic);
      store_acc(p.advantages, k, p.is_double, std::min(std::max(a, form.clip_low), form.clip_high));
      store_acc(p.mean, k, p.is_double, group.mean);
      store_acc(p.std, k, p.is_double, std);
    }
    for (int64_t i = groups.begin(g); i < groups.end(g); ++i) p.informative[groups.sample(i)] = informative;
  }

 private:
  const AdvantageParams& p;
  const AdvantageForm& form;
  const Groups& groups;
  std::vector<double> rewards, others;              // others: for each reward, the deviation of all the others
  std::vector<std::pair<double, double>> weighted;  // rewards with their lengths
  Moments group;

  // The weighted sum of a sample's components that are not NaN; NaN if there are none, or the sample is not valid.
  double reward(int64_t k) const {
    if (p.valid && !p.valid[k]) return NAN;
    double sum = 0;
    bool any = false;
    for (int64_t c = 0; c < p.components; ++c) {
      const double r = load_acc(p.rewards, k * p.components + c, p.is_double);
      if (std::isnan(r)) continue;
      sum += p.reward_weights ? weighted_(p.reward_weights[c], r) : r, any = true;
    }
    return any ? sum : NAN;
  }

  // sum(l R) / sum(l), minus the mean; sorted, so that the order of the samples does not matter.
  double length_weighted_shift(int64_t g) {
    weighted.clear();
    for (int64_t i = groups.begin(g); i < groups.end(g); ++i) {
      const double r = reward(groups.sample(i));
      if (!std::isnan(r)) weighted.push_back({r, p.lengths[groups.sample(i)]});
    }
    std::sort(weighted.begin(), weighted.end());
    double sum = 0, length = 0;
    for (const auto& [r, l] : weighted) sum += l * (r - group.mean), length += l;
    return length > 0 ? sum / length : 0;
  }

  double deviation(double reward, double batch_std) const {
    if (form.scale == Scale::batch) return batch_std;
    if (form.scale == Scale::leave_one_out && !std::isnan(reward))
      return others[std::lower_bound(rewards.begin(), rewards.end(), reward) - rewards.begin()];
    return group.std(form.ddof);
  }
};

}  // namespace

void group_advantages(const AdvantageParams& p, Stream) {
  const Groups groups(p.group_ids, p.samples, p.form.group_size);
  const int64_t count = groups.count();
  const int64_t tasks = std::min(count, p.samples / kSamplesPerTask + 1);
  const int threads = int(std::min<int64_t>(p.threads, 1 + p.samples / kMinSamplesPerThread));
  const auto for_each = [&](const auto& fn) {  // a run of groups at a time, which share a kernel's buffers
    parallel_for(tasks, threads, [&](int64_t task) {
      AdvantageKernel kernel(p, groups);
      for (int64_t g = count * task / tasks; g < count * (task + 1) / tasks; ++g) fn(kernel, g);
    });
  };
  double batch_std = 0;
  if (p.form.scale == Scale::batch) {
    std::vector<Moments> moments(count);
    for_each([&](AdvantageKernel& kernel, int64_t g) { kernel.collect(g), moments[g] = kernel.moments(); });
    batch_std = merged(std::move(moments)).std(p.form.ddof);
  }
  for_each([&](AdvantageKernel& kernel, int64_t g) { kernel.run(g, batch_std); });
}

}  // namespace gk
