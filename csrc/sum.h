// Sum over the ranks of a row-parallel product, added to the residual, and the RMSNorm that
// follows: what the CUDA kernel (sum.cu) and its CPU twin (sum.cpp) share.
//
// Of `rows` rows each rank owns an even share. Every rank holds, in memory that its peers address,
// its `part` of the product, the `normed` result, and flags. For each row it owns a rank computes
//
//     residual = round(part_0 + part_1 + ... + residual)
//
//     normed   = round(round(residual * rsqrt(mean(residual^2) + eps)) * weight)
//
// (float32 sums, one rounding of each result) and stores `normed` into every rank's memory. Its
// residual rows stay with it, unless the peers ask for them too (residual_at): the others' rows of
// its own residual are stale from the first sum on. A row is computed once, so all ranks hold the
// same bits.
#pragma once

#include <cstdint>

#include "common.h"

#ifdef __CUDACC__
#define SUM_INLINE __host__ __device__ __forceinline__
#else
#define SUM_INLINE inline
#endif

namespace cosmos3::sum {

constexpr int kMaxRanks = 8;

struct State {       // one a rank, on its device, zero at the start; the kernel advances it
    uint32_t epoch;  // sums done
    uint32_t done;   // blocks of the running kernel that are done
    uint32_t error;  // 1 << rank of each that did not come before the deadline; never cleared here
    uint32_t error_epoch;  // sum in which that was seen first
    uint32_t reserved[4];
};

// A rank tells its peers twice a sum: that its part is complete and its `normed` no longer read,
// and that it has read the parts and stored its rows.
enum Phase : int { kReady = 0, kStored = 1 };
constexpr int64_t kFlagStride = 128;  // each flag on its own line
constexpr int64_t flag_bytes(int ranks) { return 2 * ranks * kFlagStride; }

struct Sum {
    char* peer[kMaxRanks];  // every rank's memory as this one addresses it
    int64_t part, normed, flags;
    int64_t residual_at;  // of the residual in every rank's memory; -1: the peers do not want it
    void* residual;       // this rank's
    const void* weight;
    float eps;
    int rows, columns, ranks, rank, dtype;
    State* state;
    uint64_t deadline_ns;

    SUM_INLINE int first_row(int of) const { return int(int64_t(rows) * of / ranks); }
    SUM_INLINE uint32_t* flag(int of, Phase phase, int from) const {
        return reinterpret_cast<uint32_t*>(peer[of] + flags + (phase * ranks + from) * kFlagStride);
    }
};

// Arguments are checked before these are called (bind_sum); the CUDA one launches on `stream`
// alone.
void sum_norm_cpu(const Sum& sum);
void sum_norm_cuda(const Sum& sum, int device, std::uintptr_t stream);

}  // namespace cosmos3::sum
