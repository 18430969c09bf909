// float64 logits: the same sweeps in plain C++, for gradient checks and references rather than for speed.
#include "sweep.h"

namespace gk {
namespace {

template <bool kSoftcap> double capped_tanh(double logit, const Transform& f) {
  return kSoftcap ? std::tanh(logit * f.inner) : 0;
}
template <bool kSoftcap> double z_of(double logit, const Transform& f) {
  return kSoftcap ? f.cap * capped_tanh<kSoftcap>(logit, f) : logit;
}

double exp2_times(double y, double factor) { return y == -INFINITY ? 0 : std::exp2(y) * factor; }

template <bool kSoftcap, bool kSquares>
void stats(const void* logits, int64_t columns, const Transform& f, Softmax<double>* out) {
  const double* z = static_cast<const double*>(logits);
  Softmax<double> s;
  for (int64_t i = 0; i < columns; ++i) s.max = max_(s.max, z_of<kSoftcap>(z[i], f));
  const double origin = s.max == -INFINITY ? 0 : s.max;
  for (int64_t i = 0; i < columns; ++i) {
    const double y = (z_of<kSoftcap>(z[i], f) - origin) * f.unit, e = exp2_times(y, 1);
    s.sum += e;
    s.dot += exp2_times(y, y);
    if (kSquares) s.sum2 += e * e;
  }
  *out = s;
}

template <bool kSoftcap>
void gradient(const void* logits, void* out, int64_t columns, const Transform& f, double max, LogitGradient<double> g,
              bool) {
  const double* z = static_cast<const double*>(logits);
  double* dz = static_cast<double*>(out);
  for (int64_t i = 0; i < columns; ++i) {
    const double t = capped_tanh<kSoftcap>(z[i], f), y = ((kSoftcap ? t * f.cap : z[i]) - max) * f.unit;
    dz[i] = f.slope * exp2_times(y, g.a + g.b * y) * (kSoftcap ? 1 - t * t : 1);
  }
}

}  // namespace

Sweeps sweeps_double(bool softcap, bool squares) {
  if (softcap) return {squares ? stats<true, true> : stats<true, false>, gradient<true>};
  return {squares ? stats<false, true> : stats<false, false>, gradient<false>};
}

}  // namespace gk
