// The waiting kernel of the halo exchange; the protocol is told in halo.cu.
#include <algorithm>

#include "common.h"
#include "halo.h"
#include "halo_device.h"

namespace cosmos3::halo {
namespace {

// One thread of a block. After a first expiry nobody waits again: the error is for the host to see.
__device__ bool arrived(const Wait& wait, Side side, uint32_t epoch, uint64_t start) {
    if (!wait.from[side]) return true;
    const uint32_t* theirs = flag(wait.slots, side, wait.slot_bytes);
    while (int32_t(load_acquire(theirs) - epoch) < 0) {
        const bool expired = global_time_ns() - start > wait.deadline_ns;
        if (expired && atomicOr(&wait.state->error, 1u << side) == 0)
            wait.state->error_epoch = epoch;
        if (expired || *static_cast<volatile uint32_t*>(&wait.state->error) != 0) return false;
        __nanosleep(40);
    }
    return true;
}

// Slots are read past the L1 cache, and never as read-only data: a peer writes them.
template <typename Unit>
__device__ void copy_slots(const Wait& wait, uint32_t epoch) {
    const int units = int(int64_t(wait.plan.channels) * wait.element_bytes / sizeof(Unit));
    const int lane = threadIdx.x % 32;
    for (int side = kBefore; side <= kAfter; ++side) {
        if (!wait.from[side]) continue;
        const uint32_t places = uint32_t(wait.plan.edge_places(Side(side)));
        const Unit* slot = reinterpret_cast<const Unit*>(
            wait.slots + slot_offset(Side(side), epoch, wait.slot_bytes));
        const uint32_t stride = gridDim.x * (kThreads / 32);
        for (uint32_t i = (blockIdx.x * kThreads + threadIdx.x) / 32; i < places; i += stride) {
            Unit* to = static_cast<Unit*>(wait.out) + fill_place(wait.plan, Side(side), i) * units;
            const Unit* from = slot + int64_t(i) * units;
            for (int k = lane; k < units; k += 32) to[k] = __ldcg(from + k);
        }
    }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads) wait_and_fill(const __grid_constant__ Wait wait) {
    __shared__ bool complete;
    const uint32_t epoch = wait.state->epoch + 1;
    if (threadIdx.x == 0) {
        const uint64_t start = global_time_ns();
        const bool before = arrived(wait, kBefore, epoch, start);
        complete = arrived(wait, kAfter, epoch, start) && before;
    }
    __syncthreads();
    if (complete) copy_slots<Unit>(wait, epoch);
    // Every block has read the epoch before its thread 0 counts here, so the last one may advance
    // it.
    if (threadIdx.x == 0 && atomicAdd(&wait.state->waited, 1u) + 1 == gridDim.x) {
        wait.state->waited = 0;
        wait.state->epoch = epoch;
    }
}

template <typename Unit>
void launch_wait(const Wait& wait, int device, cudaStream_t stream) {
    const int64_t places = wait.plan.edge_places(kBefore) * wait.from[kBefore] +
                           wait.plan.edge_places(kAfter) * wait.from[kAfter];
    const int64_t needed = std::max<int64_t>((places + kThreads / 32 - 1) / (kThreads / 32), 1);
    const int64_t blocks = std::min<int64_t>(needed, 2 * processors(device));
    wait_and_fill<Unit><<<unsigned(blocks), kThreads, 0, stream>>>(wait);
    COSMOS3_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void wait_cuda(const Wait& wait, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    const int64_t bytes = int64_t(wait.plan.channels) * wait.element_bytes;
    if (bytes % 16 == 0 && aligned(wait.out)) return launch_wait<uint4>(wait, device, on);
    if (wait.element_bytes == 4) return launch_wait<unsigned int>(wait, device, on);
    launch_wait<unsigned short>(wait, device, on);
}

}  // namespace cosmos3::halo
