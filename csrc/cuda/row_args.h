// What the row kernel is given, and how a row is cut up for it.
#pragma once
#include "../math/softmax.h"
#include "launch.h"
#include "policy_inputs.cuh"

namespace gk {

constexpr int kVectorsPerThread = 2;  // of a chunk
constexpr int kMaxThreads = 512;      // that compute; a warp more brings the row
constexpr int kMaxCluster = 8;
constexpr int kMaxSlots = 32;        // one bit each in Ring::phases
constexpr int kControlBytes = 2048;  // of shared memory, behind the slots: their barriers and Control

// Where a row lies on chip. Chunks of it go through `ring` slots; where a row that is needed twice does not fit, its
// first `resident` chunks have slots of their own and stay, and what the ring has lost is read again, the last part
// first, as that is what L2 still has. All of it follows from the vocabulary, so that a row's sums have one order in
// every launch.
struct RowPlan {
  int threads, cluster, slots;
  int resident;  // of the slots; the others are the ring
  int chunk_bytes() const { return threads * kVectorsPerThread * 16; }
  int64_t shared_bytes() const { return int64_t(slots) * chunk_bytes() + kControlBytes; }
};

inline RowPlan row_plan(const Machine& m, int64_t row_bytes, bool twice) {
  const int64_t whole = m.shared_bytes - kControlBytes, half = m.shared_bytes / 2 - kControlBytes;
  RowPlan plan{};
  const bool small = row_bytes <= half;  // two blocks per multiprocessor
  plan.threads = small ? m.threads / 2 : m.threads;
  plan.cluster = 1;
  const int64_t space = small ? half : whole;
  // Up to 1.75 times the shared memory a tail from L2 is cheaper than half of the row's sums in another block.
  if (m.bulk_copies && row_bytes > whole * 7 / 4)
    while (plan.cluster < kMaxCluster && row_bytes > plan.cluster * whole) plan.cluster *= 2;
  plan.slots = int(min_<int64_t>(space / plan.chunk_bytes(), kMaxSlots));
  const int64_t chunks = row_bytes / plan.chunk_bytes() / plan.cluster + 1;
  if (twice && chunks > plan.slots) plan.resident = plan.slots - max_(plan.slots / 4, 2);
  return plan;
}

struct RowArgs {
  View logits, targets, active, temperature, gradient;  // as in Rows
  int64_t rows, tokens;
  int vocab, slots, resident;
  int logits_past, gradient_past;        // elements that they begin behind a boundary of 16 bytes
  bool bulk_copies, statistics, policy;  // statistics: they are computed, else read; gradient.data: whether to write it
  float inv_temperature, logit_scale, softcap;
  float *logps, *entropy, *max, *log_sum, *sum_p2;
  const float *g_logps, *g_entropy;  // the epilogue "given"
  PolicyInputs in;                   // the epilogue "policy"
  Scalars<float> scalars;
  float advantage_eps;
};

template <typename T, bool kSoftcap, bool kCluster> __global__ void row_kernel(const __grid_constant__ RowArgs args);

void launch_clusters(const RowArgs&, DType, const Grid&, Stream, const char* name);  // rows_cluster.cu

}  // namespace gk
