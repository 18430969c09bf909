// Launches of cuda/launch.h on launch_runtime.cpp, for test_cuda_build.py.
#include "cuda/launch.h"

__global__ void kernel(int) {
  __shared__ int own[256];
  own[threadIdx.x] = 0;
}

int main() {
  for (const int64_t bytes : {200 << 10, 60 << 10, 1 << 10}) gk::launch("kernel", kernel, {1, 256, bytes}, nullptr, 1);
}
