// The element types of tensors as the CPU twins compute with them: widened to float, rounded to
// nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cosmos3 {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct Bfloat16 {
    uint16_t bits;
    float widen() const { return bits_to_float(uint32_t(bits) << 16); }
    static Bfloat16 narrow(float value) {
        const uint32_t raw = float_to_bits(value);
        if (std::isnan(value)) return {uint16_t(raw >> 16 | 0x40)};
        return {uint16_t((raw + 0x7fff + (raw >> 16 & 1)) >> 16)};
    }
};

struct Float16 {
    uint16_t bits;
    float widen() const {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31;
        const uint32_t mantissa = bits & 1023;
        if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
        if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
        return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
    }
    static Float16 narrow(float value) {
        const uint16_t sign = float_to_bits(value) >> 16 & 0x8000;
        const float size = std::fabs(value);
        if (std::isnan(value)) return {uint16_t(sign | 0x7e00)};
        if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
        // Adding the float whose last place is the wanted one rounds to nearest even.
        if (size < 0x1p-14f)
            return {uint16_t(sign | (float_to_bits(size + 0.5f) - float_to_bits(0.5f)))};
        const uint32_t raw = float_to_bits(size);
        return {uint16_t(sign | (((raw + 0xfff + (raw >> 13 & 1)) >> 13) - (112 << 10)))};
    }
};

struct Float32 {
    float value;
    float widen() const { return value; }
    static Float32 narrow(float value) { return {value}; }
};

}  // namespace cosmos3
