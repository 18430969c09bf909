// One sweep over a tile of a row: the only code compiled for each instruction set (sweep_simd.cpp, sweep_double.cpp).
#pragma once
#include <cstdint>

#include "../kernels.h"
#include "../math/softmax.h"

namespace gk {

constexpr int64_t kTileColumns = 8192;  // few enough that the second read of a tile hits L1

// How a logit becomes z, with the least work per element: z = logit, or cap * tanh(logit * inner).
struct Transform {
  double unit;   // y = (z - max) * unit
  double slope;  // d z / d logit, without softcap'
  double inner, cap;
};

struct Sweeps {
  void (*stats)(const void* logits, int64_t columns, const Transform&, Softmax<double>* out);
  // out may be logits; stream: write past the cache.
  void (*gradient)(const void* logits, void* out, int64_t columns, const Transform&, double max, LogitGradient<double>,
                   bool stream);
};

enum class Isa : int { generic, avx2, avx512, avx512_bf16, kCount };

Sweeps sweeps_generic(DType, bool softcap, bool squares);
#ifdef GK_X86
Sweeps sweeps_avx2(DType, bool softcap, bool squares);
Sweeps sweeps_avx512(DType, bool softcap, bool squares);
Sweeps sweeps_avx512_bf16(DType, bool softcap, bool squares);
#endif
Sweeps sweeps_double(bool softcap, bool squares);

Sweeps sweeps(DType, bool softcap, bool squares);  // of the instruction set in use

bool isa_supported(Isa);
Isa isa_in_use();
void use_isa(Isa);  // for tests; the best supported one is in use from the start

}  // namespace gk
