// CUDA kernel of image.h. Four values a thread: a 4-byte load and a 16-byte store, both coalesced
// over a warp.
#include <algorithm>

#include "common.h"
#include "image.h"

namespace cosmos3::image {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 4096;  // a grid-stride loop takes the rest

__device__ __forceinline__ float to_unit(std::uint8_t value) {
    return __fdiv_rn(value, 127.5f) - 1.0f;
}

__global__ void to_tensor_vector_kernel(const uchar4* __restrict__ frames, float4* __restrict__ out,
                                        std::int64_t groups) {
    const std::int64_t stride = std::int64_t(gridDim.x) * blockDim.x;
    for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < groups;
         i += stride) {
        const uchar4 v = frames[i];
        out[i] = make_float4(to_unit(v.x), to_unit(v.y), to_unit(v.z), to_unit(v.w));
    }
}

__global__ void to_tensor_kernel(const std::uint8_t* __restrict__ frames, float* __restrict__ out,
                                 std::int64_t count) {
    const std::int64_t stride = std::int64_t(gridDim.x) * blockDim.x;
    for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += stride) {
        out[i] = to_unit(frames[i]);
    }
}

int blocks(std::int64_t items) {
    return static_cast<int>(std::min(kMaxBlocks, (items + kThreads - 1) / kThreads));
}

}  // namespace

void to_tensor_cuda(std::uintptr_t frames, std::uintptr_t out, std::int64_t count, int device,
                    std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const bool aligned = frames % sizeof(uchar4) == 0 && out % sizeof(float4) == 0;
    const std::int64_t groups = aligned ? count / 4 : 0, rest = count - 4 * groups;
    if (groups > 0) {
        to_tensor_vector_kernel<<<blocks(groups), kThreads, 0, queue>>>(
            reinterpret_cast<const uchar4*>(frames), reinterpret_cast<float4*>(out), groups);
        COSMOS3_CUDA_CHECK(cudaGetLastError());
    }
    if (rest > 0) {  // the last 1 to 3 values, or all where an address is odd
        to_tensor_kernel<<<blocks(rest), kThreads, 0, queue>>>(
            reinterpret_cast<const std::uint8_t*>(frames) + 4 * groups,
            reinterpret_cast<float*>(out) + 4 * groups, rest);
        COSMOS3_CUDA_CHECK(cudaGetLastError());
    }
}

}  // namespace cosmos3::image
