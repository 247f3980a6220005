// CPU twin of image.cu, and the binding of both; image.h says what they compute.
#include "image.h"

#include "bindings.h"
#include "common.h"

namespace cosmos3::image {

void to_tensor_cpu(std::uintptr_t frames, std::uintptr_t out, std::int64_t count, int,
                   std::uintptr_t) {
    const auto* from = reinterpret_cast<const std::uint8_t*>(frames);
    auto* to = reinterpret_cast<float*>(out);
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[i] / 127.5f - 1.0f;
}

namespace {

void to_tensor(std::uintptr_t frames, std::uintptr_t out, std::int64_t count, int device,
               std::uintptr_t stream) {
    COSMOS3_CHECK(count >= 0, "count must not be negative, got " + std::to_string(count));
    if (count == 0) return;
    COSMOS3_CHECK(frames != 0 && out != 0, "frames and out must not be null");
    if (device < 0) return to_tensor_cpu(frames, out, count, device, stream);
#ifdef COSMOS3_CUDA
    to_tensor_cuda(frames, out, count, device, stream);
#else
    COSMOS3_CHECK(false, "device " + std::to_string(device) +
                             " asked for, but this build has no CUDA kernels");
#endif
}

}  // namespace
}  // namespace cosmos3::image

void bind_image(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("image_to_tensor", &cosmos3::image::to_tensor, py::arg("frames"), py::arg("out"),
               py::arg("count"), py::arg("device"), py::arg("stream"),
               py::call_guard<py::gil_scoped_release>(),
               "out float32 [count] = frames uint8 [count] / 127.5 - 1; device -1 is the CPU.");
}
