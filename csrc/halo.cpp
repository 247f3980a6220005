// The halo convolution's input on the CPU, and the bindings of both: same arguments, same geometry
// (halo.h), same exchange, the slots of "ranks" being buffers of one process. device = -1 selects
// the CPU.
#include "halo.h"

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>

#include "bindings.h"
#include "common.h"
#include "scalars.h"

namespace cosmos3::halo {
namespace {

// 32 partial sums and a tree, as a warp adds.
template <typename T>
float sum_squares(const T* x, const float* bias, int channels) {
    float partial[32] = {};
    for (int c = 0; c < channels; ++c) {
        const float value = x[c].widen() + (bias ? bias[c] : 0.0f);
        partial[c % 32] += value * value;
    }
    for (int step = 16; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) partial[i] += partial[i + step];
    return partial[0];
}

template <typename T>
void compute(const Write& write, const T* x, T* result) {
    const int channels = write.plan.channels;
    const float *bias = write.bias, *gamma = write.gamma;
    float scale = 0.0f;
    if (write.prologue == kNormSilu) {
        const float norm = std::sqrt(sum_squares(x, bias, channels));
        scale = write.root / (norm < kNormEps ? kNormEps : norm);
    }
    for (int c = 0; c < channels; ++c) {
        float value = x[c].widen() + (bias ? bias[c] : 0.0f);
        if (write.prologue == kNormSilu) {
            value = T::narrow(value * scale * gamma[c]).widen();
            value = value / (1.0f + std::exp(-value));
        }
        result[c] = bias || write.prologue == kNormSilu ? T::narrow(value) : x[c];
    }
}

template <typename T>
void copy_place(void* base, int64_t place, const T* from, int channels) {
    T* to = static_cast<T*>(base) + place * channels;
    if (from == nullptr)
        std::memset(static_cast<void*>(to), 0, sizeof(T) * channels);
    else
        std::memcpy(static_cast<void*>(to), from, sizeof(T) * channels);
}

template <typename T>
void write_place(const Write& write, int64_t index, char* const (&slot)[2], T* result) {
    const Plan& plan = write.plan;
    const Place place = locate(plan, uint32_t(index));
    if (is_padding(plan, place)) {
        const Borrowed borrowed = borrow(write, place);
        const T* from = static_cast<const T*>(borrowed.from);
        if (from) from += borrowed.place * plan.channels;
        return copy_place(write.out, index, from, plan.channels);
    }
    compute(write, static_cast<const T*>(write.x) + source_place(plan, place) * plan.channels,
            result);
    copy_place(write.out, index, result, plan.channels);
    for (int side = kBefore; side <= kAfter; ++side) {
        if (slot[side] == nullptr) continue;
        const int64_t to = sent_place(plan, Side(side), place);
        if (to >= 0) copy_place(slot[side], to, result, plan.channels);
    }
}

template <typename T>
void write_places(const Write& write) {
    const uint32_t epoch = write.link.state ? write.link.state->epoch + 1 : 0;
    char* const slot[2] = {sent_slot(write.link, kBefore, epoch),
                           sent_slot(write.link, kAfter, epoch)};
    std::string result(sizeof(T) * write.plan.channels, '\0');
    for (int64_t i = 0; i < write.plan.places(); ++i)
        write_place(write, i, slot, reinterpret_cast<T*>(&result[0]));
    for (int side = kBefore; side <= kAfter && write.link.state; ++side) {
        if (write.link.peer[side] == nullptr) continue;
        uint32_t* to =
            flag(write.link.peer[side], side == kBefore ? kAfter : kBefore, write.link.slot_bytes);
        __atomic_store_n(to, epoch, __ATOMIC_RELEASE);
    }
}

bool arrived(const Wait& wait, Side side, uint32_t epoch) {
    using std::chrono::steady_clock;
    if (!wait.from[side]) return true;
    const auto start = steady_clock::now();
    const uint32_t* theirs = flag(wait.slots, side, wait.slot_bytes);
    while (int32_t(__atomic_load_n(theirs, __ATOMIC_ACQUIRE) - epoch) < 0) {
        if (wait.state->error == 0 &&
            steady_clock::now() - start <= std::chrono::nanoseconds(wait.deadline_ns)) {
            std::this_thread::yield();
            continue;
        }
        if (wait.state->error == 0) {
            wait.state->error = 1u << side;
            wait.state->error_epoch = epoch;
        }
        return false;
    }
    return true;
}

void check_plan(const Plan& plan) {
    COSMOS3_CHECK(plan.channels > 0 && plan.frames > 0 && plan.height > 0 && plan.width > 0,
                  "x must not be empty, got C, T, H, W = " + text(plan.channels) + ", " +
                      text(plan.frames) + ", " + text(plan.height) + ", " + text(plan.width));
    COSMOS3_CHECK(
        plan.history >= 0 && plan.left >= 0 && plan.right >= 0 && plan.top >= 0 && plan.bottom >= 0,
        "history and padding must not be negative");
    COSMOS3_CHECK(plan.axis == 0 || plan.axis == 3 || plan.axis == 4,
                  "strip axis must be 3, 4 or 0 (none), got " + text(plan.axis));
    const int widest =
        plan.border(kBefore) > plan.border(kAfter) ? plan.border(kBefore) : plan.border(kAfter);
    COSMOS3_CHECK(plan.axis == 0 || widest <= plan.extent(),
                  "a strip of " + text(plan.extent()) + " cannot give an edge of " + text(widest));
    COSMOS3_CHECK(plan.places() < int64_t(1) << 31,
                  text(plan.places()) + " places are 2^31 or more");
}

void check_slots(const Plan& plan, int element_bytes, int64_t slot_bytes) {
    for (int side = kBefore; side <= kAfter; ++side) {
        const int64_t bytes = plan.edge_places(Side(side)) * plan.channels * element_bytes;
        COSMOS3_CHECK(bytes <= slot_bytes, "an edge of " + text(bytes) +
                                               " bytes does not fit slots of " + text(slot_bytes));
    }
    COSMOS3_CHECK(slot_bytes % 16 == 0,
                  "slot_bytes must be a multiple of 16, got " + text(slot_bytes));
}

Plan make_plan(const std::array<int, 4>& shape, int history, const std::array<int, 4>& pad,
               int axis) {
    const Plan plan = {shape[0], shape[1], shape[2], shape[3], history,
                       pad[0],   pad[1],   pad[2],   pad[3],   axis};
    check_plan(plan);
    return plan;
}

void halo_write(std::uintptr_t x, std::uintptr_t out, std::uintptr_t gamma, std::uintptr_t bias,
                std::uintptr_t before, std::uintptr_t after, int dtype, int prologue, int channels,
                int frames, int height, int width, int history, int left, int right, int top,
                int bottom, int axis, std::uintptr_t peer_before, std::uintptr_t peer_after,
                int64_t slot_bytes, std::uintptr_t state, int device,
                [[maybe_unused]] std::uintptr_t stream) {
    COSMOS3_CHECK(prologue == kNone || prologue == kNormSilu,
                  "prologue must be 0 or 1, got " + text(prologue));
    const Plan plan =
        make_plan({channels, frames, height, width}, history, {left, right, top, bottom}, axis);
    COSMOS3_CHECK(x && out, "x and out must not be null");
    COSMOS3_CHECK((prologue == kNormSilu) == (gamma != 0),
                  "gamma goes with norm_silu, and only with it");
    COSMOS3_CHECK(state || (!peer_before && !peer_after), "neighbours need a state");
    COSMOS3_CHECK(peer_before % 16 == 0 && peer_after % 16 == 0,
                  "slots must be aligned to 16 bytes");
    const int element_bytes = bytes_of(dtype);
    if (state) check_slots(plan, element_bytes, slot_bytes);
    const Write write = {
        plan,
        dtype,
        prologue,
        std::sqrt(float(channels)),
        at<const float>(gamma),
        at<const float>(bias),
        at<const void>(x),
        {at<const void>(before), at<const void>(after)},
        at<void>(out),
        {{at<char>(peer_before), at<char>(peer_after)}, slot_bytes, at<State>(state)},
    };
    if (device < 0) return write_cpu(write);
#ifdef COSMOS3_CUDA
    write_cuda(write, device, stream);
#else
    COSMOS3_CHECK(false,
                  "device " + text(device) + " asked for, but this build has no CUDA kernels");
#endif
}

void halo_wait(std::uintptr_t out, int dtype, int channels, int frames, int height, int width,
               int history, int left, int right, int top, int bottom, int axis,
               std::uintptr_t slots, int64_t slot_bytes, bool from_before, bool from_after,
               std::uintptr_t state, int64_t deadline_ns, int device,
               [[maybe_unused]] std::uintptr_t stream) {
    const Plan plan =
        make_plan({channels, frames, height, width}, history, {left, right, top, bottom}, axis);
    COSMOS3_CHECK(out && slots && state, "out, slots and state must not be null");
    COSMOS3_CHECK(slots % 16 == 0, "slots must be aligned to 16 bytes");
    COSMOS3_CHECK(deadline_ns >= 0, "deadline_ns must not be negative, got " + text(deadline_ns));
    const int element_bytes = bytes_of(dtype);
    check_slots(plan, element_bytes, slot_bytes);
    const Wait wait = {plan,
                       element_bytes,
                       at<void>(out),
                       at<char>(slots),
                       {from_before, from_after},
                       slot_bytes,
                       at<State>(state),
                       uint64_t(deadline_ns)};
    if (device < 0) return wait_cpu(wait);
#ifdef COSMOS3_CUDA
    wait_cuda(wait, device, stream);
#else
    COSMOS3_CHECK(false,
                  "device " + text(device) + " asked for, but this build has no CUDA kernels");
#endif
}

}  // namespace

void write_cpu(const Write& write) {
    if (write.dtype == kFloat32) return write_places<Float32>(write);
    if (write.dtype == kFloat16) return write_places<Float16>(write);
    write_places<Bfloat16>(write);
}

void wait_cpu(const Wait& wait) {
    const uint32_t epoch = wait.state->epoch + 1;
    const bool before = arrived(wait, kBefore, epoch), after = arrived(wait, kAfter, epoch);
    const int64_t bytes = int64_t(wait.plan.channels) * wait.element_bytes;
    for (int side = kBefore; side <= kAfter && before && after; ++side) {
        if (!wait.from[side]) continue;
        const char* slot = wait.slots + slot_offset(Side(side), epoch, wait.slot_bytes);
        for (int64_t i = 0; i < wait.plan.edge_places(Side(side)); ++i)
            std::memcpy(static_cast<char*>(wait.out) +
                            fill_place(wait.plan, Side(side), uint32_t(i)) * bytes,
                        slot + i * bytes, size_t(bytes));
    }
    wait.state->epoch = epoch;
}

}  // namespace cosmos3::halo

void bind_halo(pybind11::module_& module) {
    namespace py = pybind11;
    using namespace cosmos3::halo;
    module.def("halo_write", &halo_write, py::kw_only(), py::arg("x"), py::arg("out"),
               py::arg("gamma") = 0, py::arg("bias") = 0, py::arg("before") = 0,
               py::arg("after") = 0, py::arg("dtype"), py::arg("prologue"), py::arg("channels"),
               py::arg("frames"), py::arg("height"), py::arg("width"), py::arg("history"),
               py::arg("left"), py::arg("right"), py::arg("top"), py::arg("bottom"),
               py::arg("axis"), py::arg("peer_before") = 0, py::arg("peer_after") = 0,
               py::arg("slot_bytes") = 0, py::arg("state") = 0, py::arg("device"),
               py::arg("stream") = 0, py::call_guard<py::gil_scoped_release>());
    module.def("halo_wait", &halo_wait, py::kw_only(), py::arg("out"), py::arg("dtype"),
               py::arg("channels"), py::arg("frames"), py::arg("height"), py::arg("width"),
               py::arg("history"), py::arg("left"), py::arg("right"), py::arg("top"),
               py::arg("bottom"), py::arg("axis"), py::arg("slots"), py::arg("slot_bytes"),
               py::arg("from_before"), py::arg("from_after"), py::arg("state"),
               py::arg("deadline_ns"), py::arg("device"), py::arg("stream") = 0,
               py::call_guard<py::gil_scoped_release>());
    module.def("halo_buffer_bytes", &buffer_bytes, py::arg("slot_bytes"));
    module.attr("HALO_STATE_BYTES") = sizeof(State);
}
