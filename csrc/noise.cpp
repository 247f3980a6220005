// numpy.random.RandomState(seed).standard_normal(count) as float32, bit for bit, on the host.
//
// MT19937 (Matsumoto & Nishimura 1998) seeded with init_genrand; two doubles of 53 bits make a
// point of the square, a point inside the unit circle makes two normals by Marsaglia's polar
// method, the second coordinate's first. The logarithm is libm's, as numpy's. CMakeLists.txt lets
// no product and sum of this file be fused, which would round once where numpy rounds twice.
//
// Which output a point becomes depends on how many points before it were kept, but the generator
// itself does not: the calling thread runs it ahead, which is a small part of the work, and leaves
// each thread the state at which its share of the points begins. The result is the same whatever
// their number.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <future>
#include <list>
#include <memory>

#include "bindings.h"
#include "common.h"

namespace cosmos3::noise {
namespace {

constexpr int kWords = 624, kShift = 397;
constexpr int kPoints = kWords / 4;            // of a block of words: none straddles two
constexpr double kKept = 0.78539816339745;     // area of the circle in the square: pi / 4
constexpr std::int64_t kBlocksPerThread = 16;  // fewer are made sooner than a thread is started

using State = std::array<std::uint32_t, kWords>;

State seeded(std::uint32_t seed) {
    State state;
    for (int i = 0; i < kWords; ++i) {
        state[i] = seed;
        seed = 1812433253u * (seed ^ (seed >> 30)) + i + 1;
    }
    return state;
}

std::uint32_t twisted(std::uint32_t word, std::uint32_t next, std::uint32_t far) {
    const std::uint32_t mixed = (word & 0x80000000u) | (next & 0x7fffffffu);
    return far ^ (mixed >> 1) ^ (-(mixed & 1u) & 0x9908b0dfu);
}

// The next 624 words; each loop's dependences are further apart than a vector is wide.
void advance(State& state) {
    std::uint32_t* s = state.data();
    for (int i = 0; i < kWords - kShift; ++i) s[i] = twisted(s[i], s[i + 1], s[i + kShift]);
    for (int i = kWords - kShift; i < kWords - 1; ++i)
        s[i] = twisted(s[i], s[i + 1], s[i + kShift - kWords]);
    s[kWords - 1] = twisted(s[kWords - 1], s[0], s[kShift - 1]);
}

std::uint32_t tempered(std::uint32_t word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
}

// The points of a block that lie inside the circle, in order, with their squared radii.
struct Points {
    double x1[kPoints], x2[kPoints], r2[kPoints];
    int count;
};

double coordinate(std::uint32_t high, std::uint32_t low) {  // in [-1, 1), exact
    const auto upper = static_cast<std::int32_t>(high >> 5);
    const auto lower = static_cast<std::int32_t>(low >> 6);
    return (upper * 67108864.0 + lower) * (2.0 / 9007199254740992.0) - 1.0;
}

void collect(const State& state, Points& points) {
    std::uint32_t words[kWords];
    for (int i = 0; i < kWords; ++i) words[i] = tempered(state[i]);
    double x[2 * kPoints], r2[kPoints];
    for (int i = 0; i < 2 * kPoints; ++i) x[i] = coordinate(words[2 * i], words[2 * i + 1]);
    for (int i = 0; i < kPoints; ++i) r2[i] = x[2 * i] * x[2 * i] + x[2 * i + 1] * x[2 * i + 1];
    int kept = 0;
    for (int i = 0; i < kPoints; ++i) {  // no branch: it would be mispredicted at every fifth
        points.x1[kept] = x[2 * i];
        points.x2[kept] = x[2 * i + 1];
        points.r2[kept] = r2[i];
        kept += (r2[i] < 1.0) & (r2[i] != 0.0);
    }
    points.count = kept;
}

// Two normals a point into out [2 * points.count].
void transform(Points& points, float* out) {
    double logs[kPoints];
    for (int i = 0; i < points.count; ++i) logs[i] = std::log(points.r2[i]);
    for (int i = 0; i < points.count; ++i) {
        const double f = std::sqrt(-2.0 * logs[i] / points.r2[i]);
        out[2 * i] = static_cast<float>(f * points.x2[i]);
        out[2 * i + 1] = static_cast<float>(f * points.x1[i]);
    }
}

// The normals of the next `blocks` blocks into out, at most `room` of them; returns their number.
std::int64_t generate(State& state, std::int64_t blocks, float* out, std::int64_t room) {
    Points points;
    float normals[2 * kPoints];
    std::int64_t made = 0;
    for (std::int64_t block = 0; block < blocks && made < room; ++block) {
        advance(state);
        collect(state, points);
        transform(points, normals);
        const auto count = std::min<std::int64_t>(2 * points.count, room - made);
        std::memcpy(out + made, normals, count * sizeof(float));
        made += count;
    }
    return made;
}

// Blocks made on another thread, whose place in the output only those before them decide.
struct Share {
    State state;
    std::unique_ptr<float[]> values;
    std::future<std::int64_t> count;

    Share(const State& start, std::int64_t blocks)
        : state(start), values(new float[blocks * 2 * kPoints]) {
        count = std::async(std::launch::async, [this, blocks] {
            return generate(state, blocks, values.get(), blocks * 2 * kPoints);
        });
    }
    Share(const Share&) = delete;
};

void legacy_normal(std::uint32_t seed, std::uintptr_t out, std::int64_t count, int threads) {
    COSMOS3_CHECK(count >= 0, "count must not be negative, got " + std::to_string(count));
    COSMOS3_CHECK(threads > 0, "threads must be positive, got " + std::to_string(threads));
    if (count == 0) return;
    COSMOS3_CHECK(out != 0, "out must not be null");
    auto* values = reinterpret_cast<float*>(out);
    const auto expected = static_cast<std::int64_t>(count / (kKept * 2 * kPoints));
    const auto shares = std::clamp<std::int64_t>(expected / kBlocksPerThread, 1, threads);
    const std::int64_t blocks = expected / shares;

    State first = seeded(seed), state = first;
    std::list<Share> others;
    for (std::int64_t i = 1; i < shares; ++i) {
        for (std::int64_t block = 0; block < blocks; ++block) advance(state);
        others.emplace_back(state, blocks);
    }
    std::int64_t made = generate(first, blocks, values, count);
    for (Share& share : others) {
        const std::int64_t more = std::min(share.count.get(), count - made);
        std::memcpy(values + made, share.values.get(), more * sizeof(float));
        made += more;
    }
    // As many points were kept as expected, give or take a few blocks' worth.
    generate(others.empty() ? first : others.back().state, count, values + made, count - made);
}

}  // namespace
}  // namespace cosmos3::noise

void bind_noise(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("legacy_normal", &cosmos3::noise::legacy_normal, py::arg("seed"), py::arg("out"),
               py::arg("count"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
               "out float32 [count] = the first normals of numpy's RandomState(seed).");
}
