// Group-normalised advantages. A group's rewards are summed in sorted order, so the result does not depend on the order
// of the samples, not even in the last bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../kernels.h"

namespace gk {
namespace {

struct Moments {
  double mean = 0, std = 0;
  int64_t count = 0;
  bool constant = true;
};

Moments moments_of(std::vector<double> values, int ddof) {  // centred in a second pass: no cancellation
  std::sort(values.begin(), values.end());
  Moments m;
  m.count = int64_t(values.size());
  if (values.empty()) return m;
  m.constant = values.front() == values.back();
  for (double v : values) m.mean += v;
  m.mean = m.constant ? values.front() : m.mean / double(m.count);
  double squares = 0;
  for (double v : values) squares += (v - m.mean) * (v - m.mean);
  m.std = m.count > ddof ? std::sqrt(squares / double(m.count - ddof)) : 0;
  return m;
}

class Groups {  // sample indices, group after group
 public:
  explicit Groups(const AdvantageParams& p) : p(p), order(p.samples) {
    for (int64_t i = 0; i < p.samples; ++i) order[i] = i;
    if (p.group_ids)
      std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.group_ids[a] < p.group_ids[b]; });
  }
  template <typename Fn> void for_each(const Fn& fn) const {
    for (int64_t begin = 0, end; begin < p.samples; begin = end) {
      for (end = begin + 1; end < p.samples && same(begin, end);) ++end;
      fn(order.data() + begin, end - begin);
    }
  }

 private:
  const AdvantageParams& p;
  std::vector<int64_t> order;
  bool same(int64_t a, int64_t b) const {
    return p.group_ids ? p.group_ids[order[a]] == p.group_ids[order[b]] : a / p.group_size == b / p.group_size;
  }
};

bool counts(const AdvantageParams& p, int64_t i) { return (!p.valid || p.valid[i]) && !std::isnan(p.rewards[i]); }

double advantage(const AdvantageParams& p, double reward, const Moments& group, double batch_std) {
  if (group.count == 1) return p.single_raw ? reward : 0;
  if (group.constant && p.baseline != Baseline::none) return 0;
  const double others = double(group.count - 1);
  const double centred = p.baseline == Baseline::none            ? reward
                         : p.baseline == Baseline::leave_one_out ? (reward - group.mean) * double(group.count) / others
                                                                 : reward - group.mean;
  switch (p.scale) {
    case Scale::group:
      return centred / (group.std + p.eps);
    case Scale::batch:
      return centred / (batch_std + p.eps);
    default:
      return centred;
  }
}

}  // namespace

void group_advantages(const AdvantageParams& p, Stream) {
  const Groups groups(p);
  const auto valid_rewards = [&](const int64_t* samples, int64_t n) {
    std::vector<double> rewards;
    for (int64_t i = 0; i < n; ++i)
      if (counts(p, samples[i])) rewards.push_back(p.rewards[samples[i]]);
    return rewards;
  };
  std::vector<double> all;
  for (int64_t i = 0; p.scale == Scale::batch && i < p.samples; ++i)
    if (counts(p, i)) all.push_back(p.rewards[i]);
  const double batch_std = moments_of(std::move(all), p.ddof).std;
  groups.for_each([&](const int64_t* samples, int64_t n) {
    const Moments group = moments_of(valid_rewards(samples, n), p.ddof);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = samples[i];
      const double a = counts(p, k) ? advantage(p, p.rewards[k], group, batch_std) : 0;
      p.advantages[k] = std::min(std::max(a, -p.clip), p.clip);
      p.mean[k] = group.mean, p.std[k] = p.scale == Scale::batch ? batch_std : group.std;
      p.informative[k] = group.count >= 2 && !group.constant;
    }
  });
}

}  // namespace gk
