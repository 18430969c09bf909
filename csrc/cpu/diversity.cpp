// Near-duplicates inside a group: each sample against the kept ones before it, block after block. A block's samples are
// counted against everything before them in parallel; which of them are kept is decided in order.
#include <algorithm>
#include <vector>

#include "groups.h"
#include "ngram_sets.h"
#include "parallel.h"

namespace gk {
namespace {

constexpr int64_t kBlock = 256, kTile = 16;  // samples decided together, samples counted by one thread

struct Best {
  double similarity = -1;
  int64_t leader = -1;
  void offer(double s, int64_t j) {
    if (s > similarity) *this = {s, j};  // ties: the first
  }
};

class GroupFilter {
 public:
  GroupFilter(const DiversityParams& p, const int64_t* samples, int64_t count, int threads)
      : p(p),
        samples(samples),
        count(count),
        threads(threads),
        sets(p, samples, count, threads),
        leader(count),
        shared(std::min(kBlock, count) * count) {}

  void run() {
    for (int64_t block = 0; block < count; block += kBlock) {
      const int64_t end = std::min(block + kBlock, count);
      std::vector<Best> best(end - block);
      parallel_for((end - block + kTile - 1) / kTile, threads, [&](int64_t tile) {
        const int64_t first = block + tile * kTile, last = std::min(first + kTile, end);
        sets.count_shared(first, last, kept, block, &shared[(first - block) * count], count);
        for (int64_t i = first; i < last; ++i)
          for (int64_t j : kept) best[i - block].offer(similarity(i, j, block), j);
      });
      const auto before = int64_t(kept.size());
      for (int64_t i = block; i < end; ++i) decide(i, block, before, best[i - block]);
    }
    std::vector<int64_t> cluster(count);
    for (int64_t l : leader) ++cluster[l];
    for (int64_t i = 0; i < count; ++i) p.weights[samples[i]] = float(1 / double(cluster[leader[i]]));
  }

 private:
  double similarity(int64_t i, int64_t j, int64_t block) const {
    const int64_t both = shared[(i - block) * count + j], either = sets.size(i) + sets.size(j) - both;
    return either ? double(both) / double(either) : 1;  // two empty sets are equal
  }
  // `best` covers the kept samples before the block, kept[0, before).
  void decide(int64_t i, int64_t block, int64_t before, Best best) {
    for (size_t k = before; k < kept.size(); ++k) best.offer(similarity(i, kept[k], block), kept[k]);
    const bool keep = best.leader < 0 || best.similarity < p.threshold;
    leader[i] = keep ? i : best.leader;
    if (keep) kept.push_back(i);
    p.keep[samples[i]] = keep;
    p.similarity[samples[i]] = best.leader < 0 ? 0 : float(best.similarity);
  }

  const DiversityParams& p;
  const int64_t *samples, count;
  const int threads;
  const NgramSets sets;
  std::vector<int64_t> kept, leader;  // leader: the kept sample of i's cluster
  Buffer<uint32_t> shared;            // [block, count]: n-grams of i that j has too
};

struct Group {
  int64_t begin, end;  // of `order`
  double work;
};

}  // namespace

// Groups that are a large part of the work run one after another, each on all threads; the others run in parallel.
void group_diversity(const DiversityParams& p, Stream) {
  const Groups grouping(p.group_ids, p.samples, p.group_size);
  std::vector<int64_t> order(p.samples);
  for (int64_t i = 0; i < p.samples; ++i) order[i] = grouping.sample(i);
  std::vector<Group> groups;
  double total = 0;
  for (int64_t g = 0; g < grouping.count(); ++g) {
    const int64_t begin = grouping.begin(g), end = grouping.end(g);
    double tokens = 1;
    for (int64_t i = begin; i < end; ++i) tokens += length_of(p, order[i]);
    groups.push_back({begin, end, tokens * double(end - begin)});
    total += groups.back().work;
  }
  const auto large = [&](const Group& g) { return g.work * p.threads * 2 > total; };
  const auto run = [&](const Group& g, int threads) {
    GroupFilter(p, order.data() + g.begin, g.end - g.begin, threads).run();
  };
  for (const Group& g : groups)
    if (large(g)) run(g, p.threads);
  parallel_for(int64_t(groups.size()), p.threads, [&](int64_t g) {
    if (!large(groups[g])) run(groups[g], 1);
  });
}

}  // namespace gk
