// The row kernel's arguments, and how a row is divided into tiles.
#pragma once
#include "../math/softmax.h"
#include "launch.h"
#include "policy_inputs.cuh"

namespace gk {

constexpr int kVectorsPerThread = 2;  // of each tile
constexpr int kMaxThreads = 512;      // that compute; one more warp loads the row
constexpr int kMaxCluster = 8;
constexpr int kMaxSlots = 32;        // one bit each in Ring::phases
constexpr int kControlBytes = 2048;  // of shared memory after the slots: their barriers and Control

// How a row is held on chip. Its tiles stream through the slots of a ring. Where two passes need a row that does not
// fit, its first `resident` tiles keep slots of their own, and the tiles that the ring has evicted are read again, the
// last ones first, because L2 still has them. The plan depends only on the vocabulary and the GPU, so a row's sums have
// the same order in every launch.
struct RowPlan {
  int threads, cluster, slots;
  int resident;  // slots of resident tiles; the others form the ring
  int tile_bytes() const { return threads * kVectorsPerThread * 16; }
  int64_t shared_bytes() const { return int64_t(slots) * tile_bytes() + kControlBytes; }
};

inline RowPlan row_plan(const Machine& m, int64_t row_bytes, bool two_pass) {
  const int64_t full_smem = m.shared_bytes - kControlBytes, half_smem = m.shared_bytes / 2 - kControlBytes;
  RowPlan plan{};
  const bool small = row_bytes <= half_smem;  // two blocks per multiprocessor
  plan.threads = small ? m.threads / 2 : m.threads;
  plan.cluster = 1;
  const int64_t space = small ? half_smem : full_smem;
  // Up to 1.75 times the shared memory, rereading the rest from L2 is cheaper than splitting the row's sums.
  if (m.bulk_copies && row_bytes > full_smem * 7 / 4)
    while (plan.cluster < kMaxCluster && row_bytes > plan.cluster * full_smem) plan.cluster *= 2;
  plan.slots = int(min_<int64_t>(space / plan.tile_bytes(), kMaxSlots));
  const int64_t num_tiles = row_bytes / plan.tile_bytes() / plan.cluster + 1;
  if (two_pass && num_tiles > plan.slots) plan.resident = plan.slots - max_(plan.slots / 4, 2);
  return plan;
}

struct RowArgs {
  View logits, targets, active, temperature, gradient;  // as in Rows
  int64_t rows, tokens;
  int vocab, slots, resident;
  int logits_past, gradient_past;        // their offsets from a 16-byte boundary, in elements
  bool bulk_copies, statistics, policy;  // statistics: computed, else read from an earlier launch
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
