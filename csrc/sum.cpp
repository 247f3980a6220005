// The CPU twin of the kernel in sum.cu, and the binding of both: same arguments, same protocol, the
// memory of "ranks" being buffers of one process and each rank a thread. device = -1 selects the
// CPU.
#include "sum.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "bindings.h"
#include "scalars.h"

namespace cosmos3::sum {
namespace {

constexpr int kMostColumns[] = {8192, 16384, 16384};  // by dtype: what a block's registers hold

void tell(const Sum& sum, Phase phase, uint32_t epoch) {
    for (int to = 0; to < sum.ranks; ++to)
        if (to != sum.rank && sum.state->error == 0)
            __atomic_store_n(sum.flag(to, phase, sum.rank), epoch, __ATOMIC_RELEASE);
}

bool arrived(const Sum& sum, Phase phase, uint32_t epoch, int from) {
    using std::chrono::steady_clock;
    const auto start = steady_clock::now();
    const uint32_t* theirs = sum.flag(sum.rank, phase, from);
    while (int32_t(__atomic_load_n(theirs, __ATOMIC_ACQUIRE) - epoch) < 0) {
        const bool expired =
            steady_clock::now() - start > std::chrono::nanoseconds(sum.deadline_ns);
        if (expired && sum.state->error == 0) sum.state->error_epoch = epoch;
        if (expired) sum.state->error |= 1u << from;
        if (sum.state->error != 0) return false;
        std::this_thread::yield();
    }
    return true;
}

bool meet(const Sum& sum, Phase phase, uint32_t epoch) {
    bool all = true;
    for (int from = 0; from < sum.ranks; ++from)
        if (from != sum.rank) all = arrived(sum, phase, epoch, from) && all;
    return all;
}

template <typename T>
void sum_row(const Sum& sum, int row) {
    const int64_t start = int64_t(row) * sum.columns;
    T* residual = static_cast<T*>(sum.residual) + start;
    const T* weight = static_cast<const T*>(sum.weight);
    float squares[32] = {};  // and a tree, as a warp adds
    for (int c = 0; c < sum.columns; ++c) {
        float total = 0.0f;
        for (int r = 0; r < sum.ranks; ++r)
            total += reinterpret_cast<const T*>(sum.peer[r] + sum.part)[start + c].widen();
        residual[c] = T::narrow(total + residual[c].widen());
        squares[c % 32] += residual[c].widen() * residual[c].widen();
    }
    for (int step = 16; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) squares[i] += squares[i + step];
    const float scale = 1.0f / std::sqrt(squares[0] / float(sum.columns) + sum.eps);
    for (int c = 0; c < sum.columns; ++c) {
        const T scaled = T::narrow(residual[c].widen() * scale);
        const T normed = T::narrow(scaled.widen() * weight[c].widen());
        for (int r = 0; r < sum.ranks; ++r) {
            reinterpret_cast<T*>(sum.peer[r] + sum.normed)[start + c] = normed;
            if (sum.residual_at >= 0 && r != sum.rank)
                reinterpret_cast<T*>(sum.peer[r] + sum.residual_at)[start + c] = residual[c];
        }
    }
}

template <typename T>
void sum_rows(const Sum& sum) {
    const uint32_t epoch = sum.state->epoch + 1;
    tell(sum, kReady, epoch);
    if (meet(sum, kReady, epoch))
        for (int row = sum.first_row(sum.rank); row < sum.first_row(sum.rank + 1); ++row)
            sum_row<T>(sum, row);
    tell(sum, kStored, epoch);
    meet(sum, kStored, epoch);
    sum.state->epoch = epoch;
}

void check(const Sum& sum) {
    COSMOS3_CHECK(1 <= sum.ranks && sum.ranks <= kMaxRanks && 0 <= sum.rank && sum.rank < sum.ranks,
                  "rank " + text(sum.rank) + " of " + text(sum.ranks) +
                      " ranks, of which at most " + text(kMaxRanks) + " may be");
    const int64_t row_bytes = int64_t(sum.columns) * bytes_of(sum.dtype);
    COSMOS3_CHECK(sum.rows > 0 && sum.columns > 0 && row_bytes % 16 == 0 &&
                      sum.columns <= kMostColumns[sum.dtype],
                  text(sum.rows) + " rows of " + text(row_bytes) +
                      " bytes, which must be a multiple of " + "16 and at most " +
                      text(kMostColumns[sum.dtype] * bytes_of(sum.dtype)));
    COSMOS3_CHECK(sum.residual && sum.weight && sum.state,
                  "residual, weight and state must not be null");
    const int64_t offsets =
        sum.part | sum.normed | sum.flags | std::max<int64_t>(sum.residual_at, 0);
    COSMOS3_CHECK(offsets >= 0 && offsets % 16 == 0,
                  "offsets into a rank's memory must be multiples of 16");
    for (int rank = 0; rank < sum.ranks; ++rank) {
        const auto address = reinterpret_cast<std::uintptr_t>(sum.peer[rank]);
        COSMOS3_CHECK(address != 0 && address % 16 == 0,
                      "memory of rank " + text(rank) + " must be aligned to 16 bytes");
    }
    const auto both = reinterpret_cast<std::uintptr_t>(sum.residual) |
                      reinterpret_cast<std::uintptr_t>(sum.weight);
    COSMOS3_CHECK(both % 16 == 0, "residual and weight must be aligned to 16 bytes");
}

void sum_norm(const std::vector<std::uintptr_t>& peers, int rank, int64_t part, int64_t normed,
              int64_t flags, int64_t residual_at, std::uintptr_t residual, std::uintptr_t weight,
              float eps, int dtype, int rows, int columns, std::uintptr_t state,
              int64_t deadline_ns, int device, [[maybe_unused]] std::uintptr_t stream) {
    COSMOS3_CHECK(peers.size() <= kMaxRanks,
                  "at most " + text(kMaxRanks) + " ranks, got " + text(int64_t(peers.size())));
    COSMOS3_CHECK(deadline_ns >= 0, "deadline_ns must not be negative, got " + text(deadline_ns));
    Sum sum = {{},
               part,
               normed,
               flags,
               residual_at,
               at<void>(residual),
               at<const void>(weight),
               eps,
               rows,
               columns,
               int(peers.size()),
               rank,
               dtype,
               at<State>(state),
               uint64_t(deadline_ns)};
    for (size_t i = 0; i < peers.size(); ++i) sum.peer[i] = at<char>(peers[i]);
    check(sum);
    if (device < 0) return sum_norm_cpu(sum);
#ifdef COSMOS3_CUDA
    sum_norm_cuda(sum, device, stream);
#else
    COSMOS3_CHECK(false,
                  "device " + text(device) + " asked for, but this build has no CUDA kernels");
#endif
}

}  // namespace

void sum_norm_cpu(const Sum& sum) {
    if (sum.dtype == kFloat32) return sum_rows<Float32>(sum);
    if (sum.dtype == kFloat16) return sum_rows<Float16>(sum);
    sum_rows<Bfloat16>(sum);
}

}  // namespace cosmos3::sum

void bind_sum(pybind11::module_& module) {
    namespace py = pybind11;
    using namespace cosmos3::sum;
    module.def("sum_norm", &sum_norm, py::kw_only(), py::arg("peers"), py::arg("rank"),
               py::arg("part"), py::arg("normed"), py::arg("flags"), py::arg("residual_at") = -1,
               py::arg("residual"), py::arg("weight"), py::arg("eps"), py::arg("dtype"),
               py::arg("rows"), py::arg("columns"), py::arg("state"), py::arg("deadline_ns"),
               py::arg("device"), py::arg("stream") = 0, py::call_guard<py::gil_scoped_release>());
    module.def("sum_flag_bytes", &flag_bytes, py::arg("ranks"));
    module.attr("SUM_STATE_BYTES") = sizeof(State);
}
