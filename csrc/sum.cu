// The CUDA kernel of sum.h.
//
// Protocol of sum number e (the epoch, counted on the device, so that nothing of it is baked into a
// graph). Block 0 releases `ready` = e to every peer: the kernels before this one have written the
// part and have read `normed`. Every block acquires `ready` >= e of all peers, then reads their
// parts and stores into their memory. The last block to finish releases `stored` = e to every peer
// and acquires theirs: when the kernel ends, this rank's `normed` is complete, and its part may be
// overwritten. No block waits for another one of its own grid, so any grid may be launched, and
// ranks need not launch equal ones. A rank that has seen an error tells its peers nothing more, so
// that every rank of the sum ends with one.
#include <algorithm>

#include "device.h"
#include "sum.h"

namespace cosmos3::sum {
namespace {

__device__ __forceinline__ bool failed(const Sum& sum) {
    return *static_cast<volatile uint32_t*>(&sum.state->error) != 0;
}

// One thread for each peer, after a barrier of the block that orders what the flag stands for.
__device__ __forceinline__ void tell(const Sum& sum, Phase phase, uint32_t epoch) {
    const int to = threadIdx.x;
    if (to < sum.ranks && to != sum.rank && !failed(sum))
        store_release(sum.flag(to, phase, sum.rank), epoch);
}

__device__ bool arrived(const Sum& sum, Phase phase, uint32_t epoch, int from) {
    const uint32_t* theirs = sum.flag(sum.rank, phase, from);
    const uint64_t start = global_time_ns();
    while (int32_t(load_acquire(theirs) - epoch) < 0) {
        const bool expired = global_time_ns() - start > sum.deadline_ns;
        if (expired && atomicOr(&sum.state->error, 1u << from) == 0) sum.state->error_epoch = epoch;
        if (expired || failed(sum)) return false;
        __nanosleep(20);
    }
    return true;
}

// Whether all peers have come; the whole block calls it and gets the same answer.
__device__ __forceinline__ bool meet(const Sum& sum, Phase phase, uint32_t epoch) {
    const int from = threadIdx.x;
    const bool waits = from < sum.ranks && from != sum.rank;
    return __syncthreads_and(!waits || arrived(sum, phase, epoch, from));
}

constexpr int kInFlight = 8;  // vectors of parts that a thread reads at once: 16 spill registers

// One row by the whole block, each thread kVectors 16-byte vectors of it. Peers' memory is read
// past the L1 cache, and never as read-only data. `scratch` must be another one for the next row.
template <typename T, int kRanks, int kThreads, int kVectors>
__device__ __forceinline__ void sum_row(const Sum& sum, int row, const uint4 (&weight)[kVectors],
                                        float* scratch) {
    constexpr int kSize = kPerVector<T>;
    const int vectors = sum.columns / kSize;
    const int64_t start = int64_t(row) * vectors;
    uint4* residual = static_cast<uint4*>(sum.residual) + start;
    constexpr int kBatch = kRanks * kVectors <= kInFlight ? kVectors : kInFlight / kRanks;
    uint4 rounded[kVectors];
    float squares = 0.0f;
#pragma unroll
    for (int first = 0; first < kVectors; first += kBatch) {
        uint4 raw[kRanks][kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int at = threadIdx.x + (first + k) * kThreads;
#pragma unroll
            for (int r = 0; r < kRanks; ++r)
                if (r < sum.ranks && at < vectors)
                    raw[r][k] =
                        __ldcg(reinterpret_cast<const uint4*>(sum.peer[r] + sum.part) + start + at);
            rounded[first + k] = at < vectors ? residual[at] : uint4{};
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int at = threadIdx.x + (first + k) * kThreads;
            if (at >= vectors) continue;
            float total[kSize] = {}, value[kSize];
#pragma unroll
            for (int r = 0; r < kRanks; ++r) {
                if (r >= sum.ranks) continue;
                Vector<T>::unpack(raw[r][k], value);
#pragma unroll
                for (int i = 0; i < kSize; ++i) total[i] += value[i];
            }
            Vector<T>::unpack(rounded[first + k], value);
#pragma unroll
            for (int i = 0; i < kSize; ++i) total[i] += value[i];
            residual[at] = rounded[first + k] = Vector<T>::pack(total);
            Vector<T>::unpack(rounded[first + k], value);
#pragma unroll
            for (int i = 0; i < kSize; ++i) squares = fmaf(value[i], value[i], squares);
        }
    }
    squares = sum_lanes<32>(squares, ~0u);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) squares += scratch[warp];
    const float scale = 1.0f / sqrtf(squares / float(sum.columns) + sum.eps);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int at = threadIdx.x + k * kThreads;
        if (at >= vectors) continue;
        float value[kSize], by[kSize];
        Vector<T>::unpack(rounded[k], value);
        Vector<T>::unpack(weight[k], by);
#pragma unroll
        for (int i = 0; i < kSize; ++i) value[i] = widen(narrow<T>(value[i] * scale)) * by[i];
        const uint4 normed = Vector<T>::pack(value);
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
            if (r >= sum.ranks) continue;
            reinterpret_cast<uint4*>(sum.peer[r] + sum.normed)[start + at] = normed;
            if (sum.residual_at >= 0 && r != sum.rank)
                reinterpret_cast<uint4*>(sum.peer[r] + sum.residual_at)[start + at] = rounded[k];
        }
    }
}

template <typename T, int kRanks, int kThreads, int kVectors, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_norm_kernel(const __grid_constant__ Sum sum) {
    __shared__ float scratch[2][kThreads / 32];
    __shared__ bool last;
    const uint32_t epoch = sum.state->epoch + 1;
    if (blockIdx.x == 0) tell(sum, kReady, epoch);
    uint4 weight[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
        const int at = threadIdx.x + k * kThreads;
        weight[k] = at < sum.columns / kPerVector<T>
                        ? __ldg(static_cast<const uint4*>(sum.weight) + at)
                        : uint4{};
    }
    if (meet(sum, kReady, epoch)) {
        const int stop = sum.first_row(sum.rank + 1);
        int row = sum.first_row(sum.rank) + int(blockIdx.x);
        for (int turn = 0; row < stop; row += int(gridDim.x), turn ^= 1)
            sum_row<T, kRanks, kThreads, kVectors>(sum, row, weight, scratch[turn]);
    }
    // One thread's fence at system scope covers its block's accesses, ordered before it by the
    // barrier (fences are cumulative).
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence_system();
        last = atomicAdd(&sum.state->done, 1u) + 1 == gridDim.x;
        __threadfence_system();
    }
    __syncthreads();
    if (!last) return;
    tell(sum, kStored, epoch);
    meet(sum, kStored, epoch);
    // Every block has read the epoch before its thread 0 counted itself done.
    if (threadIdx.x == 0) {
        sum.state->done = 0;
        sum.state->epoch = epoch;
    }
}

template <typename T, int kRanks, int kThreads, int kVectors, int kBlocks>
void launch(const Sum& sum, int device, cudaStream_t stream) {
    const int rows = sum.first_row(sum.rank + 1) - sum.first_row(sum.rank);
    const int blocks = std::max(1, std::min(rows, kBlocks * processors(device)));
    sum_norm_kernel<T, kRanks, kThreads, kVectors, kBlocks>
        <<<unsigned(blocks), kThreads, 0, stream>>>(sum);
    COSMOS3_CUDA_CHECK(cudaGetLastError());
}

// Threads that share a row, 16-byte vectors each holds of it, blocks a processor. At 4096 bfloat16
// on two H200s 128 to 512 threads are within 5 % of each other, on four 256 are 4 % faster than
// 512. Nothing else has been measured: no other width, and no eight GPUs. Compiled for sm_90 by
// nvcc 13.0, no variant spills registers.
template <typename T, int kRanks>
void launch_by_width(const Sum& sum, int device, cudaStream_t stream) {
    const int vectors = sum.columns / kPerVector<T>;
    if (vectors <= 512) return launch<T, kRanks, 256, 2, 2>(sum, device, stream);
    if (vectors <= 1024) return launch<T, kRanks, 512, 2, 1>(sum, device, stream);
    launch<T, kRanks, 512, 4, 1>(sum, device, stream);
}

template <typename T>
void launch_by_ranks(const Sum& sum, int device, cudaStream_t stream) {
    if (sum.ranks <= 2) return launch_by_width<T, 2>(sum, device, stream);
    if (sum.ranks <= 4) return launch_by_width<T, 4>(sum, device, stream);
    launch_by_width<T, 8>(sum, device, stream);
}

}  // namespace

void sum_norm_cuda(const Sum& sum, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (sum.dtype == kFloat32) return launch_by_ranks<float>(sum, device, on);
    if (sum.dtype == kFloat16) return launch_by_ranks<__half>(sum, device, on);
    launch_by_ranks<__nv_bfloat16>(sum, device, on);
}

}  // namespace cosmos3::sum
