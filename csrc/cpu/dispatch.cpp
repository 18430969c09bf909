// Which instruction set runs: the best this CPU supports, unless a test asked for another.
#include <atomic>

#include "sweep.h"

#ifdef GK_X86
#include <cpuid.h>
#endif

namespace gk {

#ifdef GK_X86
static bool has_avx512_bf16() {  // clang 14's __builtin_cpu_supports does not know the name
  unsigned a = 0, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

bool isa_supported(Isa isa) {
#ifdef GK_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && has_avx512_bf16();
    default:
      break;
  }
#endif
  return isa == Isa::generic;
}

static Isa best_isa() {
  int isa = int(Isa::kCount) - 1;
  while (!isa_supported(Isa(isa))) --isa;
  return Isa(isa);
}
static std::atomic<Isa> current{best_isa()};
Isa isa_in_use() { return current; }
void use_isa(Isa isa) { current = isa; }

Sweeps sweeps(DType dtype, bool softcap, bool squares) {
  if (dtype == DType::f64) return sweeps_double(softcap, squares);
  switch (isa_in_use()) {
#ifdef GK_X86
    case Isa::avx2:
      return sweeps_avx2(dtype, softcap, squares);
    case Isa::avx512:
      return sweeps_avx512(dtype, softcap, squares);
    case Isa::avx512_bf16:
      return sweeps_avx512_bf16(dtype, softcap, squares);
#endif
    default:
      return sweeps_generic(dtype, softcap, squares);
  }
}

}  // namespace gk
