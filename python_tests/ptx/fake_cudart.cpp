// A CUDA runtime without a GPU: the library's own host code runs on it, and each launch goes to a callback with the
// kernel's mangled name, the grid and the parameters as they are in memory.
#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <string>

namespace {

using Callback = void (*)(const char* kernel, const unsigned* blocks, unsigned threads, size_t shared_bytes,
                          unsigned cluster, const void* parameters);

Callback callback = nullptr;
int shared_bytes = 0, version = 0, processors = 0, blocks_at_once = 0;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void ptx_machine(Callback launched, int shared, int arch, int multiprocessors,
                                                        int blocks) {
  callback = launched, shared_bytes = shared, version = arch, processors = multiprocessors, blocks_at_once = blocks;
}

// What nvcc's host code calls when the module is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* driver) {
  *driver = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "not supported by the runtime of the tests"; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = processors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_bytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = version / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = version % 10;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->ptxVersion = attributes->binaryVersion = version;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = blocks_at_once;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = blocks_at_once;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
  *count = blocks_at_once;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
  const unsigned blocks[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  callback(names()[host].c_str(), blocks, config->blockDim.x, config->dynamicSmemBytes, cluster, arguments[0]);
  return cudaSuccess;
}

}  // extern "C"
