// Which samples form a group, and the moments of their rewards. Rewards are summed in sorted order, so nothing depends
// on the order of the samples, not even the last bit.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace gk {

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: about the mean, never E[x^2] - E[x]^2
  bool constant() const { return squares == 0; }
  double std(int ddof) const { return count > ddof ? std::sqrt(squares / (count - ddof)) : 0; }
};

// Equal values have exactly that mean, and squares of exactly 0.
inline Moments moments_of_sorted(const std::vector<double>& values) {
  Moments m;
  m.count = double(values.size());
  if (values.empty()) return m;
  if (values.front() == values.back()) {
    m.mean = values.front();
    return m;
  }
  m.mean = std::accumulate(values.begin(), values.end(), 0.0) / m.count;
  for (double v : values) m.squares += (v - m.mean) * (v - m.mean);
  return m;
}

// The moments of all samples together. The groups are sorted by their bytes, so that their order does not matter and a
// NaN does no harm.
inline Moments merged(std::vector<Moments> groups) {
  std::sort(groups.begin(), groups.end(),
            [](const Moments& a, const Moments& b) { return std::memcmp(&a, &b, sizeof(Moments)) < 0; });
  Moments all;
  const Moments* first = nullptr;
  bool equal = true;
  for (const Moments& g : groups) {
    if (g.count == 0) continue;
    if (!first) first = &g;
    equal = equal && g.constant() && g.mean == first->mean;
    all.count += g.count, all.mean += g.count * g.mean;
  }
  if (!first) return all;
  all.mean = equal ? first->mean : all.mean / all.count;
  for (const Moments& g : groups)
    if (g.count > 0) all.squares += g.squares + g.count * (g.mean - all.mean) * (g.mean - all.mean);
  return all;
}

// For each sorted value, the standard deviation of all the others: the moments of those before and those after it,
// merged. Nothing is subtracted from a sum, so equal others give exactly 0.
inline void deviations_of_others(const std::vector<double>& sorted, int ddof, std::vector<double>& deviations) {
  const auto add = [](Moments& m, double x) {  // Welford
    const double before = x - m.mean;
    m.mean += before / ++m.count;
    m.squares += before * (x - m.mean);
  };
  std::vector<Moments> before(sorted.size() + 1);
  for (size_t i = 0; i < sorted.size(); ++i) add(before[i + 1] = before[i], sorted[i]);
  deviations.resize(sorted.size());
  Moments after;
  for (size_t i = sorted.size(); i-- > 0;) {
    const Moments& a = before[i];
    const double gap = a.count && after.count ? after.mean - a.mean : 0, count = a.count + after.count;
    const double between = count ? gap * gap * a.count * after.count / count : 0;
    deviations[i] = Moments{count, 0, a.squares + after.squares + between}.std(ddof);
    add(after, sorted[i]);
  }
}

class Groups {
 public:
  Groups(const int64_t* ids, int64_t samples, int64_t group_size) {
    if (!ids) {
      for (int64_t i = 0; i <= samples; i += group_size) begins.push_back(i);
      return;
    }
    sort_by(ids, samples);
    for (int64_t i = 0; i < samples; ++i)
      if (i == 0 || ids[order[i]] != ids[order[i - 1]]) begins.push_back(i);
    begins.push_back(samples);
  }
  int64_t count() const { return int64_t(begins.size()) - 1; }
  int64_t begin(int64_t group) const { return begins[group]; }
  int64_t end(int64_t group) const { return begins[group + 1]; }
  int64_t sample(int64_t position) const { return order.empty() ? position : order[position]; }

 private:
  std::vector<int64_t> begins, order;  // order: empty for samples that already lie group after group

  // Counting sort for ids in a small range, such as row numbers; otherwise a comparison sort.
  void sort_by(const int64_t* ids, int64_t n) {
    if (n == 0) return;
    order.resize(n);
    const auto [low, high] = std::minmax_element(ids, ids + n);
    const uint64_t first = uint64_t(*low), range = uint64_t(*high) - first;
    if (range < 4 * uint64_t(n)) {
      std::vector<int64_t> next(range + 2);
      for (int64_t i = 0; i < n; ++i) ++next[uint64_t(ids[i]) - first + 1];
      std::partial_sum(next.begin(), next.end(), next.begin());
      for (int64_t i = 0; i < n; ++i) order[next[uint64_t(ids[i]) - first]++] = i;
      return;
    }
    std::vector<std::pair<int64_t, int64_t>> keys(n);
    for (int64_t i = 0; i < n; ++i) keys[i] = {ids[i], i};
    std::sort(keys.begin(), keys.end());
    for (int64_t i = 0; i < n; ++i) order[i] = keys[i].second;
  }
};

}  // namespace gk
