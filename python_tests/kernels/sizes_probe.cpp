// Shapes, strides and numbers of threads at the limits, for AddressSanitizer and UBSan; test_threads.py compiles this
// with csrc/cpu/*.cpp. Ends with "well", or with the first check that does not hold.
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "native_kernels.h"

namespace {

float* reserved(int64_t floats) {  // zeros, of which only those that are touched take memory
  void* memory =
      mmap(nullptr, size_t(floats) * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(memory != MAP_FAILED, "this machine does not reserve so many addresses");
  return static_cast<float*>(memory);
}

// Log-probs and gradients of rows that lie wherever their strides say, next to those of the same rows, dense.
void strides(int64_t stride_b, int64_t stride_t, int threads) {
  constexpr int64_t kBatch = 3, kTokens = 2, kVocab = 11003, kRows = kBatch * kTokens;
  const int64_t ends[] = {0, 2 * stride_b, stride_t, 2 * stride_b + stride_t};
  const int64_t low = *std::min_element(ends, ends + 4), span = *std::max_element(ends, ends + 4) - low + kVocab;
  Floats dense = numbers(kRows * kVocab, 8), dense_gradient(kRows * kVocab), stats(10 * kRows), g = numbers(kRows, 9);
  std::vector<int64_t> targets = integers(kRows, kVocab);
  float *logits = reserved(span), *gradient = reserved(span);
  const auto compute = [&](const gk::View& z, const gk::View& dz, float* s) {
    const gk::Rows p{
        z,      {targets.data() + kRows - 1, -kTokens, -1}, {}, {}, gk::DType::f32, kBatch, kTokens, kVocab, 1, 1, 0,
        threads};
    const gk::RowStats out{s, s + kRows, s + 2 * kRows, s + 3 * kRows, s + 4 * kRows};
    gk::row_forward(p, out, nullptr);
    gk::row_backward(p, out, g.data(), nullptr, dz, nullptr);
  };
  const gk::View view{nullptr, stride_b, stride_t};
  for (int64_t r = 0; r < kRows; ++r) std::copy_n(&dense[r * kVocab], kVocab, logits - low + view.offset(r, kTokens));
  compute({dense.data(), kTokens * kVocab, kVocab}, {dense_gradient.data(), kTokens * kVocab, kVocab}, stats.data());
  compute({logits - low, stride_b, stride_t}, {gradient - low, stride_b, stride_t}, &stats[5 * kRows]);
  check(!std::memcmp(&stats[0], &stats[5 * kRows], 5 * kRows * 4), "other statistics with other strides");
  for (int64_t r = 0; r < kRows; ++r)
    check(!std::memcmp(&dense_gradient[r * kVocab], gradient - low + view.offset(r, kTokens), kVocab * 4),
          "another gradient with other strides");
  munmap(logits, size_t(span) * 4), munmap(gradient, size_t(span) * 4);
}

void more_than_2_31_logits(int threads) {  // of which the last two rows are active
  constexpr int64_t kRows = 65537, kVocab = 32768;
  float* logits = reserved(kRows * kVocab);
  const Floats row = numbers(kVocab, 10);
  for (int64_t r : {kRows - 2, kRows - 1}) std::copy_n(row.data(), kVocab, logits + r * kVocab);
  Floats stats(4 * kRows, -1);
  std::vector<uint8_t> active(kRows);
  active[kRows - 2] = active[kRows - 1] = 255;
  int64_t target = 5;
  float* s = stats.data();
  const gk::Rows p{{logits, 0, kVocab},
                   {&target, INT64_MAX, 0},
                   {active.data(), INT64_MIN, 1},
                   {},
                   gk::DType::f32,
                   1,
                   kRows,
                   kVocab,
                   1,
                   1,
                   0,
                   threads};
  gk::row_forward(p, {s, s + kRows, s + 2 * kRows, s + 3 * kRows, nullptr}, nullptr);
  check(s[0] == 0 && s[kRows - 3] == 0 && s[kRows - 1] < 0 && s[kRows - 1] == s[kRows - 2], "2^31 logits");
  munmap(logits, size_t(kRows * kVocab) * 4);
}

template <typename Call> void refused(const char* name, const Call& call) {
  bool thrown = false;
  try {
    call();
  } catch (const std::bad_alloc&) {
    thrown = true;
  } catch (const std::length_error&) {
    thrown = true;
  }
  check(thrown, std::string(name) + ": not refused");
}

// So large that the first allocation fails: nothing of the data, which is not there, is touched.
void beyond_memory(int threads) {
  for (int64_t count : {1, 16}) {
    const gk::Rows p{{nullptr, 0, 0}, {nullptr, 0, 0}, {}, {}, gk::DType::f32, 1, count, int64_t(1) << 60, 1, 1, 0,
                     threads};
    refused("rows", [&] { gk::row_forward(p, {}, nullptr); });
    refused("rows, single pass", [&] { gk::row_policy(p, {}, {}, {}, nullptr); });
  }
  constexpr int64_t kMany = int64_t(1) << 60;
  refused("diversity", [&] {
    gk::group_diversity({{},
                         {},
                         nullptr,
                         nullptr,
                         false,
                         kMany,
                         1,
                         kMany / 2,
                         3,
                         0.9,
                         nullptr,
                         nullptr,
                         nullptr,
                         threads,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr,
                         {}},
                        nullptr);
  });
  const int64_t id = 0;
  refused("advantages", [&] {
    gk::group_advantages({nullptr,
                          nullptr,
                          nullptr,
                          &id,
                          nullptr,
                          nullptr,
                          kMany,
                          1,
                          {},
                          false,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          threads,
                          nullptr,
                          nullptr,
                          nullptr},
                         nullptr);
  });
  refused("whitening",
          [&] { gk::whiten({{}, {}, 1, kMany * 7, false, nullptr, nullptr, nullptr, threads, {}}, nullptr); });
}

}  // namespace

int main() {
  for (int threads : {INT32_MIN, 0, 1, 3}) {
    for (int64_t count : {0, 1, 5}) {
      rows(count, 1, true, threads), rows(count, 1, false, threads), rows(count, 3, true, threads);
      for (int64_t length : {0, 1, 3}) tokens(count, length, threads), critic(count, length, threads);
      advantages(count, 1, threads), diversity(count, 1, 1, threads), diversity(count, 3, INT64_MAX / 2, threads);
    }
    Floats one(10);
    std::memcpy(one.data(), rows(1, 1, true, threads).data(), 6 * 4);
    check(one[0] == 0 && one[1] == 0 && one[5] == 0, "a vocabulary of one token");
    const int64_t far = (int64_t(1) << 31) + 5;
    for (const auto& [b, t] :
         {std::pair{far, int64_t(11003)}, {-far, far / 2}, {int64_t(11003), -far}, {-22006, -11003}})
      strides(b, t, threads);
    more_than_2_31_logits(threads);
    beyond_memory(threads);
  }
  std::puts("well");
}
