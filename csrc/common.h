// The extension's two checks, the one exception they raise (Python: RuntimeError), the numbers of
// the dtypes, and the guard of the current device.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef COSMOS3_CUDA
#include <cuda_runtime.h>
#endif

namespace cosmos3 {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

class Error : public std::runtime_error {
public:
    Error(const std::string& what, const std::string& file, int line)
        : std::runtime_error(what + " (" + file.substr(file.rfind('/') + 1) + ":" +
                             std::to_string(line) + ")") {}
};

}  // namespace cosmos3

#define COSMOS3_CHECK(condition, message)                                        \
    do {                                                                         \
        if (!(condition)) throw ::cosmos3::Error((message), __FILE__, __LINE__); \
    } while (0)

namespace cosmos3 {

inline std::string text(int64_t number) { return std::to_string(number); }

inline int bytes_of(int dtype) {
    COSMOS3_CHECK(dtype >= kFloat32 && dtype <= kBfloat16,
                  "dtype must be 0, 1 or 2, got " + text(dtype));
    return dtype == kFloat32 ? 4 : 2;
}

}  // namespace cosmos3

#ifdef COSMOS3_CUDA
#define COSMOS3_CUDA_CHECK(call)                                                \
    do {                                                                        \
        const cudaError_t status_ = (call);                                     \
        COSMOS3_CHECK(status_ == cudaSuccess,                                   \
                      std::string(#call) + ": " + cudaGetErrorString(status_)); \
    } while (0)

namespace cosmos3 {

// Makes `device` current within a scope. The driver's current context belongs to the whole thread,
// torch's included: leaving another device current would send torch's next kernel there.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) : device_(device) {
        COSMOS3_CUDA_CHECK(cudaGetDevice(&before_));
        if (before_ != device_) COSMOS3_CUDA_CHECK(cudaSetDevice(device_));
    }
    ~DeviceGuard() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int device_, before_ = 0;
};

}  // namespace cosmos3
#endif
