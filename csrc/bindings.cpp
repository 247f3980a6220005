// The extension cosmos3_fast._C: a table of contents. Tensors come as integers (addresses, sizes,
// device index, stream), so the module links no libtorch and serves every version of it;
// cosmos3_fast/ops/ checks them first.
#include "bindings.h"

#ifdef COSMOS3_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

PYBIND11_MODULE(_C, module) {
    module.doc() = "Fused operations of cosmos3_fast in CUDA C++, each with a CPU twin.";
    module.attr("has_cuda") = kHasCuda;
    bind_image(module);
    bind_halo(module);
    bind_noise(module);
    bind_sum(module);
}
