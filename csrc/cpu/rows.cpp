// The row kernel: sweep a row for its softmax statistics, ask the epilogue for d loss / d logp and d loss / d entropy,
// sweep it again to write the gradient. One writer per row and one order of summation whatever the number of threads:
// a row's result depends on nothing but the row.
#include <vector>

#include "element.h"
#include "parallel.h"
#include "policy_inputs.h"
#include "sweep.h"
#ifdef GK_X86
#include <xmmintrin.h>
#endif

namespace gk {
namespace {

constexpr int64_t kMinElementsPerThread = 1 << 15;

// Products too small for a normal float become 0 instead of slowing every instruction that touches them.
struct FlushDenormals {
#ifdef GK_X86
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | _MM_FLUSH_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

struct RowGrad {  // d loss / d the row's log-prob and entropy
  double d_logp = 0, d_entropy = 0;
  bool none() const { return d_logp == 0 && d_entropy == 0; }  // a NaN is something
};

struct Row {
  const char* logits;
  int64_t target;
  Transform transform;
};

class RowKernel {
 public:
  RowKernel(const Rows& p, const RowStats& stats)
      : p(p),
        stats(stats),
        is_double(p.dtype == DType::f64),
        bytes(size_of(p.dtype)),
        tiles((p.vocab + kTileColumns - 1) / kTileColumns),
        sweeps(gk::sweeps(p.dtype, p.softcap > 0, stats.sum_p2 != nullptr)) {}

  // epilogue(row index) -> RowGrad, once the row's statistics are stored. have_stats: they are already, from an earlier
  // launch.
  template <typename Epilogue> void run(bool have_stats, const View* gradient, const Epilogue& epilogue) const {
    const int64_t rows = p.batch * p.tokens;
    const double elements = double(rows) * double(p.vocab);  // an integer may overflow: strides of 0 cost no memory
    const int threads = int(std::min<double>(p.threads, 1 + elements / kMinElementsPerThread));
    if (rows >= threads) {
      parallel_for(rows, threads, [&](int64_t r) { run_some(r, 1, 1, have_stats, gradient, epilogue); });
    } else {
      run_some(0, rows, threads, have_stats, gradient, epilogue);
    }
  }

 private:
  const Rows& p;
  const RowStats& stats;
  const bool is_double;
  const int64_t bytes, tiles;
  const Sweeps sweeps;

  // Rows [first, first + count): with many rows each thread takes one at a time; with few, all threads share each row
  // by columns.
  template <typename Epilogue>
  void run_some(int64_t first, int64_t count, int threads, bool have_stats, const View* gradient,
                const Epilogue& epilogue) const {
    if (!have_stats) {
      std::vector<Softmax<double>> partial(count * tiles);
      parallel_for(count * tiles, threads, [&](int64_t i) { sweep_stats(first + i / tiles, i % tiles, &partial[i]); });
      for (int64_t i = 0; i < count; ++i) save_stats(first + i, &partial[i * tiles]);
    }
    if (!gradient) return;
    std::vector<RowGrad> grads(count);
    for (int64_t i = 0; i < count; ++i)
      if (active(first + i)) grads[i] = epilogue(first + i);
    parallel_for(count * tiles, threads,
                 [&](int64_t i) { sweep_gradient(first + i / tiles, i % tiles, *gradient, grads[i / tiles]); });
  }

  bool active(int64_t r) const { return is_active(p.active, r, p.tokens); }
  int64_t columns(int64_t tile) const { return std::min(kTileColumns, p.vocab - tile * kTileColumns); }

  Row row(int64_t r) const {
    const double inv_t = p.temperature.data ? 1 / read(p.temperature, r, p.tokens, is_double, 1) : p.inv_temperature;
    const double slope = p.logit_scale * inv_t;
    const Transform plain{slope * kLog2e, slope, 1, 0},
        capped{inv_t * kLog2e, slope, p.logit_scale / p.softcap, p.softcap};
    return {static_cast<const char*>(p.logits.data) + p.logits.offset(r, p.tokens) * bytes,
            static_cast<const int64_t*>(p.targets.data)[p.targets.offset(r, p.tokens)], p.softcap > 0 ? capped : plain};
  }

  void sweep_stats(int64_t r, int64_t tile, Softmax<double>* out) const {
    if (!active(r)) return;
    [[maybe_unused]] const FlushDenormals flush;
    const Row row = this->row(r);
    sweeps.stats(row.logits + tile * kTileColumns * bytes, columns(tile), row.transform, out);
  }

  void save_stats(int64_t r, const Softmax<double>* partial) const {
    if (!active(r)) return store_stats(r, 0, 0, 0, 0, 0);
    const Row row = this->row(r);
    Softmax<double> s;
    for (int64_t b = 0; b < tiles; ++b) s = s.merge(partial[b], row.transform.unit);
    if (s.max == -INFINITY) s.sum = NAN;  // every logit is -inf: no distribution
    const bool legal = row.target >= 0 && row.target < p.vocab;
    const double logp = legal ? (z_at(row, row.target) - s.max) * row.transform.unit * kLn2 - s.log_sum() : NAN;
    store_stats(r, min_(logp, 0.0), s.entropy(), s.max, s.log_sum(), s.sum_p2());
  }

  void store_stats(int64_t r, double logp, double entropy, double max, double log_sum, double sum_p2) const {
    store_acc(stats.logps, r, is_double, logp);
    store_acc(stats.entropy, r, is_double, entropy);
    store_acc(stats.max, r, is_double, max);
    store_acc(stats.log_sum, r, is_double, log_sum);
    if (stats.sum_p2) store_acc(stats.sum_p2, r, is_double, sum_p2);
  }

  double tanh_at(const Row& row, int64_t column) const {
    return std::tanh(load_element(row.logits, column, p.dtype) * row.transform.inner);
  }
  double z_at(const Row& row, int64_t column) const {
    return p.softcap > 0 ? p.softcap * tanh_at(row, column) : load_element(row.logits, column, p.dtype);
  }

  void sweep_gradient(int64_t r, int64_t tile, const View& gradient, RowGrad grad) const {
    const int64_t begin = tile * kTileColumns, n = columns(tile);
    char* dz = static_cast<char*>(gradient.data) + (gradient.offset(r, p.tokens) + begin) * bytes;
    if (!active(r) || grad.none()) {
      std::memset(dz, 0, n * bytes);
      return;
    }
    [[maybe_unused]] const FlushDenormals flush;
    const Row row = this->row(r);
    const auto stat = [&](const void* values) { return load_acc(values, r, is_double); };
    const double entropy = stat(stats.entropy);
    const int64_t target = row.target - begin;
    const bool here = target >= 0 && target < n;
    const double t = here && p.softcap > 0 ? tanh_at(row, row.target) : 0;  // read before it is overwritten
    const char* z = row.logits + begin * bytes;
    sweeps.gradient(z, dz, n, row.transform, stat(stats.max),
                    LogitGradient<double>::of(grad.d_logp, grad.d_entropy, stat(stats.log_sum), entropy), z != dz);
    if (here) {
      const double g = target_gradient(grad.d_logp, grad.d_entropy, stat(stats.logps), entropy);
      store_element(dz, target, p.dtype, row.transform.slope * (1 - t * t) * g);
    }
  }
};

}  // namespace

void row_forward(const Rows& p, const RowStats& stats, Stream) {
  RowKernel(p, stats).run(false, nullptr, [](int64_t) { return RowGrad{}; });
}

void row_backward(const Rows& p, const RowStats& saved, const void* g_logps, const void* g_entropy,
                  const View& gradient, Stream) {
  const bool is_double = p.dtype == DType::f64;
  RowKernel(p, saved).run(true, &gradient, [&](int64_t r) {
    return RowGrad{load_acc(g_logps, r, is_double), g_entropy ? load_acc(g_entropy, r, is_double) : 0};
  });
}

void row_policy(const Rows& p, const RowStats& stats, const PolicyInputs& in, const View& gradient, Stream) {
  const bool is_double = p.dtype == DType::f64;
  const Scalars<double> scalars = scalars_of(in, is_double);
  RowKernel(p, stats).run(false, &gradient, [&](int64_t r) {
    const double logp = load_acc(stats.logps, r, is_double);
    const TokenInputs<double> token = read_token(in, r, p.tokens, is_double, logp);
    const TokenResult<double> result = token_result(in.form, token, logp, 0.0, {}, scalars);
    // Rounded as the token kernel stores them: one pass and two give the same bits.
    return RowGrad{round_to_acc(result.d_logp, is_double), round_to_acc(result.d_entropy, is_double)};
  });
}

}  // namespace gk
