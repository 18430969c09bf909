// Whitening: the moments of the active values in one sweep, and x -> (x - shift) * factor + offset in another.
#include <cmath>

#include "flat_tiles.h"

namespace gk {
namespace {

constexpr int kLanes = 8;  // independent sums, for speed; added in a fixed order

template <typename Fn> double summed(const double* x, int64_t n, const Fn& fn) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) sums[k] += fn(x[i + k]);
  for (int k = 0; i < n; ++i, ++k) sums[k] += fn(x[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

struct MaskedMoments {
  double count = 0, mean = 0, squares = 0, low = INFINITY, high = -INFINITY;

  void merge(const MaskedMoments& o) {
    if (o.count == 0) return;
    const double gap = o.mean - mean, share = o.count / (count + o.count);
    squares += o.squares + gap * gap * count * share;
    mean += gap * share, count += o.count;
    low = std::fmin(low, o.low), high = std::fmax(high, o.high);
  }
};

MaskedMoments moments_of(const double* x, int64_t n) {
  MaskedMoments m;
  if (n == 0) return m;
  m.count = double(n);
  for (int64_t i = 0; i < n; ++i) m.low = x[i] < m.low ? x[i] : m.low, m.high = x[i] > m.high ? x[i] : m.high;
  m.mean = summed(x, n, [](double v) { return v; }) / m.count;
  if (m.low <= m.high) m.mean = clamp_(m.mean, m.low, m.high);  // exactly that value if all are equal
  m.squares = summed(x, n, [&](double v) { return (v - m.mean) * (v - m.mean); });
  return m;
}

template <typename T> int64_t compact(const WhitenParams& p, int64_t first, int64_t count, double* out) {
  const auto values = lane<T>(p.values, first, p.tokens);
  const auto active = lane<uint8_t>(p.active, first, p.tokens);
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) out[n] = values(i), n += active(i) != 0;
  return n;
}

template <typename T> void apply(const WhitenParams& p, int64_t first, int64_t count) {
  const auto values = lane<T>(p.values, first, p.tokens);
  const auto active = lane<uint8_t>(p.active, first, p.tokens);
  const double shift = p.coefficients[0], factor = p.coefficients[1], offset = p.coefficients[2];
  T* out = static_cast<T*>(p.whitened) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = active(i) ? T((values(i) - shift) * factor + offset) : T(0);
}

}  // namespace

void masked_moments(const WhitenParams& p, Stream) {
  const auto run = [&](int64_t tile, MaskedMoments& moments) {
    double values[kTokensPerFlatTile];
    int64_t n = 0;
    for_each_row_part(tile, p.batch, p.tokens, [&](int64_t first, int64_t count) {
      n += p.is_double ? compact<double>(p, first, count, values + n) : compact<float>(p, first, count, values + n);
    });
    moments = moments_of(values, n);
  };
  MaskedMoments all;
  for (const auto& m : for_each_tile<MaskedMoments>(p.batch * p.tokens, p.threads, run)) all.merge(m);
  const double out[] = {all.count, all.mean, all.squares, all.low, all.high};
  std::copy(std::begin(out), std::end(out), p.moments);
}

void whiten(const WhitenParams& p, Stream) {
  for_each_tile<char>(p.batch * p.tokens, p.threads, [&](int64_t tile, char&) {
    for_each_row_part(tile, p.batch, p.tokens, [&](int64_t first, int64_t count) {
      p.is_double ? apply<double>(p, first, count) : apply<float>(p, first, count);
    });
  });
}

}  // namespace gk
