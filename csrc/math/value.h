// The value loss of one token, with its derivative; grpo_kernels/reference/advantages.py has the same function.
#pragma once
#include "numeric.h"

namespace gk {

template <typename T> struct ValueTerm {
  T value, d_value;
  bool clipped;  // the clipped prediction's error is the larger one, and passes no gradient
};

// max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2. Where both are equal the unclipped one counts. A NaN of the
// old value, which no comparison of the clip would see, is not hidden.
template <typename T> GK_HD ValueTerm<T> value_term(T value, T old, T target, T clip) {
  if (old != old) return {old, old, false};
  const T error = value - target, bounded = clamp_(value, old - clip, old + clip) - target;
  const bool clipped = bounded * bounded > error * error;
  return {(clipped ? bounded * bounded : error * error) / 2, clipped ? T(0) : error, clipped};
}

}  // namespace gk
