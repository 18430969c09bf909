// Whether this module can run on a device at all.
#pragma once
#include <string>

namespace gk {

// Why the kernels cannot run on the current device, in the driver's words; empty where they can.
std::string unusable();

}  // namespace gk
