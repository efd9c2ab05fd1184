// exp and log in plain arithmetic, because calls into the C library would stop the vectoriser.
#pragma once
#include <cstdint>
#include <cstring>

#include "jobs.h"

template <class R> struct Format;

template <> struct Format<float> {
    using Bits = uint32_t;
    static constexpr int mantissa = 23, bias = 127, exp_degree = 7, log_degree = 4;
    static constexpr float lowest = -87;  // exp is 0 below: its result would be no normal number
    // log(2) in two parts; the first has few bits, so that its products with an exponent are exact
    static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.4286068203094173e-06f;
};

template <> struct Format<double> {
    using Bits = uint64_t;
    static constexpr int mantissa = 52, bias = 1023, exp_degree = 13, log_degree = 10;
    static constexpr double lowest = -708;
    static constexpr double ln2_high = 0.6931471805592082, ln2_low = 7.371002565167799e-13;
};

template <class R> WKV_FN typename Format<R>::Bits bits_of(R x) {
    typename Format<R>::Bits bits;
    memcpy(&bits, &x, sizeof x);
    return bits;
}

template <class R> WKV_FN R from_bits(typename Format<R>::Bits bits) {
    R x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// COEFFICIENT(i) x^i for i = FIRST, FIRST + STEP, ... <= LAST, summed and divided by x^FIRST, given power = x^STEP.
// Even and odd terms apart: that makes short chains of dependent operations, and the processor does several at once.
template <double COEFFICIENT(int), int FIRST, int LAST, int STEP = 1, class R> WKV_FN R series(R power) {
    if constexpr (FIRST + STEP > LAST) {
        constexpr R coefficient = R(COEFFICIENT(FIRST));
        return coefficient;
    } else {
        return series<COEFFICIENT, FIRST, LAST, 2 * STEP>(power * power) +
               power * series<COEFFICIENT, FIRST + STEP, LAST, 2 * STEP>(power * power);
    }
}

constexpr double exp_coefficient(int i) { return i > 1 ? exp_coefficient(i - 1) / i : 1.0; }  // 1 / i!
constexpr double atanh_coefficient(int i) { return 1.0 / (2 * i + 1); }  // in powers of x^2, over x

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2
template <class R> WKV_FN R wkv_exp(R x) {
    using F = Format<R>;
    constexpr R shifter = R(3) * (typename F::Bits(1) << (F::mantissa - 1));  // adding it rounds to an integer
    R bounded = x < F::lowest ? F::lowest : x;
    R shifted = bounded * R(1.4426950408889634) + shifter, n = shifted - shifter;
    R r = (bounded - n * F::ln2_high) - n * F::ln2_low;
    R scaled = from_bits<R>(bits_of(series<exp_coefficient, 0, F::exp_degree>(r)) + (bits_of(shifted) << F::mantissa));
    return x < F::lowest ? R(0) : scaled;
}

// log(x) = n log(2) + 2 atanh(s), s = (m - 1) / (m + 1), with m between sqrt(1/2) and sqrt(2), so that |s| < 0.172
template <class R> WKV_FN R wkv_log(R x) {
    using F = Format<R>;
    using Bits = typename F::Bits;
    constexpr Bits one = Bits(1) << F::mantissa;
    const Bits to_half = F::bias * one - bits_of(R(0.70710678118654752));
    Bits power = (bits_of(x) + to_half) >> F::mantissa;  // n + bias
    R m = from_bits<R>(bits_of(x) - (power << F::mantissa) + F::bias * one);
    // the integer as the low bits of 2^mantissa: AVX2 cannot convert 64-bit integers to double
    R n = from_bits<R>(power | ((F::bias + F::mantissa) * one)) - R(one + F::bias);
    R s = (m - 1) / (m + 1);
    return n * F::ln2_high + (2 * s * series<atanh_coefficient, 0, F::log_degree>(s * s) + n * F::ln2_low);
}

template <class R> WKV_FN R sigmoid(R x) {
    const R e = wkv_exp(x < 0 ? x : -x);  // at most 1
    return (x < 0 ? e : R(1)) / (1 + e);
}
