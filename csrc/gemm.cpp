// out [M, N] = x [M, K] weight [N, K]^T (+ out), accumulated in float32, by cublasLtMatmul with an
// algorithm given by the caller, out of the cuBLASLt that torch has loaded: the module links none,
// so the product and torch's own come from one library. There is no CPU twin: torch runs there.
//
// cuBLASLt is column-major: it computes out^T [N, M] = (weight^T)^T x^T, so A is the weight [K, N]
// transposed, B is x^T [K, M], and C = D is out^T, in place.
#include "gemm.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <vector>

#include "bindings.h"
#include "common.h"

namespace cosmos3::gemm {
namespace {

#ifndef COSMOS3_CUDA
// Stands in for the guard of common.h: without CUDA there is no device to run on.
struct DeviceGuard {
    explicit DeviceGuard(int device) {
        COSMOS3_CHECK(false, "device " + std::to_string(device) +
                                 " asked for, but this build has no CUDA kernels");
    }
};
#endif

// M, N, K, the row strides of x, weight and out in elements, dtype (1 float16, 2 bfloat16), device.
using Problem = std::array<std::int64_t, 8>;
using Words = std::array<std::uint64_t, 8>;  // an Algorithm

template <typename Function>
void load(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    COSMOS3_CHECK(function != nullptr, std::string("cuBLASLt has no ") + name);
}

#define COSMOS3_LOAD(name) load(library, "cublasLt" #name, found.name)

Library load_all(void* library) {
    Library found = {};
    COSMOS3_LOAD(GetVersion);
    COSMOS3_LOAD(Create);
    COSMOS3_LOAD(MatmulDescCreate);
    COSMOS3_LOAD(MatmulDescSetAttribute);
    COSMOS3_LOAD(MatrixLayoutCreate);
    COSMOS3_LOAD(MatmulPreferenceCreate);
    COSMOS3_LOAD(MatmulPreferenceDestroy);
    COSMOS3_LOAD(MatmulPreferenceSetAttribute);
    COSMOS3_LOAD(MatmulAlgoGetHeuristic);
    COSMOS3_LOAD(MatmulAlgoCheck);
    COSMOS3_LOAD(MatmulAlgoConfigGetAttribute);
    COSMOS3_LOAD(MatmulAlgoConfigSetAttribute);
    COSMOS3_LOAD(Matmul);
    return found;
}

// The cuBLASLt of this process; null before something (torch) has loaded one.
const Library* loaded() {
    static std::mutex mutex;
    static Library found;
    static bool known = false;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
        if (known) break;
        if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) {
            found = load_all(library);
            known = true;
        }
    }
    return known ? &found : nullptr;
}

const Library& lt() {
    const Library* library = loaded();
    COSMOS3_CHECK(library != nullptr, "no libcublasLt.so.12 or .13 is loaded in this process");
    return *library;
}

#define COSMOS3_LT_CHECK(call)                                                         \
    do {                                                                               \
        const int status_ = lt().call;                                                 \
        COSMOS3_CHECK(status_ == kSuccess,                                             \
                      "cublasLt" #call ": cublasStatus_t " + std::to_string(status_)); \
    } while (0)

// 0 where no product can run: without a library, and in a build without CUDA.
std::int64_t get_version() {
#ifdef COSMOS3_CUDA
    if (const Library* library = loaded()) return static_cast<std::int64_t>(library->GetVersion());
#endif
    return 0;
}

// What a call needs besides pointers: the device's handle and the shape's descriptors.
struct Plan {
    Handle handle;
    Descriptor operation, a, b, c;
};

Descriptor layout(int type, std::int64_t rows, std::int64_t columns, std::int64_t leading) {
    Descriptor made = nullptr;
    COSMOS3_LT_CHECK(MatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(rows),
                                        static_cast<std::uint64_t>(columns), leading));
    return made;
}

Plan make_plan(const Problem& problem, Handle handle) {
    const auto [m, n, k, ldx, ldw, ldo, dtype, device] = problem;
    COSMOS3_CHECK(m > 0 && n > 0 && k > 0 && ldx >= k && ldw >= k && ldo >= n,
                  "sizes must be positive and rows must not overlap");
    COSMOS3_CHECK(dtype == 1 || dtype == 2,
                  "dtype must be 1 (float16) or 2 (bfloat16), got " + std::to_string(dtype));
    const int type = dtype == 1 ? kFloat16 : kBfloat16;
    Plan plan = {handle, nullptr, layout(type, k, n, ldw), layout(type, k, m, ldx),
                 layout(type, n, m, ldo)};
    COSMOS3_LT_CHECK(MatmulDescCreate(&plan.operation, kComputeFloat32, kFloat32));
    COSMOS3_LT_CHECK(
        MatmulDescSetAttribute(plan.operation, kDescTransposeA, &kTranspose, sizeof kTranspose));
    return plan;
}

// One handle a device and four descriptors a shape, made at the first use and kept as long as the
// process: about 1 KB for each shape an engine meets. The device must be current.
Plan plan_of(const Problem& problem) {
    static std::mutex mutex;
    static std::map<std::int64_t, Handle> handles;
    static std::map<Problem, Plan> plans;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = plans.find(problem);
    if (found != plans.end()) return found->second;
    Handle& handle = handles[problem.back()];
    if (!handle) COSMOS3_LT_CHECK(Create(&handle));
    return plans[problem] = make_plan(problem, handle);
}

Algorithm algorithm_of(const Words& words) {
    Algorithm algorithm;
    std::copy(words.begin(), words.end(), algorithm.data);
    return algorithm;
}

Words words_of(const Algorithm& algorithm) {
    Words words;
    std::copy(algorithm.data, algorithm.data + words.size(), words.begin());
    return words;
}

void prefer(Descriptor preference, std::uint64_t workspace_bytes) {
    const std::uint32_t alignment = 16;  // what gemm.py holds pointers and rows to
    COSMOS3_LT_CHECK(MatmulPreferenceSetAttribute(preference, kMaxWorkspaceBytes, &workspace_bytes,
                                                  sizeof workspace_bytes));
    COSMOS3_LT_CHECK(MatmulPreferenceSetAttribute(preference, kReductionMask, &kReduceInComputeType,
                                                  sizeof kReduceInComputeType));
    for (int operand = kMinAlignmentA; operand <= kMinAlignmentD; ++operand)
        COSMOS3_LT_CHECK(
            MatmulPreferenceSetAttribute(preference, operand, &alignment, sizeof alignment));
}

std::vector<Words> candidates(const Problem& problem, std::uint64_t workspace_bytes, int count) {
    COSMOS3_CHECK(count > 0, "count must be positive, got " + std::to_string(count));
    const DeviceGuard guard(static_cast<int>(problem.back()));
    const Plan plan = plan_of(problem);
    std::vector<HeuristicResult> results(static_cast<std::size_t>(count));
    Descriptor preference = nullptr;
    int returned = 0;
    COSMOS3_LT_CHECK(MatmulPreferenceCreate(&preference));
    prefer(preference, workspace_bytes);
    COSMOS3_LT_CHECK(MatmulAlgoGetHeuristic(plan.handle, plan.operation, plan.a, plan.b, plan.c,
                                            plan.c, preference, count, results.data(), &returned));
    COSMOS3_LT_CHECK(MatmulPreferenceDestroy(preference));
    std::vector<Words> found;
    for (int i = 0; i < returned; ++i)
        if (results[i].state == kSuccess) found.push_back(words_of(results[i].algorithm));
    return found;
}

std::int64_t workspace(const Problem& problem, const Words& words) {
    const DeviceGuard guard(static_cast<int>(problem.back()));
    const Plan plan = plan_of(problem);
    const Algorithm algorithm = algorithm_of(words);
    HeuristicResult result = {};
    const int status = lt().MatmulAlgoCheck(plan.handle, plan.operation, plan.a, plan.b, plan.c,
                                            plan.c, &algorithm, &result);
    return status == kSuccess ? static_cast<std::int64_t>(result.workspace_bytes) : -1;
}

std::array<std::int64_t, kAttributes> attributes(const Words& words) {
    const Algorithm algorithm = algorithm_of(words);
    std::array<std::int64_t, kAttributes> values = {};
    for (int i = 0; i < kAttributes; ++i) {
        std::uint32_t value = 0;  // the two shapes are 16-bit: the low half, as the host is little
        const std::size_t bytes = i == kInnerShape || i == kClusterShape ? 2 : 4;
        std::size_t written = 0;
        COSMOS3_LT_CHECK(MatmulAlgoConfigGetAttribute(&algorithm, i, &value, bytes, &written));
        values[static_cast<std::size_t>(i)] = value;
    }
    return values;
}

// An attribute that the algorithm does not have leaves it as it is; `workspace` says what runs.
Words vary(const Words& words, int attribute, std::uint32_t value) {
    COSMOS3_CHECK(attribute > 0 && attribute < kAttributes,
                  "attribute must be 1 to 8, got " + std::to_string(attribute));
    Algorithm algorithm = algorithm_of(words);
    const std::size_t bytes = attribute == kInnerShape || attribute == kClusterShape ? 2 : 4;
    const int status = lt().MatmulAlgoConfigSetAttribute(&algorithm, attribute, &value, bytes);
    return status == kSuccess ? words_of(algorithm) : words;
}

void run(const Problem& problem, const Words& words, bool accumulate, std::uintptr_t x,
         std::uintptr_t weight, std::uintptr_t out, std::uintptr_t workspace,
         std::uint64_t workspace_bytes, std::uintptr_t stream) {
    COSMOS3_CHECK(x && weight && out, "x, weight and out must not be null");
    COSMOS3_CHECK((x | weight | out | workspace) % 16 == 0, "addresses must be 16-byte aligned");
    COSMOS3_CHECK(workspace || !workspace_bytes, "a workspace of some size must not be null");
    const DeviceGuard guard(static_cast<int>(problem.back()));
    const Plan plan = plan_of(problem);
    const Algorithm algorithm = algorithm_of(words);
    const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    auto* const result = reinterpret_cast<void*>(out);
    COSMOS3_LT_CHECK(Matmul(
        plan.handle, plan.operation, &one, reinterpret_cast<const void*>(weight), plan.a,
        reinterpret_cast<const void*>(x), plan.b, &beta, result, plan.c, result, plan.c, &algorithm,
        reinterpret_cast<void*>(workspace), workspace_bytes, reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace cosmos3::gemm

void bind_gemm(pybind11::module_& module) {
    namespace py = pybind11;
    using namespace cosmos3::gemm;
    const auto free = py::call_guard<py::gil_scoped_release>();
    module.def("gemm_library", &get_version, free);
    module.def("gemm_candidates", &candidates, py::arg("problem"), py::arg("workspace_bytes"),
               py::arg("count"), free);
    module.def("gemm_workspace", &workspace, py::arg("problem"), py::arg("algorithm"), free);
    module.def("gemm_attributes", &attributes, py::arg("algorithm"), free);
    module.def("gemm_vary", &vary, py::arg("algorithm"), py::arg("attribute"), py::arg("value"),
               free);
    module.def("gemm_run", &run, py::kw_only(), py::arg("problem"), py::arg("algorithm"),
               py::arg("accumulate"), py::arg("x"), py::arg("weight"), py::arg("out"),
               py::arg("workspace") = 0, py::arg("workspace_bytes") = 0, py::arg("stream"), free);
}
