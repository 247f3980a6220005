// Input of a padded convolution over strips: what the CUDA kernels (halo.cu) and their CPU twin
// (halo.cpp) share.
//
// x [frames, height, width, channels] becomes out [history + frames, rows, columns, channels], both
// dense: `history` earlier frames in front, then prologue(x + bias), between top/bottom rows and
// left/right columns of padding. Padding is zero, except along the strip axis, where the
// neighbours' edges fill it: `before` the top (axis 3) or left (axis 4), `after` the bottom or
// right.
#pragma once

#include <cstdint>

#include "common.h"

#ifdef __CUDACC__
#define HALO_INLINE __host__ __device__ __forceinline__
#else
#define HALO_INLINE inline
#endif

namespace cosmos3::halo {

enum Prologue : int { kNone = 0, kNormSilu = 1 };
enum Side : int { kBefore = 0, kAfter = 1 };

struct Plan {
    int channels, frames, height, width, history;
    int left, right, top, bottom;
    int axis;  // of the strips: 3 rows, 4 columns, 0 none

    HALO_INLINE int rows() const { return top + height + bottom; }
    HALO_INLINE int columns() const { return left + width + right; }
    HALO_INLINE int64_t places() const { return int64_t(history + frames) * rows() * columns(); }
    // Rows (axis 3) or columns (axis 4) that a side of the padding takes from its neighbour.
    HALO_INLINE int border(Side side) const {
        if (axis == 0) return 0;
        return side == kBefore ? (axis == 3 ? top : left) : (axis == 3 ? bottom : right);
    }
    // Results along the strip axis, and across it.
    HALO_INLINE int extent() const { return axis == 3 ? height : width; }
    HALO_INLINE int across() const { return axis == 3 ? width : height; }
    // Places of the edge that fills `side`.
    HALO_INLINE int64_t edge_places(Side side) const {
        return int64_t(frames) * border(side) * across();
    }
};

struct Place {
    int frame, row, column;  // of out
};

HALO_INLINE Place locate(const Plan& plan, uint32_t index) {
    const uint32_t columns = plan.columns(), rows = plan.rows();
    const uint32_t line = index / columns, frame = line / rows;
    return {int(frame), int(line - frame * rows), int(index - line * columns)};
}

HALO_INLINE bool is_padding(const Plan& plan, const Place& place) {
    const int y = place.row - plan.top, x = place.column - plan.left;
    return place.frame < plan.history || y < 0 || y >= plan.height || x < 0 || x >= plan.width;
}

HALO_INLINE int64_t source_place(const Plan& plan, const Place& place) {
    return (int64_t(place.frame - plan.history) * plan.height + place.row - plan.top) * plan.width +
           place.column - plan.left;
}

// An edge is dense: [frames, n, across, channels] (axis 3) or [frames, across, n, channels] (axis
// 4).
HALO_INLINE int64_t edge_place(const Plan& plan, int n, int frame, int along, int across) {
    if (plan.axis == 3) return (int64_t(frame) * n + along) * plan.across() + across;
    return (int64_t(frame) * plan.across() + across) * n + along;
}

// Where in `out` place number `index` of the edge that fills `side` belongs: the inverse of
// edge_place.
HALO_INLINE int64_t fill_place(const Plan& plan, Side side, uint32_t index) {
    const uint32_t n = plan.border(side), length = plan.across();
    const uint32_t inner = plan.axis == 3 ? length : n;
    const uint32_t line = index / inner, low = index - line * inner;
    const uint32_t frame = line / (plan.axis == 3 ? n : length);
    const uint32_t high = line - frame * (plan.axis == 3 ? n : length);
    const int along = int(plan.axis == 3 ? high : low), across = int(plan.axis == 3 ? low : high);
    const int place = side == kBefore ? along : plan.border(kBefore) + plan.extent() + along;
    const int row = plan.axis == 3 ? place : plan.top + across;
    const int column = plan.axis == 3 ? plan.left + across : place;
    return (int64_t(plan.history + int(frame)) * plan.rows() + row) * plan.columns() + column;
}

// Place in the edge that the neighbour on `towards` takes from us, of a result; -1: none. The
// neighbour before fills its `after` side with our first results, the one after its `before` side
// with our last.
HALO_INLINE int64_t sent_place(const Plan& plan, Side towards, const Place& place) {
    const int n = plan.border(towards == kBefore ? kAfter : kBefore);
    const int row = place.row - plan.top, column = place.column - plan.left;
    const int at = plan.axis == 3 ? row : column;
    const int along = towards == kBefore ? at : at - (plan.extent() - n);
    if (along < 0 || along >= n) return -1;
    return edge_place(plan, n, place.frame - plan.history, along, plan.axis == 3 ? column : row);
}

// What a place of padding copies: an edge, or (from nothing) zero.
struct Borrowed {
    const void* from;
    int64_t place;
};

struct State {         // one a rank, on its device, zero at the start; the kernels advance it
    uint32_t epoch;    // exchanges done
    uint32_t written;  // blocks of the running writing kernel that are done
    uint32_t waited;   // blocks of the running waiting kernel that are done
    uint32_t error;    // sides (1 << Side) whose neighbour did not come before the deadline; never
                       // cleared here
    uint32_t error_epoch;  // exchange in which that was seen first
    uint32_t reserved[3];
};

// Neighbours' slot buffers as this rank addresses them; null where there is none.
struct Link {
    char* peer[2];
    int64_t slot_bytes;
    State* state;  // null: no exchange
};

// Slot buffer of a rank: [side][parity][slot_bytes], then one flag a side, each on its own line.
constexpr int64_t kFlagStride = 128;
HALO_INLINE int64_t slot_offset(Side side, uint32_t epoch, int64_t slot_bytes) {
    return (2 * int64_t(side) + (epoch & 1)) * slot_bytes;
}
HALO_INLINE uint32_t* flag(char* buffer, Side side, int64_t slot_bytes) {
    return reinterpret_cast<uint32_t*>(buffer + 4 * slot_bytes + side * kFlagStride);
}
constexpr int64_t buffer_bytes(int64_t slot_bytes) { return 4 * slot_bytes + 2 * kFlagStride; }

// Start of the slot that our edge towards `towards` fills in this epoch, in the neighbour's buffer;
// null: none.
HALO_INLINE char* sent_slot(const Link& link, Side towards, uint32_t epoch) {
    if (link.peer[towards] == nullptr) return nullptr;
    const Side theirs = towards == kBefore ? kAfter : kBefore;
    return link.peer[towards] + slot_offset(theirs, epoch, link.slot_bytes);
}

struct Write {
    Plan plan;
    int dtype, prologue;
    float root;                 // sqrt(channels)
    const float *gamma, *bias;  // [channels]; null: no bias
    const void* x;
    const void* edge[2];  // exchanged already, by side; null: that padding stays zero
    void* out;
    Link link;
};

struct Wait {
    Plan plan;
    int element_bytes;
    void* out;
    char* slots;   // this rank's own buffer
    bool from[2];  // neighbours there are, by side
    int64_t slot_bytes;
    State* state;
    uint64_t deadline_ns;
};

HALO_INLINE Borrowed borrow(const Write& write, const Place& place) {
    const Plan& plan = write.plan;
    if (place.frame < plan.history) return {nullptr, 0};
    const int at = plan.axis == 3 ? place.row : place.column, lead = plan.border(kBefore);
    const int across = plan.axis == 3 ? place.column - plan.left : place.row - plan.top;
    if (plan.axis == 0 || across < 0 || across >= plan.across()) return {nullptr, 0};
    if (at >= lead && at < lead + plan.extent()) return {nullptr, 0};
    const Side side = at < lead ? kBefore : kAfter;
    const int along = side == kBefore ? at : at - lead - plan.extent();
    return {write.edge[side],
            edge_place(plan, plan.border(side), place.frame - plan.history, along, across)};
}

constexpr float kNormEps = 1e-12f;

// Arguments are checked before these are called (bind_halo); all launch on `stream` alone.
void write_cpu(const Write& write);
void wait_cpu(const Wait& wait);
void write_cuda(const Write& write, int device, std::uintptr_t stream);
void wait_cuda(const Wait& wait, int device, std::uintptr_t stream);

}  // namespace cosmos3::halo
