// CUDA kernels of the halo convolution's input; geometry and protocol types are in halo.h.
//
// The exchange. Every rank has two slots (parities) for the edge of each neighbour, and each
// neighbour's flag. The writing kernel of exchange e stores its edges into slot e % 2 of both
// neighbours, then releases flag = e to BOTH, also towards a side that gets no edge. The waiting
// kernel acquires flag >= e from both, copies slots e % 2 into the padding, and advances the epoch;
// the next writing kernel starts after it (same stream). Two parities suffice. For neighbours A and
// B: A overwrites B's slot of exchange e in exchange e + 2, so after A's waiting kernel of e + 1,
// which saw B's flag e + 1. B released that in its writing kernel of e + 1, so after its waiting
// kernel of e, which had read the slot. The flag of e + 1 thus acknowledges the slot of e, which is
// why it is sent and awaited when no edge travels that way (stride 2). A rank with one neighbour
// runs the same argument with that one alone; nothing in it spans more than a pair. Likewise a flag
// is never more than one exchange ahead. The epoch lives on the device, so a captured graph may
// hold any number of exchanges, odd ones too.
#include <algorithm>

#include "common.h"
#include "halo.h"
#include "halo_device.h"

namespace cosmos3::halo {
namespace {

// Vectors of a place that 32 lanes hold in registers: 1024 channels of any type, 1280 of 16 bits.
template <typename T>
constexpr int kMostVectors = sizeof(T) == 4 ? 256 : 160;

// Slots that this kernel's edges go to, read off the device's epoch once.
struct Sending {
    char* slot[2];
    __device__ explicit Sending(const Link& link) : slot{nullptr, nullptr} {
        if (link.state == nullptr) return;
        const uint32_t epoch = link.state->epoch + 1;
        slot[kBefore] = sent_slot(link, kBefore, epoch);
        slot[kAfter] = sent_slot(link, kAfter, epoch);
    }
};

// After all stores of this block: the last block to come here releases the neighbours' flags. One
// thread's fence at system scope covers its block's stores, ordered before it by the barrier
// (fences are cumulative).
__device__ void release_edges(const Link& link) {
    if (link.state == nullptr) return;
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();
    if (atomicAdd(&link.state->written, 1u) + 1 < gridDim.x) return;
    __threadfence_system();
    link.state->written = 0;
    const uint32_t epoch = link.state->epoch + 1;
    if (link.peer[kBefore]) store_release(flag(link.peer[kBefore], kAfter, link.slot_bytes), epoch);
    if (link.peer[kAfter]) store_release(flag(link.peer[kAfter], kBefore, link.slot_bytes), epoch);
}

template <typename Unit>
__device__ __forceinline__ void fill_padding(const Write& write, const Place& place, uint32_t index,
                                             int units, int lane, int lanes) {
    const Borrowed borrowed = borrow(write, place);
    const Unit* from = static_cast<const Unit*>(borrowed.from);
    Unit* to = static_cast<Unit*>(write.out) + int64_t(index) * units;
    for (int i = lane; i < units; i += lanes)
        to[i] = from ? from[borrowed.place * units + i] : Unit{};
}

// A place of x: kLanes threads hold its channels in kVectors 16-byte vectors each.
template <typename T, int kLanes, int kVectors>
__device__ __forceinline__ void compute_place(const Write& write, const Place& place, int lane,
                                              unsigned mask, uint4 (&raw)[kVectors]) {
    constexpr int kSize = kPerVector<T>;
    const int vectors = write.plan.channels / kSize;
    const uint4* x = static_cast<const uint4*>(write.x) + source_place(write.plan, place) * vectors;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int at = lane + k * kLanes;
        raw[k] = at < vectors ? __ldg(x + at) : uint4{};
    }
    if (write.bias == nullptr && write.prologue != kNormSilu) return;
    float value[kVectors][kSize], squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int at = lane + k * kLanes;
        Vector<T>::unpack(raw[k], value[k]);
        if (write.bias != nullptr && at < vectors) {
            float bias[kSize];
            load_floats(write.bias + at * kSize, bias);
#pragma unroll
            for (int i = 0; i < kSize; ++i) value[k][i] += bias[i];
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) squares = fmaf(value[k][i], value[k][i], squares);
    }
    if (write.prologue == kNormSilu) {
        const float scale = write.root * inverse_norm(sum_lanes<kLanes>(squares, mask));
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const int at = lane + k * kLanes;
            float gamma[kSize] = {};
            if (at < vectors) load_floats(write.gamma + at * kSize, gamma);
#pragma unroll
            for (int i = 0; i < kSize; ++i) value[k][i] = value[k][i] * scale * gamma[i];
            const uint4 rounded = Vector<T>::pack(value[k]);
            Vector<T>::unpack(rounded, value[k]);
#pragma unroll
            for (int i = 0; i < kSize; ++i) value[k][i] = silu<T>(value[k][i]);
        }
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) raw[k] = Vector<T>::pack(value[k]);
}

template <int kLanes, int kVectors>
__device__ __forceinline__ void store_vectors(void* base, int64_t place, int vectors, int lane,
                                              const uint4 (&raw)[kVectors]) {
    uint4* to = static_cast<uint4*>(base) + place * vectors;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
        if (lane + k * kLanes < vectors) to[lane + k * kLanes] = raw[k];
}

template <typename T, int kLanes, int kVectors>
__global__ void __launch_bounds__(kThreads) write_vectors(const __grid_constant__ Write write) {
    const Plan& plan = write.plan;
    const Sending sending(write.link);
    const int lane = threadIdx.x % kLanes, vectors = plan.channels / kPerVector<T>;
    const unsigned mask = (kLanes == 32 ? ~0u : (1u << (kLanes % 32)) - 1)
                          << (threadIdx.x % 32 / kLanes * kLanes);
    const uint32_t places = uint32_t(plan.places()), stride = gridDim.x * (kThreads / kLanes);
    for (uint32_t i = (blockIdx.x * kThreads + threadIdx.x) / kLanes; i < places; i += stride) {
        const Place place = locate(plan, i);
        if (is_padding(plan, place)) {
            fill_padding<uint4>(write, place, i, vectors, lane, kLanes);
            continue;
        }
        uint4 raw[kVectors];
        compute_place<T, kLanes, kVectors>(write, place, lane, mask, raw);
        store_vectors<kLanes>(write.out, i, vectors, lane, raw);
        for (int side = kBefore; side <= kAfter; ++side) {
            if (sending.slot[side] == nullptr) continue;
            const int64_t to = sent_place(plan, Side(side), place);
            if (to >= 0) store_vectors<kLanes>(sending.slot[side], to, vectors, lane, raw);
        }
    }
    release_edges(write.link);
}

// Any number of channels: a warp a place, element by element, x read twice.
template <typename T>
__global__ void __launch_bounds__(kThreads) write_scalars(const __grid_constant__ Write write) {
    const Plan& plan = write.plan;
    const Sending sending(write.link);
    const float *bias = write.bias, *gamma = write.gamma;
    const int lane = threadIdx.x % 32, channels = plan.channels;
    const uint32_t places = uint32_t(plan.places()), stride = gridDim.x * (kThreads / 32);
    for (uint32_t i = (blockIdx.x * kThreads + threadIdx.x) / 32; i < places; i += stride) {
        const Place place = locate(plan, i);
        if (is_padding(plan, place)) {
            fill_padding<T>(write, place, i, channels, lane, 32);
            continue;
        }
        const T* x = static_cast<const T*>(write.x) + source_place(plan, place) * channels;
        float scale = 0.0f;
        if (write.prologue == kNormSilu) {
            for (int c = lane; c < channels; c += 32) {
                const float value = widen(x[c]) + (bias ? bias[c] : 0.0f);
                scale = fmaf(value, value, scale);
            }
            scale = write.root * inverse_norm(sum_lanes<32>(scale, ~0u));
        }
        for (int c = lane; c < channels; c += 32) {
            float value = widen(x[c]) + (bias ? bias[c] : 0.0f);
            if (write.prologue == kNormSilu)
                value = silu<T>(widen(narrow<T>(value * scale * gamma[c])));
            const T result = bias || write.prologue == kNormSilu ? narrow<T>(value) : x[c];
            static_cast<T*>(write.out)[int64_t(i) * channels + c] = result;
            for (int side = kBefore; side <= kAfter; ++side) {
                if (sending.slot[side] == nullptr) continue;
                const int64_t to = sent_place(plan, Side(side), place);
                T* slot = reinterpret_cast<T*>(sending.slot[side]);
                if (to >= 0) slot[to * channels + c] = result;
            }
        }
    }
    release_edges(write.link);
}

// As many blocks as fit on the chip at once, or as the work needs: fewer blocks, fewer arrivals at
// one counter.
template <typename Kernel>
void launch_write(Kernel kernel, const Write& write, int lanes, int device, cudaStream_t stream) {
    int resident = 0;
    COSMOS3_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
    const int64_t per_block = kThreads / lanes;
    const int64_t needed = (write.plan.places() + per_block - 1) / per_block;
    const int64_t blocks = std::min<int64_t>(needed, int64_t(resident) * processors(device));
    kernel<<<unsigned(std::max<int64_t>(blocks, 1)), kThreads, 0, stream>>>(write);
    COSMOS3_CUDA_CHECK(cudaGetLastError());
}

template <typename T, int kLanes, int kVectors>
void launch_vectors(const Write& write, int device, cudaStream_t stream) {
    launch_write(write_vectors<T, kLanes, kVectors>, write, kLanes, device, stream);
}

template <typename T>
bool takes_vectors(const Write& write) {
    const int64_t bytes = int64_t(write.plan.channels) * sizeof(T);
    return bytes % 16 == 0 && bytes <= kMostVectors<T> * 16 && aligned(write.x) &&
           aligned(write.out) && aligned(write.gamma) && aligned(write.bias) &&
           aligned(write.edge[kBefore]) && aligned(write.edge[kAfter]);
}

// Lanes x vectors a place: the fewest lanes that hold its channels in 4 vectors each (5 for the
// encoder's 160, 320 and 640 channels), so that each thread has 64 bytes in flight.
template <typename T>
void launch_by_channels(const Write& write, int device, cudaStream_t stream) {
    if (!takes_vectors<T>(write)) return launch_write(write_scalars<T>, write, 32, device, stream);
    const int vectors = write.plan.channels / kPerVector<T>;
    if (vectors == 20) return launch_vectors<T, 4, 5>(write, device, stream);
    if (vectors == 40) return launch_vectors<T, 8, 5>(write, device, stream);
    if (vectors == 80) return launch_vectors<T, 16, 5>(write, device, stream);
    if (vectors == 160) return launch_vectors<T, 32, 5>(write, device, stream);
    if (vectors <= 16) return launch_vectors<T, 4, 4>(write, device, stream);
    if (vectors <= 32) return launch_vectors<T, 8, 4>(write, device, stream);
    if (vectors <= 64) return launch_vectors<T, 16, 4>(write, device, stream);
    if (vectors <= 128) return launch_vectors<T, 32, 4>(write, device, stream);
    launch_vectors<T, 32, sizeof(T) == 4 ? 8 : 5>(write, device, stream);
}

}  // namespace

void write_cuda(const Write& write, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (write.dtype == kFloat32) return launch_by_channels<float>(write, device, on);
    if (write.dtype == kFloat16) return launch_by_channels<__half>(write, device, on);
    launch_by_channels<__nv_bfloat16>(write, device, on);
}

}  // namespace cosmos3::halo
