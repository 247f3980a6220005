// 8-bit pixels to floats in [-1, 1]: out[i] = frames[i] / 127.5 - 1 for `count` values, in memory
// order, in fp32.
//
// frames and out are addresses of uint8 and float32. The CUDA kernel (image.cu) and its CPU twin
// (image.cpp) give the same bits: one IEEE division and one subtraction. The twin ignores device
// and stream.
#pragma once

#include <cstdint>

namespace cosmos3::image {

void to_tensor_cpu(std::uintptr_t frames, std::uintptr_t out, std::int64_t count, int device,
                   std::uintptr_t stream);
void to_tensor_cuda(std::uintptr_t frames, std::uintptr_t out, std::int64_t count, int device,
                    std::uintptr_t stream);

}  // namespace cosmos3::image
