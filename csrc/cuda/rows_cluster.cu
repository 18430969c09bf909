// The row kernel for clusters, in a file of its own so that the two are compiled side by side.
#include "row_kernel.cuh"

namespace gk {

void launch_clusters(const RowArgs& args, DType dtype, const Grid& grid, Stream stream, const char* name) {
  launch_kernel<true>(args, dtype, grid, stream, name);
}

}  // namespace gk
