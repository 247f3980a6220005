// One function per op: it adds the op to the module, and is called by the table in bindings.cpp.
// Addresses come as integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

void bind_image(pybind11::module_& module);
void bind_halo(pybind11::module_& module);
void bind_noise(pybind11::module_& module);
void bind_sum(pybind11::module_& module);

namespace cosmos3 {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace cosmos3
