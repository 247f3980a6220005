// What CUDA kernels share: 16-byte vectors of float32, float16 or bfloat16 as floats, sums over
// lanes, flags between GPUs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common.h"

namespace cosmos3 {

inline bool aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

inline int processors(int device) {
    int count = 0;
    COSMOS3_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <typename T>
struct Vector;

template <>
struct Vector<float> {
    static __device__ __forceinline__ void unpack(const uint4& raw, float* to) {
        to[0] = __uint_as_float(raw.x), to[1] = __uint_as_float(raw.y);
        to[2] = __uint_as_float(raw.z), to[3] = __uint_as_float(raw.w);
    }
    static __device__ __forceinline__ uint4 pack(const float* from) {
        return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]),
                          __float_as_uint(from[2]), __float_as_uint(from[3]));
    }
};

template <>
struct Vector<__half> {
    static __device__ __forceinline__ void two(uint32_t raw, float* to) {
        const __half2_raw pair = {uint16_t(raw & 0xffffu), uint16_t(raw >> 16)};
        const float2 wide = __half22float2(__half2(pair));
        to[0] = wide.x, to[1] = wide.y;
    }
    static __device__ __forceinline__ uint32_t word(const float* from) {
        const __half2_raw pair = __floats2half2_rn(from[0], from[1]);
        return uint32_t(pair.x) | uint32_t(pair.y) << 16;
    }
    static __device__ __forceinline__ void unpack(const uint4& raw, float* to) {
        two(raw.x, to), two(raw.y, to + 2), two(raw.z, to + 4), two(raw.w, to + 6);
    }
    static __device__ __forceinline__ uint4 pack(const float* from) {
        return make_uint4(word(from), word(from + 2), word(from + 4), word(from + 6));
    }
};

template <>
struct Vector<__nv_bfloat16> {
    static __device__ __forceinline__ void two(uint32_t raw, float* to) {
        to[0] = __uint_as_float(raw << 16), to[1] = __uint_as_float(raw & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t word(const float* from) {
        const __nv_bfloat162_raw pair = __floats2bfloat162_rn(from[0], from[1]);
        return uint32_t(pair.x) | uint32_t(pair.y) << 16;
    }
    static __device__ __forceinline__ void unpack(const uint4& raw, float* to) {
        two(raw.x, to), two(raw.y, to + 2), two(raw.z, to + 4), two(raw.w, to + 6);
    }
    static __device__ __forceinline__ uint4 pack(const float* from) {
        return make_uint4(word(from), word(from + 2), word(from + 4), word(from + 6));
    }
};

template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x, unsigned mask) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
    return x;
}

__device__ __forceinline__ void store_release(uint32_t* to, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t global_time_ns() {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
}

}  // namespace cosmos3
