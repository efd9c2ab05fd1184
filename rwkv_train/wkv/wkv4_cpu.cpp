// WKV-4 on the CPU: plain C ABI, loaded by cpu.py with ctypes. Formulas in wkv4.h.
//
// A job is one lane and a block of neighbouring channels: it walks the tokens one by one, its state in arrays that stay
// in the first-level cache, and the loop over channels is vectorised. A block's width is a run-time number on purpose:
// with a constant one compilers unroll the loop before they get to vectorise it, several times slower.
#include <cstring>

#include "jobs.h"

// The iterations of the next loop do not depend on each other. Not `omp simd`: GCC then keeps the small structs of the
// loop's body in memory, and gives up on loops like ours.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

// ---- exp and log in plain arithmetic, because calls into the C library would stop the vectoriser

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

#include "wkv4.h"

namespace {  // wkv7_cpu.cpp has other structures of these names

// ---- walking the tokens

constexpr int WIDEST = 256;  // channels of a block

template <class R> struct Inputs {
    int64_t B, T, C;
    const R *w, *u, *k, *v, *state;  // [C] [C] [B,T,C] [B,T,C] [B,3,C]
    const uint8_t* reset;            // [B,T] or null
};

template <class R> struct Results {
    R *y, *state;   // [B,T,C] [B,3,C]
    R* lse;         // [B,T,C], null when no gradient is wanted
    int32_t* last;  // [B,C], the last token that renewed the exponent, -1 when none did
};

template <class R> struct Gradients {
    const R *y, *lse, *state, *gy, *gstate;  // the results above, and the gradients that arrive on them
    const int32_t* last;
    R *w, *u, *k, *v, *initial;  // [B,C] [B,C], to be summed over B; [B,T,C] [B,T,C] [B,3,C]
};

template <class R, bool SAVE>
static void forward(const Inputs<R>& in, const Results<R>& out, int64_t lane, int64_t c0, int n) {
    R a[WIDEST], b[WIDEST], e[WIDEST];
    int32_t last[WIDEST];
    const R *w = in.w + c0, *u = in.u + c0, *from = in.state + lane * 3 * in.C + c0;
    for (int i = 0; i < n; i++) {
        a[i] = from[i], b[i] = from[in.C + i], e[i] = from[2 * in.C + i];
        last[i] = -1;
    }
    for (int64_t t = 0; t < in.T; t++) {
        if (in.reset && in.reset[lane * in.T + t])
            for (int i = 0; i < n; i++) a[i] = 0, b[i] = 0, e[i] = wkv_empty<R>();
        const int64_t at = (lane * in.T + t) * in.C + c0;
        const R *k = in.k + at, *v = in.v + at;
        R *y = out.y + at, *lse = SAVE ? out.lse + at : nullptr;
        INDEPENDENT
        for (int i = 0; i < n; i++) {
            const R ki = k[i], vi = v[i];
            Wkv4State<R> s = {a[i], b[i], e[i]};
            Wkv4Output<R> o = wkv4_out(u[i], ki, vi, s);
            y[i] = o.y;
            if (SAVE) lse[i] = wkv4_lse(o);
            if (SAVE) last[i] = w[i] + s.e > ki ? last[i] : int32_t(t);
            wkv4_step(w[i], ki, vi, s);
            a[i] = s.a, b[i] = s.b, e[i] = s.e;
        }
    }
    R* to = out.state + lane * 3 * in.C + c0;
    for (int i = 0; i < n; i++) {
        to[i] = a[i], to[in.C + i] = b[i], to[2 * in.C + i] = e[i];
        if (SAVE) out.last[lane * in.C + c0 + i] = last[i];
    }
}

// From y and lse alone: no replay of the forward, no saved states.
template <class R> static void backward(const Inputs<R>& in, const Gradients<R>& g, int64_t lane, int64_t c0, int n) {
    R ga[WIDEST], gb[WIDEST], f[WIDEST], pa[WIDEST], pb[WIDEST], gw[WIDEST], gu[WIDEST];
    const R *w = in.w + c0, *u = in.u + c0;
    const R *end = g.state + lane * 3 * in.C + c0, *gend = g.gstate + lane * 3 * in.C + c0;
    for (int i = 0; i < n; i++) {
        ga[i] = gend[i], gb[i] = gend[in.C + i], f[i] = -end[2 * in.C + i];
        pa[i] = pb[i] = gw[i] = gu[i] = 0;
    }
    for (int64_t t = in.T; t-- > 0;) {
        const int64_t at = (lane * in.T + t) * in.C + c0;
        const R *k = in.k + at, *v = in.v + at, *y = g.y + at, *lse = g.lse + at, *gy = g.gy + at;
        R *gk = g.k + at, *gv = g.v + at;
        INDEPENDENT
        for (int i = 0; i < n; i++) {
            Wkv4Adjoint<R> adjoint = {ga[i], gb[i], f[i], pa[i], pb[i]};
            Wkv4Grad<R> o = wkv4_back(w[i], u[i], k[i], v[i], y[i], lse[i], gy[i], adjoint);
            gk[i] = o.k, gv[i] = o.v, gu[i] += o.u, gw[i] += o.w;
            ga[i] = adjoint.ga, gb[i] = adjoint.gb, f[i] = adjoint.f, pa[i] = adjoint.pa, pb[i] = adjoint.pb;
        }
        if (in.reset && in.reset[lane * in.T + t])
            for (int i = 0; i < n; i++) ga[i] = gb[i] = pa[i] = pb[i] = 0, f[i] = wkv_empty<R>();
    }
    const R* from = in.state + lane * 3 * in.C + c0;
    R* initial = g.initial + lane * 3 * in.C + c0;
    for (int i = 0; i < n; i++) {
        const int64_t b = in.C + i, e = 2 * in.C + i;
        const R scale = wkv_exp(wkv_clamp(f[i] + from[e]));
        gw[i] += scale * (pa[i] * from[i] + pb[i] * from[b]);
        initial[i] = scale * ga[i], initial[b] = scale * gb[i];
        initial[e] = initial[i] * from[i] + initial[b] * from[b];
        const R residual = wkv4_residual<R>({end[i], end[b], end[e]}, {gend[i], gend[b], gend[e]});
        const int64_t last = g.last[lane * in.C + c0 + i];  // from there on the exponent only decayed, by w a token
        gw[i] += residual * R(in.T - 1 - last);
        (last < 0 ? initial[e] : g.k[(lane * in.T + last) * in.C + c0 + i]) += residual;
        g.w[lane * in.C + c0 + i] = gw[i];
        g.u[lane * in.C + c0 + i] = gu[i];
    }
}

// ---- sharing the work out

// Calls job(lane, first channel, channels) for every lane and block, on up to `threads` threads.
template <class Job> static void for_each_block(int64_t B, int64_t T, int64_t C, int threads, Job job) {
    const int64_t worth_a_thread = 1 << 16;  // token-channels, 100 us of work or more; starting a thread costs 25 us
    if (threads > B * T * C / worth_a_thread) threads = int(B * T * C / worth_a_thread);
    int64_t width = WIDEST;
    while (width > 64 && B * ((C + width - 1) / width) < 2 * threads) width /= 2;
    const int64_t blocks = (C + width - 1) / width, jobs = B * blocks;
    share_out(jobs, threads, [=](int64_t j) {
        const int64_t c0 = j % blocks * width;
        job(j / blocks, c0, int(C - c0 < width ? C - c0 : width));
    });
}

template <class R> static void run_forward(const Inputs<R>* in, const Results<R>* out, int threads) {
    for_each_block(in->B, in->T, in->C, threads, [=](int64_t lane, int64_t c0, int n) {
        if (out->lse) forward<R, true>(*in, *out, lane, c0, n);
        else forward<R, false>(*in, *out, lane, c0, n);
    });
}

template <class R> static void run_backward(const Inputs<R>* in, const Gradients<R>* g, int threads) {
    for_each_block(in->B, in->T, in->C, threads,
                   [=](int64_t lane, int64_t c0, int n) { backward(*in, *g, lane, c0, n); });
}

}  // namespace

extern "C" {
void wkv4_forward_f32(const Inputs<float>* in, const Results<float>* out, int threads) {
    run_forward(in, out, threads);
}
void wkv4_forward_f64(const Inputs<double>* in, const Results<double>* out, int threads) {
    run_forward(in, out, threads);
}
void wkv4_backward_f32(const Inputs<float>* in, const Gradients<float>* g, int threads) {
    run_backward(in, g, threads);
}
void wkv4_backward_f64(const Inputs<double>* in, const Gradients<double>* g, int threads) {
    run_backward(in, g, threads);
}
}
