// The two checks of the extension and the one exception they raise; Python sees it as RuntimeError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef COSMOS3_CUDA
#include <cuda_runtime.h>
#endif

namespace cosmos3 {

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

#ifdef COSMOS3_CUDA
#define COSMOS3_CUDA_CHECK(call)                                                \
    do {                                                                        \
        const cudaError_t status_ = (call);                                     \
        COSMOS3_CHECK(status_ == cudaSuccess,                                   \
                      std::string(#call) + ": " + cudaGetErrorString(status_)); \
    } while (0)
#endif
