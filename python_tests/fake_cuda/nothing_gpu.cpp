// A CUDA device that does nothing, for a torch that was built without CUDA.
//
// FakeTensorMode has tensors with a device and no memory, but autograd wants more of a device than its name: it asks
// the accelerator's hooks how many devices there are and starts a thread for each, and it sets the device and the
// stream of a node by the device guard. Without either it ends with "PyTorch is not linked with support for cuda
// devices".
//
// Hazard: torch looks the hooks up once, by the class name "CUDAHooks" in a registry, the first time it is asked for
// them. So this is loaded before `import torch` has run, with global symbols, in a process of its own.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {

struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }

  // One device, always the current one.
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
};

}  // namespace

// The macros name torch's types without their namespace.
using namespace at;
REGISTER_CUDA_HOOKS(CUDAHooks)
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)
