// The row kernel and the emulator in one file, for test_cuda_rows.py to break.
static int mutant;  // which of its changes is made

#include "cuda/rows.cu"
#include "cuda/rows_cluster.cu"
#include "emulation/emulator.cpp"

// Log-probs of column 3 of float rows and the gradient of half their sum, on a machine of one multiprocessor.
extern "C" int probe(float* logits, float* gradient, float* logps, int rows, int vocab, int schedule, int changed) try {
  mutant = changed;
  gk::emulation::machine() = {1, 64, 10 << 10, true, gk::emulation::Schedule(schedule)};
  std::vector<int64_t> targets(rows, 3);
  std::vector<float> others(4 * rows), weights(rows, 0.5f), zeros(rows, 0.0f);
  const gk::Rows p{{logits, 0, vocab}, {targets.data(), 0, 1}, {}, {}, gk::DType::f32, 1, rows, vocab, 1, 1, 0, 1};
  const gk::RowStats stats{logps, &others[0], &others[rows], &others[2 * rows], nullptr};
  gk::PolicyInputs in{};
  in.advantages = {weights.data(), 0, 1}, in.weights = {weights.data(), 0, 1};
  in.form.objective = gk::Objective::reinforce;
  gk::row_policy(p, stats, in, {gradient, 0, vocab}, nullptr);
  return 0;
} catch (const std::exception&) {
  return 1;
}
