// WKV-4 on the CPU: plain C ABI, loaded by cpu.py with ctypes. Formulas in wkv4.h.
//
// A job is one lane and a block of neighbouring channels: it walks the tokens one by one, its state in arrays that stay
// in the first-level cache, and the loop over channels is vectorised. A block's width is a run-time number on purpose:
// with a constant one compilers unroll the loop before they get to vectorise it, several times slower.
#include "exp_log.h"
#include "jobs.h"
#include "storage.h"

template <class R> WKV_FN R wkv_below(R x) { return x > 0 ? -x : x; }
template <class R> WKV_FN R wkv_max(R x, R y) { return x > y ? x : y; }  // fmax is slower: it minds NaN

#include "wkv4.h"

namespace {  // wkv7_cpu.cpp has other structures of these names

// ---- walking the tokens

constexpr int WIDEST = 256;  // channels of a block

// R is what is computed with, S what k, v, y and their gradients are stored as.
template <class R, class S> struct Inputs {
    int64_t B, T, C;
    const R *w, *u;        // [C] each
    const S *k, *v;        // [B,T,C] each
    const R* state;        // [B,3,C]
    const uint8_t* reset;  // [B,T] or null
};

template <class R, class S> struct Results {
    S* y;           // [B,T,C]
    R* state;       // [B,3,C]
    R *exact, *lse;  // [B,T,C] each, y before it was rounded (where S is R, y); both null when no gradient is wanted
    int32_t* last;  // [B,C], the last token that renewed the exponent, -1 when none did
};

template <class R, class S> struct Gradients {
    const R *exact, *lse, *state;  // the results above
    const S* gy;                   // gradients that arrive on them
    const R* gstate;               // or null for zeros
    const int32_t* last;
    R *w, *u;    // [B,C] each, to be summed over B
    S *k, *v;    // [B,T,C] each
    R* initial;  // [B,3,C]
};

template <class R, class S, bool SAVE>
static void forward(const Inputs<R, S>& in, const Results<R, S>& out, int64_t lane, int64_t c0, int n) {
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
        constexpr bool ROUNDS = SAVE && sizeof(S) < sizeof(R);
        const S *k = in.k + at, *v = in.v + at;
        S* y = out.y + at;
        R *lse = SAVE ? out.lse + at : nullptr, *exact = ROUNDS ? out.exact + at : nullptr;
        INDEPENDENT
        for (int i = 0; i < n; i++) {
            const R ki = load(k[i]), vi = load(v[i]);
            Wkv4State<R> s = {a[i], b[i], e[i]};
            Wkv4Output<R> o = wkv4_out(u[i], ki, vi, s);
            store(y[i], o.y);
            if (ROUNDS) exact[i] = o.y;
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
template <class R, class S>
static void backward(const Inputs<R, S>& in, const Gradients<R, S>& g, int64_t lane, int64_t c0, int n) {
    R ga[WIDEST], gb[WIDEST], f[WIDEST], pa[WIDEST], pb[WIDEST], gw[WIDEST], gu[WIDEST], residual[WIDEST];
    const int32_t* last = g.last + lane * in.C + c0;
    const R *w = in.w + c0, *u = in.u + c0;
    const R* end = g.state + lane * 3 * in.C + c0;
    const R* gend = g.gstate ? g.gstate + lane * 3 * in.C + c0 : nullptr;
    for (int i = 0; i < n; i++) {
        Wkv4State<R> gs = {0, 0, 0};
        if (gend) gs = {gend[i], gend[in.C + i], gend[2 * in.C + i]};
        ga[i] = gs.a, gb[i] = gs.b, f[i] = -end[2 * in.C + i];
        pa[i] = pb[i] = gw[i] = gu[i] = 0;
        residual[i] = wkv4_residual<R>({end[i], end[in.C + i], end[2 * in.C + i]}, gs);
    }
    for (int64_t t = in.T; t-- > 0;) {
        const int64_t at = (lane * in.T + t) * in.C + c0;
        const S *k = in.k + at, *v = in.v + at, *gy = g.gy + at;
        const R *y = g.exact + at, *lse = g.lse + at;
        S *gk = g.k + at, *gv = g.v + at;
        INDEPENDENT
        for (int i = 0; i < n; i++) {
            Wkv4Adjoint<R> adjoint = {ga[i], gb[i], f[i], pa[i], pb[i]};
            Wkv4Grad<R> o = wkv4_back(w[i], u[i], load(k[i]), load(v[i]), y[i], lse[i], load(gy[i]), adjoint);
            store(gk[i], last[i] == t ? o.k + residual[i] : o.k), store(gv[i], o.v);
            gu[i] += o.u, gw[i] += o.w;
            ga[i] = adjoint.ga, gb[i] = adjoint.gb, f[i] = adjoint.f, pa[i] = adjoint.pa, pb[i] = adjoint.pb;
        }
        if (in.reset && in.reset[lane * in.T + t])
            for (int i = 0; i < n; i++) ga[i] = gb[i] = pa[i] = pb[i] = 0, f[i] = wkv_empty<R>();
    }
    const R* from = in.state + lane * 3 * in.C + c0;
    R* initial = g.initial + lane * 3 * in.C + c0;
    for (int i = 0; i < n; i++) {
        const int64_t b = in.C + i, e = 2 * in.C + i;
        const Wkv4State<R> s = {from[i], from[b], from[e]}, gs = wkv4_initial(s, ga[i], gb[i], f[i]);
        gw[i] += wkv4_close(s, {ga[i], gb[i], f[i], pa[i], pb[i]});
        initial[i] = gs.a, initial[b] = gs.b, initial[e] = gs.e;
        gw[i] += residual[i] * R(in.T - 1 - last[i]);  // from the last token on the exponent only decayed, by w a token
        if (last[i] < 0) initial[e] += residual[i];
        g.w[lane * in.C + c0 + i] = gw[i];
        g.u[lane * in.C + c0 + i] = gu[i];
    }
}

// ---- sharing the work out

// Calls job(lane, first channel, channels) for every lane and block, on up to `threads` threads.
template <class Job> static void for_each_block(int64_t B, int64_t T, int64_t C, int threads, Job job) {
    const int64_t worth_a_thread = 1 << 16;  // token-channels, 100 us of work or more
    const int64_t worth = B * T * C / worth_a_thread;
    int64_t width = WIDEST;
    while (width > 64 && B * ((C + width - 1) / width) < 2 * (worth < threads ? worth : threads)) width /= 2;
    const int64_t blocks = (C + width - 1) / width, jobs = B * blocks;
    share_out(jobs, threads, worth, [=](int64_t j) {
        const int64_t c0 = j % blocks * width;
        job(j / blocks, c0, int(C - c0 < width ? C - c0 : width));
    });
}

template <class R, class S> static void run_forward(const Inputs<R, S>* in, const Results<R, S>* out, int threads) {
    for_each_block(in->B, in->T, in->C, threads, [=](int64_t lane, int64_t c0, int n) {
        if (out->lse) forward<R, S, true>(*in, *out, lane, c0, n);
        else forward<R, S, false>(*in, *out, lane, c0, n);
    });
}

template <class R, class S> static void run_backward(const Inputs<R, S>* in, const Gradients<R, S>* g, int threads) {
    for_each_block(in->B, in->T, in->C, threads,
                   [=](int64_t lane, int64_t c0, int n) { backward(*in, *g, lane, c0, n); });
}

}  // namespace

extern "C" {
void wkv_use_team(void* parallel) { team = reinterpret_cast<decltype(team)>(parallel); }

#define FOR_TYPES(R, S, name)                                                                                        \
    void wkv4_forward_##name(const Inputs<R, S>* in, const Results<R, S>* out, int threads) {                        \
        run_forward(in, out, threads);                                                                               \
    }                                                                                                                \
    void wkv4_backward_##name(const Inputs<R, S>* in, const Gradients<R, S>* g, int threads) {                       \
        run_backward(in, g, threads);                                                                                \
    }
FOR_TYPES(float, float, f32)
FOR_TYPES(double, double, f64)
FOR_TYPES(float, Bf16, bf16)
}
