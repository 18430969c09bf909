// Asks the driver about a kernel of this module: if the driver is too old, or the module has no image for the device,
// every launch would fail.
#include "probe.h"

#include "launch.h"

namespace gk {

#ifdef GK_EMULATED

std::string unusable() { return {}; }

#else

namespace {

__global__ void probe_kernel() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string unusable() {
  cudaFuncAttributes compiled;
  const cudaError_t error = cudaFuncGetAttributes(&compiled, probe_kernel);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // or the next launch would report it
  int driver = 0;      // none
  cudaDriverGetVersion(&driver);
  return std::string(cudaGetErrorString(error)) + "; built with CUDA " + version(CUDART_VERSION) +
         ", the driver is for " + version(driver);
}

#endif

}  // namespace gk
