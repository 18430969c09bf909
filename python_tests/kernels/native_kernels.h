// The CPU kernels without Python and torch, for threads_probe.cpp and sizes_probe.cpp: each on data of its own, and the
// bytes of all its outputs as the result.
#pragma once
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"

// Out of memory, in kernels: from allocation number `fails_from` on.
static std::atomic<int64_t> allocations{0}, fails_from{INT64_MAX}, kernels_running{0};
static thread_local bool spared = false;

void* operator new(size_t bytes) {
  const bool counts = kernels_running > 0 && !spared;
  void* memory = counts && allocations.fetch_add(1) >= fails_from ? nullptr : std::malloc(bytes ? bytes : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

using Bytes = std::vector<char>;
using Floats = std::vector<float>;

template <typename T> void append(Bytes& out, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const char*>(values.data());
  out.insert(out.end(), bytes, bytes + values.size() * sizeof(T));
}
Floats numbers(size_t count, unsigned seed) {
  Floats values(count);
  for (float& v : values) seed = seed * 1664525u + 1013904223u, v = float(int(seed >> 8) - (1 << 23)) / (1 << 21);
  return values;
}
std::vector<int64_t> integers(size_t count, int64_t below) {
  std::vector<int64_t> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = int64_t(i * 7919 % size_t(below));
  return values;
}

template <typename Call> void run(const Call& call) {
  struct Running {
    Running() { ++kernels_running; }
    ~Running() { --kernels_running; }
  } running;
  call();
}

gk::PolicyInputs policy_inputs(Floats& advantages, Floats& weights) {
  gk::PolicyInputs in{};
  in.advantages = {advantages.data(), 0, 1}, in.weights = {weights.data(), 0, 1};
  in.scalars.eps_low = in.scalars.eps_high = 0.2;
  return in;
}

Bytes rows(int64_t count, int64_t vocab, bool single_pass, int threads) {
  Floats logits = numbers(count * vocab, 1), stats(5 * count), gradient(count * vocab), g = numbers(count, 2),
         w(count, 1);
  std::vector<int64_t> targets = integers(count, vocab);
  const gk::Rows p{
      {logits.data(), 0, vocab}, {targets.data(), 0, 1}, {}, {}, gk::DType::f32, 1, count, vocab, 1, 1, 0, threads};
  float* s = stats.data();
  const gk::RowStats out{s, s + count, s + 2 * count, s + 3 * count, s + 4 * count};
  const gk::View into{gradient.data(), 0, vocab};
  run([&] {
    if (single_pass) return gk::row_policy(p, out, policy_inputs(g, w), into, nullptr);
    gk::row_forward(p, out, nullptr);
    gk::row_backward(p, out, g.data(), w.data(), into, nullptr);
  });
  Bytes bytes;
  append(bytes, stats), append(bytes, gradient);
  return bytes;
}

Bytes tokens(int64_t batch, int64_t length, int threads) {
  const int64_t n = batch * length;
  Floats a = numbers(n, 3), w(n, 1), logps = numbers(n, 4), per_token(n), g_logps(n), loss(1),
         metrics(gk::kMetricCount);
  std::vector<uint8_t> active(n, 1);
  gk::PolicyInputs in = policy_inputs(a, w);
  in.advantages.stride_b = in.weights.stride_b = length;
  const gk::TokenParams p{in,
                          {logps.data(), length, 1},
                          {},
                          {active.data(), length, 1},
                          batch,
                          length,
                          nullptr,
                          batch,
                          false,
                          loss.data(),
                          per_token.data(),
                          g_logps.data(),
                          nullptr,
                          metrics.data(),
                          threads,
                          {}};
  run([&] { gk::token_policy(p, nullptr); });
  Bytes bytes;
  append(bytes, loss), append(bytes, per_token), append(bytes, g_logps), append(bytes, metrics);
  return bytes;
}

Bytes advantages(int64_t samples, int64_t group_size, int threads) {
  Floats rewards = numbers(samples, 5), out(3 * samples);
  std::vector<uint8_t> informative(samples);
  const gk::AdvantageForm form{group_size, gk::Baseline::mean, gk::Scale::batch, 1, 1e-4, 0, -1e9, 1e9, false};
  float *a = out.data(), *mean = a + samples, *std = mean + samples;
  const gk::AdvantageParams p{
      rewards.data(),     nullptr, nullptr, nullptr, nullptr, nullptr, samples, 1, form, false, a, mean, std,
      informative.data(), threads, nullptr, nullptr, nullptr};
  run([&] { gk::group_advantages(p, nullptr); });
  Bytes bytes;
  append(bytes, out), append(bytes, informative);
  return bytes;
}

Bytes diversity(int64_t samples, int64_t length, int64_t group_size, int threads) {
  std::vector<int64_t> ids = integers(samples * length, 61);
  std::vector<uint8_t> keep(samples), active(samples * length, 2);  // any byte but 0 is true
  Floats similarity(samples), weights(samples);
  const gk::DiversityParams p{{ids.data(), length, 1},
                              {active.data(), length, 1},
                              nullptr,
                              nullptr,
                              false,
                              samples,
                              length,
                              group_size,
                              3,
                              0.9,
                              keep.data(),
                              similarity.data(),
                              weights.data(),
                              threads,
                              nullptr,
                              nullptr,
                              nullptr,
                              nullptr,
                              {}};
  run([&] { gk::group_diversity(p, nullptr); });
  Bytes bytes;
  append(bytes, keep), append(bytes, similarity), append(bytes, weights);
  return bytes;
}

Bytes critic(int64_t batch, int64_t length, int threads) {  // GAE, the value loss and whitening
  const int64_t n = batch * length;
  Floats r = numbers(n, 6), v = numbers(n, 7), a(n), returns(n), per_token(n), g_values(n), white(n), loss(1),
         metrics(4);
  std::vector<uint8_t> active(n, 1);
  std::vector<double> moments(5), shift{0.1, 2, 0.5};
  const gk::View rv{r.data(), length, 1}, vv{v.data(), length, 1}, mask{active.data(), length, 1};
  const gk::GaeParams gae{rv,  vv,  mask,  batch,    length,         nullptr, batch,
                          0.9, 0.8, false, a.data(), returns.data(), threads, {}};
  const gk::ValueParams value{vv,
                              {},
                              rv,
                              rv,
                              mask,
                              batch,
                              length,
                              0.2,
                              false,
                              loss.data(),
                              per_token.data(),
                              g_values.data(),
                              metrics.data(),
                              threads,
                              {}};
  const gk::WhitenParams whiten{vv,           mask,         batch,   length, false, moments.data(),
                                shift.data(), white.data(), threads, {}};
  run([&] { gk::gae(gae, nullptr), gk::value_loss(value, nullptr); });
  run([&] { gk::masked_moments(whiten, nullptr), gk::whiten(whiten, nullptr); });
  Bytes bytes;
  for (const Floats* x : {&a, &returns, &per_token, &g_values, &white, &loss, &metrics}) append(bytes, *x);
  append(bytes, moments);
  return bytes;
}

}  // namespace
