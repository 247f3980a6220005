// One function per op: it adds the op to the module, and is called by the table in bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_image(pybind11::module_& module);
void bind_halo(pybind11::module_& module);
void bind_noise(pybind11::module_& module);
