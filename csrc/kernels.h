// The native interface: what a backend implements and csrc/bindings.cpp calls. No torch, no CUDA types.
//
// Every per-token array is a [batch, tokens] view with two strides, so broadcast advantages ([batch] with a token
// stride of 0), slices and packed sequences (batch = 1) reach the kernels without a copy. Row r of the logits is
// token (r / tokens, r % tokens). Outputs are dense [batch * tokens]. "acc", the accumulation dtype, is double where
// the logits (or, for the token kernel, the log-probs) are double, and float everywhere else.
#pragma once
#include <cstdint>

#include "math/advantage.h"
#include "math/tokens.h"

namespace gk {

using Stream = void*;

enum class DType : int { f32, f64, bf16, f16 };

struct View {  // [batch, tokens]; strides in elements; data == nullptr: not given
  void* data = nullptr;
  int64_t stride_b = 0, stride_t = 0;
  GK_HD int64_t offset(int64_t row, int64_t tokens) const { return row / tokens * stride_b + row % tokens * stride_t; }
};

// Through which the blocks of a GPU launch exchange partial results; the CPU needs none. Sizes: backends/workspace.py.
struct Workspace {
  int32_t* counters;  // zeros
  void* partials;
};
constexpr int64_t kTokensPerTile = 2048;                            // of one block
constexpr int kTokenSums = 23, kPoolSums = 5, kPooledGradSums = 1;  // floats per tile, in TokenParams::workspace
constexpr int kGaeSums = 5, kValueSums = 5, kMomentSums = 6;        // likewise
constexpr int64_t kTokensInTable = 4096;  // the longest sample that needs no DiversityParams::tables

// z = softcap(logit_scale * logit) / temperature, softcap(v) = c tanh(v / c); softcap == 0: none.
struct Rows {
  View logits;       // dtype, [batch, tokens, vocab], the vocabulary dense
  View targets;      // int64
  View active;       // bool; null: all
  View temperature;  // acc; null: inv_temperature below
  DType dtype;
  int64_t batch, tokens, vocab;
  double inv_temperature, logit_scale, softcap;
  int threads;
};

struct RowStats {  // acc [batch * tokens]; sum_p2 may be null
  void *logps, *entropy, *max, *log_sum, *sum_p2;
};

struct PolicyInputs {
  View advantages, weights;                  // acc; the loss is sum(weights * terms); or rewards, by form.advantages
  View old_logps, ref_logps, rollout_logps;  // acc; null: not given
  View token_weights;                        // acc; multiplies the policy term only (gmpo: weighs its means)
  View entropy_weights, entropy_mask;        // acc; null: weights, 1
  View selected;                             // acc; nonzero: selected by its covariance; null: none
  View pooled_weights;                       // acc; importance weights pooled into their sequence's; null: 1
  int64_t group_size;                        // batch rows per group, where advantages are computed from rewards
  double advantage_eps;
  const void *kl_coef, *entropy_coef;  // acc [1], read when the kernel runs; null: the value in scalars
  Form form;
  Scalars<double> scalars;
};

struct ScaleParams {  // matrix *= factor, acc [1]; untouched if the factor is 1
  View matrix;        // dtype, [batch, tokens, columns], the columns dense
  DType dtype;
  int64_t batch, tokens, columns;
  const void* factor;
};

struct TokenParams {
  PolicyInputs in;
  View logps, entropy, active;  // acc, acc (null: not given), bool
  int64_t batch, tokens;
  const int64_t* cu_seqlens;  // [sequences + 1] for batch == 1; null: one sequence per batch row
  int64_t sequences;
  bool is_double;
  void *loss, *per_token, *g_logps, *g_entropy, *metrics;  // acc [1], [rows], [rows], [rows] or null, [kMetricCount]
  int threads;
  Workspace workspace;
};

struct AdvantageParams {
  const void* rewards;           // acc [samples, components]; NaN: ignored
  const double* reward_weights;  // [components]; null: 1
  const uint8_t* valid;          // [samples] or null
  const int64_t* group_ids;      // [samples]; null: consecutive runs of group_size
  const double* lengths;         // [samples]; used by Baseline::length_weighted
  const double* critic_values;   // [samples] or null; NaN: none for this sample
  int64_t samples, components;
  AdvantageForm form;
  bool is_double;
  void *advantages, *mean, *std;  // acc [samples]
  uint8_t* informative;           // [samples]
  int threads;
  const int64_t *order, *ends;  // GPU only, instead of ids: samples by group; where each one's group ends there
  void* batch_std;              // acc [1], GPU only, for Scale::batch
};

struct GaeParams {
  View rewards, values, active;  // acc, acc (null: 0), bool (null: all)
  int64_t batch, tokens;
  const int64_t* cu_seqlens;  // as in TokenParams
  int64_t sequences;
  double gamma, lam;
  bool is_double;
  void *advantages, *returns;  // acc [batch * tokens]; returns may be null
  int threads;
  Workspace workspace;
};

enum ValueMetric : int { kValueTokens, kValueClipped, kValueMean, kReturnMean, kValueMetricCount };  // VALUE_METRICS

struct ValueParams {
  View values, old_values, returns, weights,
      active;  // acc (old_values null: no clip), bool; loss = sum(weights * terms)
  int64_t batch, tokens;
  double clip;
  bool is_double;
  void *loss, *per_token, *g_values, *metrics;  // acc [1], [rows], [rows], [kValueMetricCount]
  int threads;
  Workspace workspace;
};

struct WhitenParams {
  View values, active;  // acc, bool
  int64_t batch, tokens;
  bool is_double;
  double* moments;             // [5]: count, mean, squares about it, lowest, highest
  const double* coefficients;  // [3]: shift, factor, offset
  void* whitened;              // acc [batch * tokens]; 0 where not active
  int threads;
  Workspace workspace;
};

struct DiversityParams {
  View token_ids;             // int64, or int32 if narrow: [samples, tokens], or [1, all] with cu_seqlens
  View active;                // bool; null: all
  const int64_t* cu_seqlens;  // [samples + 1] or null
  const int64_t* group_ids;   // [samples] or null: consecutive runs of group_size
  bool narrow;
  int64_t samples, tokens, group_size, ngram;
  double threshold;
  uint8_t* keep;                // [samples]
  float *similarity, *weights;  // [samples]
  int threads;
  const int64_t *order, *first;  // GPU only, instead of ids: samples by group; where each one's group begins there
  void *hashes, *tables;  // GPU only: one 64-bit integer per token; two, zeros, or null where kTokensInTable suffice
  Workspace workspace;
};

void row_forward(const Rows&, const RowStats&, Stream);
// Writes d loss / d logits from d loss / d logps and d loss / d entropy (null: zero). In place if the views are equal.
void row_backward(const Rows&, const RowStats& saved, const void* g_logps, const void* g_entropy, const View& gradient,
                  Stream);
// One launch: log-probs, the policy loss's derivative in them, and the gradient of the logits.
void row_policy(const Rows&, const RowStats&, const PolicyInputs&, const View& gradient, Stream);
void scale(const ScaleParams&, Stream);  // GPU only: the host does not read the factor
void token_policy(const TokenParams&, Stream);
void group_advantages(const AdvantageParams&, Stream);
// Greedy near-duplicate removal by the Jaccard similarity of n-gram sets; n-grams are compared by a 64-bit hash.
void group_diversity(const DiversityParams&, Stream);
void gae(const GaeParams&, Stream);
void value_loss(const ValueParams&, Stream);
void masked_moments(const WhitenParams&, Stream);  // writes moments
void whiten(const WhitenParams&, Stream);          // writes whitened: (x - shift) * factor + offset

}  // namespace gk
