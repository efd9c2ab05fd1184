// Numbers as they are stored on the CPU: float and double as themselves, and bfloat16, computed with in float.
#pragma once
#include <cstdint>
#include <cstring>

struct Bf16 {
    uint16_t bits;
};

WKV_FN float load(float x) { return x; }
WKV_FN double load(double x) { return x; }
WKV_FN float load(Bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

WKV_FN void store(float& to, float x) { to = x; }
WKV_FN void store(double& to, double x) { to = x; }
WKV_FN void store(Bf16& to, float x) {  // to the nearest, ties to even; what is no number stays none
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    to.bits = uint16_t(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}
