// What the halo kernels share: launch sizes, norm, SiLU.
#pragma once

#include "device.h"
#include "halo.h"

namespace cosmos3::halo {

constexpr int kThreads = 256;  // of every block

// 16-bit types hide the few ulp of the approximate exponential and reciprocal behind their own
// rounding; float32 does not. Flushing denormals (ftz) saves 3 of some 25 instructions an element,
// where 33 is what the bandwidth allows.
template <typename T>
__device__ __forceinline__ float silu(float x) {
    if constexpr (sizeof(T) == 4) return x / (1.0f + expf(-x));
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
}

// 1 / max(norm, eps), from the sum of squares; a NaN stays NaN.
__device__ __forceinline__ float inverse_norm(float squares) {
    return rsqrtf(squares < kNormEps * kNormEps ? kNormEps * kNormEps : squares);
}

template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}

}  // namespace cosmos3::halo
