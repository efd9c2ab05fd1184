// What the kernels for the GPU share: numbers as they are stored, and as they are computed with.
//
// Macros of the build: WKV_X, how sequences are stored (Bf16, Half, float, double).
#pragma once

#ifndef WKV_HOST  // tests/wkv_host.h runs these kernels on a CPU and brings its own
#define MEMBER __device__ __forceinline__
#define WKV_FN static MEMBER
WKV_FN float wkv_exp(float x) { return exp2f(x); }  // to base 2, see LOG2E in wkv4_gpu.h
WKV_FN double wkv_exp(double x) { return exp2(x); }
WKV_FN float wkv_log(float x) { return __log2f(x); }
WKV_FN double wkv_log(double x) { return log2(x); }
WKV_FN float wkv_sqrt(float x) { return sqrtf(x); }
WKV_FN double wkv_sqrt(double x) { return sqrt(x); }
WKV_FN float wkv_below(float x) { return fminf(x, -x); }  // one instruction, -fabsf(x) is two
WKV_FN double wkv_below(double x) { return fmin(x, -x); }
WKV_FN float wkv_max(float x, float y) { return fmaxf(x, y); }
WKV_FN double wkv_max(double x, double y) { return fmax(x, y); }
WKV_FN unsigned bits_of(float x) { return __float_as_uint(x); }
WKV_FN float from_bits(unsigned x) { return __uint_as_float(x); }
WKV_FN float half_to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
WKV_FN unsigned short float_to_half(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Moves a pointer on, in one register: unseen, the compiler would keep the addresses of a whole row in registers.
template <class P> WKV_FN void advance(P*& p, long long by) {
    p += by;
    asm volatile("" : "+l"(p));
    __builtin_assume(__isGlobal(p));
}
WKV_FN void hide(long long& x) { asm volatile("" : "+l"(x)); }  // the same for an offset
// Of the thread whose number differs in this bit, 1 to 16.
template <class R> WKV_FN R exchange(R x, int bit) { return __shfl_xor_sync(~0u, x, bit); }
WKV_FN void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#endif

using Size = long long;
struct Bf16 { unsigned short bits; };
struct Half { unsigned short bits; };

WKV_FN float real(Bf16 x) { return from_bits(unsigned(x.bits) << 16); }
WKV_FN float real(Half x) { return half_to_float(x.bits); }
WKV_FN float real(float x) { return x; }
WKV_FN double real(double x) { return x; }

WKV_FN void store(float x, Bf16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned pair;  // of x and 0: the lower half of a register is stored as it is
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
    to.bits = pair;
#else
    const unsigned bits = bits_of(x), half = 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
    to.bits = x == x ? (bits + half) >> 16 : 0x7fff;
#endif
}
WKV_FN void store(float x, Half& to) { to.bits = float_to_half(x); }
WKV_FN void store(float x, float& to) { to = x; }
WKV_FN void store(double x, double& to) { to = x; }

using X = WKV_X;
using R = decltype(real(X()));

#define UNROLL _Pragma("unroll")
