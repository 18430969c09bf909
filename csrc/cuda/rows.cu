// The row kernel's launches.
#include <limits>
#include <stdexcept>

#include "row_kernel.cuh"

namespace gk {
namespace {

RowArgs row_args(const Rows& p, const RowStats& stats) {
  if (p.vocab > std::numeric_limits<int>::max()) throw std::invalid_argument("a vocabulary of more than 2^31 - 1");
  RowArgs args{};
  args.logits = p.logits, args.targets = p.targets, args.active = p.active, args.temperature = p.temperature;
  args.rows = p.batch * p.tokens, args.tokens = p.tokens, args.vocab = int(p.vocab);
  args.inv_temperature = float(p.inv_temperature), args.logit_scale = float(p.logit_scale);
  args.softcap = float(p.softcap);
  args.logps = static_cast<float*>(stats.logps), args.entropy = static_cast<float*>(stats.entropy);
  args.max = static_cast<float*>(stats.max), args.log_sum = static_cast<float*>(stats.log_sum);
  args.sum_p2 = static_cast<float*>(stats.sum_p2);
  return args;
}

// How far logits and gradient begin behind a boundary: the kernel is told, as it then computes with offsets alone.
template <typename T> void align(RowArgs& args) {
  args.logits_past = past_boundary<T>(args.logits.data);
  args.gradient_past = past_boundary<T>(args.gradient.data);
}

void launch_rows(RowArgs args, DType dtype, Stream stream, const char* name) {
  if (args.rows == 0) return;
  dtype == DType::f32 ? align<float>(args) : align<bf16>(args);
  const Machine m = machine(name, row_kernel<float, false, false>);
  const bool two_pass = args.statistics && args.gradient.data;
  const RowPlan plan = row_plan(m, int64_t(args.vocab) * (dtype == DType::f32 ? 4 : 2), two_pass);
  args.slots = plan.slots, args.resident = plan.resident, args.bulk_copies = m.bulk_copies;
  const Grid grid{0, plan.threads + kWarp, plan.shared_bytes(), plan.cluster};
  if (plan.cluster > 1)
    launch_clusters(args, dtype, grid, stream, name);
  else
    launch_kernel<false>(args, dtype, grid, stream, name);
}

}  // namespace

void row_forward(const Rows& p, const RowStats& stats, Stream stream) {
  RowArgs args = row_args(p, stats);
  args.statistics = true;
  launch_rows(args, p.dtype, stream, "row_forward");
}

void row_backward(const Rows& p, const RowStats& saved, const void* g_logps, const void* g_entropy,
                  const View& gradient, Stream stream) {
  RowArgs args = row_args(p, saved);
  args.gradient = gradient;
  args.g_logps = static_cast<const float*>(g_logps), args.g_entropy = static_cast<const float*>(g_entropy);
  launch_rows(args, p.dtype, stream, "row_backward");
}

void row_policy(const Rows& p, const RowStats& stats, const PolicyInputs& in, const View& gradient, Stream stream) {
  RowArgs args = row_args(p, stats);
  args.statistics = args.policy = true;
  args.gradient = gradient;
  args.in = in, args.scalars = float_scalars(in.scalars), args.advantage_eps = float(in.advantage_eps);
  launch_rows(args, p.dtype, stream, "row_policy");
}

}  // namespace gk
