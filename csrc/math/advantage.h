// The advantage of one sample in its group; grpo_kernels/reference/advantages.py has the same functions.
#pragma once
#include "numeric.h"

namespace gk {

// The enumerators follow the tuples of names in grpo_kernels/inputs/grouping.py.
enum class Baseline : int { mean, leave_one_out, length_weighted, none };
enum class Scale : int { group, batch, leave_one_out, mean, none };

struct AdvantageForm {
  int64_t group_size;  // where there are no ids
  Baseline baseline;
  Scale scale;
  int ddof;
  double eps, critic_weight, clip_low, clip_high;  // infinities for no clip
  bool single_raw;                                 // a group of one valid sample keeps its reward instead of 0
};

template <typename T> struct GroupStatistics {  // of the valid rewards; shift: length-weighted mean minus plain mean
  T count, mean, shift;
  bool constant;
  T residual = 0;  // added to the mean: its rounding error
};

// A reward minus its group's baseline; exactly 0 if all rewards are equal.
template <typename T> GK_HD T centred(const AdvantageForm& form, T reward, const GroupStatistics<T>& group) {
  if (group.count == 1) return form.single_raw ? reward : T(0);
  if (form.baseline == Baseline::none) return reward;
  if (group.constant) return 0;
  const T d = reward - group.mean - group.residual;
  return form.baseline == Baseline::leave_one_out ? d * group.count / (group.count - 1) : d - group.shift;
}

// Blended with the critic's baseline if there is one (NaN: none), then scaled, except in a group of one. A scale of
// exactly 0 does not divide.
template <typename T>
GK_HD T advantage(const AdvantageForm& form, T reward, T critic, T std, const GroupStatistics<T>& group) {
  T a = centred(form, reward, group);
  const bool judged = critic == critic;
  if (judged) a = weighted_(1 - T(form.critic_weight), a) + T(form.critic_weight) * (reward - critic);
  if (form.scale == Scale::none || (group.count == 1 && !judged)) return a;
  if (form.scale == Scale::mean) {
    const T mean = group.mean + group.residual;
    return mean > 0 ? a / mean : T(0);
  }
  return std > 0 ? a / (std + T(form.eps)) : a;
}

// GAE's one-step error, r + gamma V_next - V.
template <typename T> GK_HD T temporal_difference(T reward, T value, T next_value, T gamma) {
  return reward + gamma * next_value - value;
}

}  // namespace gk
