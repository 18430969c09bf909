// pybind11: fills the structs of kernels.h from raw addresses, strides and scalars. Computes nothing and does not know
// torch; Python has made every check (grpo_kernels/ops/loss.py). The GIL is released while a kernel runs. _cpu, _cuda
// and the tests' _emulated are built from this file; the last argument of every kernel is the CUDA stream's handle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "kernels.h"
#ifdef GK_CPU
#include "cpu/memory.h"
#include "cpu/sweep.h"
#else
#include "cuda/probe.h"
#endif
#ifdef GK_EMULATED
#include "emulation/cuda_on_cpu.h"
// After cuda_on_cpu.h, which it needs.
#include "cuda/row_args.h"
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;                                             // 0: not given
using ViewArg = std::optional<std::tuple<Address, int64_t, int64_t>>;  // address, strides over batch and tokens
using WorkspaceArg = std::array<Address, 2>;                           // counters, partial results
using Release = py::call_guard<py::gil_scoped_release>;

template <typename T = void> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

gk::View view(const ViewArg& v) {
  if (!v) return {};
  return {pointer(std::get<0>(*v)), std::get<1>(*v), std::get<2>(*v)};
}

gk::Rows rows(const ViewArg& logits, const ViewArg& targets, const ViewArg& active, const ViewArg& temperatures,
              int dtype, std::array<int64_t, 3> shape, double temperature, double logit_scale, double softcap,
              int threads) {
  return {view(logits), view(targets), view(active),    view(temperatures), gk::DType(dtype), shape[0],
          shape[1],     shape[2],      1 / temperature, logit_scale,        softcap,          threads};
}
gk::RowStats stats(const std::array<Address, 5>& a) {
  return {pointer(a[0]), pointer(a[1]), pointer(a[2]), pointer(a[3]), pointer(a[4])};
}

gk::Workspace workspace_of(const WorkspaceArg& a) { return {pointer<int32_t>(a[0]), pointer(a[1])}; }

constexpr int kPolicyViews = 10;
using PolicyViews = std::array<ViewArg, kPolicyViews>;
using FormCodes = std::array<int, 5>;
using Group = std::tuple<int64_t, double>;    // size and eps
using Coefficients = std::array<Address, 2>;  // of the KL and of the entropy
using ScalarValues = std::array<double, gk::kScalars>;

gk::PolicyInputs policy(const PolicyViews& v, const Group& group, const Coefficients& coefficients,
                        const FormCodes& form, const ScalarValues& values) {
  static_assert(sizeof(gk::Scalars<double>) == sizeof(ScalarValues));
  gk::Scalars<double> scalars;
  std::memcpy(&scalars, values.data(), sizeof scalars);
  return {view(v[0]),
          view(v[1]),
          view(v[2]),
          view(v[3]),
          view(v[4]),
          view(v[5]),
          view(v[6]),
          view(v[7]),
          view(v[8]),
          view(v[9]),
          std::get<0>(group),
          std::get<1>(group),
          pointer(coefficients[0]),
          pointer(coefficients[1]),
          {gk::Objective(form[0]), gk::RatioLevel(form[1]), gk::KlEstimator(form[2]), gk::KlGradient(form[3]),
           gk::Advantages(form[4])},
          scalars};
}

}  // namespace

PYBIND11_MODULE(GK_MODULE, m) {
  py::class_<gk::Rows>(m, "Rows", py::module_local()).def(py::init(&rows));

  m.def(
      "row_forward",
      [](const gk::Rows& p, const std::array<Address, 5>& out, Address stream) {
        gk::row_forward(p, stats(out), pointer(stream));
      },
      Release());
  m.def(
      "row_backward",
      [](const gk::Rows& p, const std::array<Address, 5>& saved, Address g_logps, Address g_entropy,
         const ViewArg& gradient, Address stream) {
        gk::row_backward(p, stats(saved), pointer(g_logps), pointer(g_entropy), view(gradient), pointer(stream));
      },
      Release());
  m.def(
      "row_policy",
      [](const gk::Rows& p, const std::array<Address, 5>& out, const PolicyViews& inputs, const Group& group,
         const Coefficients& coefficients, const FormCodes& form, const ScalarValues& scalars, const ViewArg& gradient,
         Address stream) {
        gk::row_policy(p, stats(out), policy(inputs, group, coefficients, form, scalars), view(gradient),
                       pointer(stream));
      },
      Release());
#ifndef GK_CPU
  m.def("unusable", &gk::unusable, Release());
  m.def(
      "scale",
      [](const ViewArg& matrix, int dtype, std::array<int64_t, 3> shape, Address factor, Address stream) {
        gk::scale({view(matrix), gk::DType(dtype), shape[0], shape[1], shape[2], pointer(factor)}, pointer(stream));
      },
      Release());
#endif
  m.def(
      "token_policy",
      [](const PolicyViews& inputs, const Group& group, const Coefficients& coefficients, const FormCodes& form,
         const ScalarValues& scalars, const ViewArg& logps, const ViewArg& entropy, const ViewArg& active,
         std::array<int64_t, 2> shape, Address cu_seqlens, int64_t sequences, bool is_double,
         const std::array<Address, 5>& out, int threads, const WorkspaceArg& workspace, Address stream) {
        gk::token_policy(
            {policy(inputs, group, coefficients, form, scalars), view(logps), view(entropy), view(active), shape[0],
             shape[1], pointer<int64_t>(cu_seqlens), sequences, is_double, pointer(out[0]), pointer(out[1]),
             pointer(out[2]), pointer(out[3]), pointer(out[4]), threads, workspace_of(workspace)},
            pointer(stream));
      },
      Release());
  m.def(
      "group_advantages",
      [](std::array<Address, 9> in, std::array<int64_t, 2> shape, int64_t group_size, int baseline, int scale, int ddof,
         std::array<double, 4> scalars, bool single_raw, bool is_double, std::array<Address, 4> out, int threads,
         Address stream) {
        const gk::AdvantageForm form{
            group_size, gk::Baseline(baseline), gk::Scale(scale), ddof, scalars[0], scalars[1], scalars[2], scalars[3],
            single_raw};
        gk::group_advantages({pointer(in[0]), pointer<double>(in[1]), pointer<uint8_t>(in[2]), pointer<int64_t>(in[3]),
                              pointer<double>(in[4]), pointer<double>(in[5]), shape[0], shape[1], form, is_double,
                              pointer(out[0]), pointer(out[1]), pointer(out[2]), pointer<uint8_t>(out[3]), threads,
                              pointer<int64_t>(in[6]), pointer<int64_t>(in[7]), pointer(in[8])},
                             pointer(stream));
      },
      Release());
  m.def(
      "group_diversity",
      [](const ViewArg& token_ids, const ViewArg& active, std::array<Address, 6> in, bool narrow,
         std::array<int64_t, 4> sizes, double threshold, std::array<Address, 3> out, int threads,
         const WorkspaceArg& workspace, Address stream) {
        gk::group_diversity({view(token_ids), view(active), pointer<int64_t>(in[0]), pointer<int64_t>(in[1]), narrow,
                             sizes[0], sizes[1], sizes[2], sizes[3], threshold, pointer<uint8_t>(out[0]),
                             pointer<float>(out[1]), pointer<float>(out[2]), threads, pointer<int64_t>(in[2]),
                             pointer<int64_t>(in[3]), pointer(in[4]), pointer(in[5]), workspace_of(workspace)},
                            pointer(stream));
      },
      Release());
  m.def(
      "gae",
      [](const std::array<ViewArg, 3>& in, std::array<int64_t, 2> shape, Address cu_seqlens, int64_t sequences,
         double gamma, double lam, bool is_double, std::array<Address, 2> out, int threads,
         const WorkspaceArg& workspace, Address stream) {
        gk::gae({view(in[0]), view(in[1]), view(in[2]), shape[0], shape[1], pointer<int64_t>(cu_seqlens), sequences,
                 gamma, lam, is_double, pointer(out[0]), pointer(out[1]), threads, workspace_of(workspace)},
                pointer(stream));
      },
      Release());
  m.def(
      "value_loss",
      [](const std::array<ViewArg, 5>& in, std::array<int64_t, 2> shape, double clip, bool is_double,
         std::array<Address, 4> out, int threads, const WorkspaceArg& workspace, Address stream) {
        gk::value_loss(
            {view(in[0]), view(in[1]), view(in[2]), view(in[3]), view(in[4]), shape[0], shape[1], clip, is_double,
             pointer(out[0]), pointer(out[1]), pointer(out[2]), pointer(out[3]), threads, workspace_of(workspace)},
            pointer(stream));
      },
      Release());

  const auto whitening = [](auto kernel) {
    return [kernel](const std::array<ViewArg, 2>& in, std::array<int64_t, 2> shape, bool is_double,
                    std::array<Address, 3> data, int threads, const WorkspaceArg& workspace, Address stream) {
      kernel({view(in[0]), view(in[1]), shape[0], shape[1], is_double, pointer<double>(data[0]),
              pointer<double>(data[1]), pointer(data[2]), threads, workspace_of(workspace)},
             pointer(stream));
    };
  };
  m.def("masked_moments", whitening(gk::masked_moments), Release());
  m.def("whiten", whitening(gk::whiten), Release());

  m.attr("TOKENS_PER_TILE") = gk::kTokensPerTile;
  m.attr("TOKEN_SUMS") = gk::kTokenSums + gk::kPoolSums + gk::kPooledGradSums;
  m.attr("GAE_SUMS") = gk::kGaeSums;
  m.attr("VALUE_SUMS") = gk::kValueSums;
  m.attr("MOMENT_SUMS") = gk::kMomentSums;
  m.attr("TOKENS_IN_TABLE") = gk::kTokensInTable;

#ifdef GK_CPU
  m.def("prefer_huge_pages", [](Address data, int64_t bytes) { gk::prefer_huge_pages(pointer(data), bytes); });
  m.def("isa_supported", [](int isa) { return gk::isa_supported(gk::Isa(isa)); });
  m.def("isa_in_use", [] { return int(gk::isa_in_use()); });
  m.def("use_isa", [](int isa) { gk::use_isa(gk::Isa(isa)); });
#endif
#ifdef GK_EMULATED
  m.def("row_plan", [](int shared_bytes, int threads, bool bulk_copies, int64_t row_bytes, bool two_pass) {
    const gk::RowPlan plan = gk::row_plan({shared_bytes, threads, bulk_copies}, row_bytes, two_pass);
    return std::make_tuple(plan.threads, plan.cluster, plan.slots, plan.resident, plan.shared_bytes());
  });
  m.def("use_machine", [](int multiprocessors, int threads, int shared_bytes, bool bulk_copies, int schedule) {
    gk::emulation::machine() = {multiprocessors, threads, shared_bytes, bulk_copies, gk::emulation::Schedule(schedule)};
  });
#endif
}
