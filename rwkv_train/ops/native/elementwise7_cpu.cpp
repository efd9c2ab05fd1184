// What lies between the matrix products of RWKV-7's time mix, on the CPU: plain C ABI, loaded by elementwise7.py with
// ctypes. Formulas in elementwise7.py.
//
// A job is a few rows (tokens); it reads and writes every number in memory once. Arithmetic is in R, storage in S, as in
// elementwise_cpu.cpp. Gradients of parameters are summed over the rows of each job, and then by the caller over jobs.
#include <algorithm>
#include <cmath>
#include <memory>

#include "exp_log.h"
#include "jobs.h"
#include "storage.h"

namespace {

constexpr int64_t ROWS = 32;  // of a job
constexpr double FASTEST = 0.60653065971263342, SHORTEST = 1e-12, HEAD_NORM_EPS = 64e-5;  // as in elementwise7.py

// Sequences are [rows, heads * width]; members whose names begin with g are gradients.
struct Size {
    int64_t rows, heads, width;
    int64_t channels() const { return heads * width; }
};

// Calls head(at, c0, sums, buffer) for all heads of all rows, those of one job in order: number `at` of a sequence and
// number c0 of a parameter are its first. sums: where `parameters` gradients of [C] gather, c0 left behind, in totals
// [jobs, parameters, C]; buffer: room for `buffers` heads.
template <class R, class Head>
void for_heads(const Size& size, int threads, R* totals, int parameters, int buffers, Head head) {
    const int64_t C = size.channels();
    share_numbers(8 * size.rows * C, (size.rows + ROWS - 1) / ROWS, threads, [&](int64_t job) {
        std::unique_ptr<R[]> buffer(new R[buffers * size.width]);
        R* sums = totals + job * parameters * C;
        std::fill_n(sums, parameters * C, R(0));
        for (int64_t row = job * ROWS; row < size.rows && row < (job + 1) * ROWS; row++)
            for (int64_t c0 = 0; c0 < C; c0 += size.width) head(row * C + c0, c0, sums + c0, buffer.get());
    });
}

// sum of x[i] * y[i], or of x[i] where y is null
template <class R> WKV_FN R dot(int64_t n, const R* x, const R* y) {
    constexpr int WIDTH = REGISTER / sizeof(R);
    typedef R V __attribute__((vector_size(REGISTER)));
    V sum = {}, a, b = V{} + 1;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        memcpy(&a, x + i, sizeof a);
        if (y) memcpy(&b, y + i, sizeof b);
        sum += a * b;
    }
    R total = 0;
    for (; i < n; i++) total += y ? x[i] * y[i] : x[i];
    for (int l = 0; l < WIDTH; l++) total += sum[l];
    return total;
}

// ---- decay

template <class R, class S> struct Decay {
    Size size;
    const S* raw;
    const R* w0;
    R* w;
    const R* gw;
    S* graw;
    R* gw0;  // [jobs, C]
};

template <class R, class S> void decay(const Decay<R, S>& d, int threads) {
    const int64_t N = d.size.width;
    for_heads<R>(d.size, threads, nullptr, 0, 0, [&](int64_t at, int64_t c0, R*, R*) {
        const S* raw = d.raw + at;
        const R* w0 = d.w0 + c0;
        R* w = d.w + at;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) w[c] = -R(FASTEST) * sigmoid<R>(load(raw[c]) + w0[c]);
    });
}

template <class R, class S> void decay_back(const Decay<R, S>& d, int threads) {
    const int64_t N = d.size.width;
    for_heads(d.size, threads, d.gw0, 1, 0, [&](int64_t at, int64_t c0, R* gw0, R*) {
        const S* raw = d.raw + at;
        const R *w0 = d.w0 + c0, *gw = d.gw + at;
        S* graw = d.graw + at;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            const R s = sigmoid<R>(load(raw[c]) + w0[c]), g = -R(FASTEST) * gw[c] * s * (1 - s);
            store(graw[c], g);
            gw0[c] += g;
        }
    });
}

// ---- value residual

template <class R, class S> struct Residual {
    Size size;
    const S *v, *first, *raw;
    const R* v0;
    S* out;
    const S* gout;
    S *gv, *gfirst, *graw;
    R* gv0;  // [jobs, C]
};

template <class R, class S> void residual(const Residual<R, S>& d, int threads) {
    const int64_t N = d.size.width;
    for_heads<R>(d.size, threads, nullptr, 0, 0, [&](int64_t at, int64_t c0, R*, R*) {
        const S *v = d.v + at, *first = d.first + at, *raw = d.raw + at;
        const R* v0 = d.v0 + c0;
        S* out = d.out + at;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            const R own = load(v[c]);
            store(out[c], own + (load(first[c]) - own) * sigmoid<R>(load(raw[c]) + v0[c]));
        }
    });
}

template <class R, class S> void residual_back(const Residual<R, S>& d, int threads) {
    const int64_t N = d.size.width;
    for_heads(d.size, threads, d.gv0, 1, 0, [&](int64_t at, int64_t c0, R* gv0, R*) {
        const S *v = d.v + at, *first = d.first + at, *raw = d.raw + at, *gout = d.gout + at;
        const R* v0 = d.v0 + c0;
        S *gv = d.gv + at, *gfirst = d.gfirst + at, *graw = d.graw + at;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            const R s = sigmoid<R>(load(raw[c]) + v0[c]), g = load(gout[c]);
            const R slope = g * (load(first[c]) - load(v[c])) * s * (1 - s);
            store(gv[c], g * (1 - s));
            store(gfirst[c], g * s);
            store(graw[c], slope);
            gv0[c] += slope;
        }
    });
}

// ---- keys

template <class R, class S> struct Keys {
    Size size;
    const S *k, *raw;
    const R *a0, *k_k, *k_a;
    S* key;
    R *remove, *add;
    const S* gkey;
    const R *gremove, *gadd;
    S *gk, *graw;
    R* gparameters;  // [jobs, 3, C] of a0, k_k, k_a
};

// 1 over the length of a head's key, and whether that length is the key's own.
template <class R> WKV_FN R over_length(int64_t n, const R* u, bool& own) {
    const R length = std::sqrt(dot(n, u, u));
    own = !(length < R(SHORTEST));
    return 1 / (own ? length : R(SHORTEST));
}

template <class R, class S> void keys(const Keys<R, S>& d, int threads) {
    const int64_t N = d.size.width;
    for_heads<R>(d.size, threads, nullptr, 0, 1, [&](int64_t at, int64_t c0, R*, R* u) {
        const S *k = d.k + at, *raw = d.raw + at;
        const R *a0 = d.a0 + c0, *k_k = d.k_k + c0, *k_a = d.k_a + c0;
        S* key = d.key + at;
        R *remove = d.remove + at, *add = d.add + at;
        bool own;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) u[c] = load(k[c]) * k_k[c];
        const R shrink = over_length(N, u, own);
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            const R a = sigmoid<R>(load(raw[c]) + a0[c]), unit = u[c] * shrink;
            store(key[c], load(k[c]) * (1 + (a - 1) * k_a[c]));
            remove[c] = -unit;
            add[c] = unit * a;
        }
    });
}

template <class R, class S> void keys_back(const Keys<R, S>& d, int threads) {
    const int64_t C = d.size.channels(), N = d.size.width;
    for_heads(d.size, threads, d.gparameters, 3, 3, [&](int64_t at, int64_t c0, R* ga0, R* buffer) {
        const S *k = d.k + at, *raw = d.raw + at, *gkey = d.gkey + at;
        const R *a0 = d.a0 + c0, *k_k = d.k_k + c0, *k_a = d.k_a + c0, *gremove = d.gremove + at, *gadd = d.gadd + at;
        S *gk = d.gk + at, *graw = d.graw + at;
        R *gk_k = ga0 + C, *gk_a = gk_k + C, *u = buffer, *a = u + N, *gunit = a + N;
        bool own;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            u[c] = load(k[c]) * k_k[c];
            a[c] = sigmoid<R>(load(raw[c]) + a0[c]);
            gunit[c] = gadd[c] * a[c] - gremove[c];
        }
        const R shrink = over_length(N, u, own), along = own ? dot(N, u, gunit) * shrink * shrink : R(0);
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            const R key = load(k[c]), g = load(gkey[c]), gu = (gunit[c] - u[c] * along) * shrink;
            const R slope = (gadd[c] * u[c] * shrink + g * key * k_a[c]) * a[c] * (1 - a[c]);
            store(gk[c], g * (1 + (a[c] - 1) * k_a[c]) + gu * k_k[c]);
            store(graw[c], slope);
            ga0[c] += slope;
            gk_k[c] += gu * key;
            gk_a[c] += g * key * (a[c] - 1);
        }
    });
}

// ---- head norm, bonus and gate

template <class R, class S> struct Output {
    Size size;
    const S *y, *r, *k, *v, *gate;
    const R *r_k, *weight, *bias;
    S* out;
    const S* gout;
    S *gy, *gr, *gk, *gv, *ggate;
    R* gparameters;  // [jobs, 3, C] of r_k, weight, bias
};

// y of a head without its mean, in R; returns 1 over its standard deviation.
template <class R, class S> WKV_FN R centred(int64_t n, const S* y, R* out) {
    INDEPENDENT
    for (int64_t c = 0; c < n; c++) out[c] = load(y[c]);
    const R mean = dot<R>(n, out, nullptr) / n;
    INDEPENDENT
    for (int64_t c = 0; c < n; c++) out[c] -= mean;
    return 1 / std::sqrt(dot(n, out, out) / n + R(HEAD_NORM_EPS));
}

// r * k of a head, in R; returns its product with r_k, the bonus.
template <class R, class S> WKV_FN R match(int64_t n, const S* r, const S* k, const R* r_k, R* out) {
    INDEPENDENT
    for (int64_t c = 0; c < n; c++) out[c] = load(r[c]) * load(k[c]);
    return dot(n, out, r_k);
}

template <class R, class S> void output(const Output<R, S>& d, int threads) {
    const int64_t N = d.size.width;
    for_heads<R>(d.size, threads, nullptr, 0, 1, [&](int64_t at, int64_t c0, R*, R* x) {
        const S *v = d.v + at, *gate = d.gate + at;
        const R *weight = d.weight + c0, *bias = d.bias + c0;
        S* out = d.out + at;
        const R bonus = match<R>(N, d.r + at, d.k + at, d.r_k + c0, x), scale = centred<R>(N, d.y + at, x);
        INDEPENDENT
        for (int64_t c = 0; c < N; c++)
            store(out[c], (x[c] * scale * weight[c] + bias[c] + bonus * load(v[c])) * load(gate[c]));
    });
}

template <class R, class S> void output_back(const Output<R, S>& d, int threads) {
    const int64_t C = d.size.channels(), N = d.size.width;
    for_heads(d.size, threads, d.gparameters, 3, 4, [&](int64_t at, int64_t c0, R* gr_k, R* buffer) {
        const S *r = d.r + at, *k = d.k + at, *v = d.v + at, *gate = d.gate + at, *gout = d.gout + at;
        const R *r_k = d.r_k + c0, *weight = d.weight + c0, *bias = d.bias + c0;
        S *gy = d.gy + at, *gr = d.gr + at, *gk = d.gk + at, *gv = d.gv + at, *ggate = d.ggate + at;
        R *gweight = gr_k + C, *gbias = gweight + C, *x = buffer, *pair = x + N, *gx = pair + N, *gbonus = gx + N;
        const R bonus = match<R>(N, r, k, r_k, pair), scale = centred<R>(N, d.y + at, x);
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            const R arriving = load(gout[c]), value = load(v[c]), g = arriving * load(gate[c]);
            x[c] *= scale;
            store(ggate[c], arriving * (x[c] * weight[c] + bias[c] + bonus * value));
            store(gv[c], g * bonus);
            gweight[c] += g * x[c];
            gbias[c] += g;
            gx[c] = g * weight[c];
            gbonus[c] = g * value;
        }
        const R gmatch = dot<R>(N, gbonus, nullptr), gmean = dot<R>(N, gx, nullptr) / N, along = dot(N, gx, x) / N;
        INDEPENDENT
        for (int64_t c = 0; c < N; c++) {
            store(gy[c], scale * (gx[c] - gmean - x[c] * along));
            store(gr[c], gmatch * load(k[c]) * r_k[c]);
            store(gk[c], gmatch * load(r[c]) * r_k[c]);
            gr_k[c] += gmatch * pair[c];
        }
    });
}

}  // namespace

extern "C" {
#define FOR_TYPES(R, S, name)                                                                          \
    void decay_##name(const Decay<R, S>* d, int threads) { decay(*d, threads); }                       \
    void decay_back_##name(const Decay<R, S>* d, int threads) { decay_back(*d, threads); }             \
    void value_residual_##name(const Residual<R, S>* d, int threads) { residual(*d, threads); }        \
    void value_residual_back_##name(const Residual<R, S>* d, int threads) { residual_back(*d, threads); } \
    void keys_##name(const Keys<R, S>* d, int threads) { keys(*d, threads); }                          \
    void keys_back_##name(const Keys<R, S>* d, int threads) { keys_back(*d, threads); }                \
    void head_output_##name(const Output<R, S>* d, int threads) { output(*d, threads); }               \
    void head_output_back_##name(const Output<R, S>* d, int threads) { output_back(*d, threads); }
FOR_TYPES(float, float, f32)
FOR_TYPES(double, double, f64)
FOR_TYPES(float, Bf16, bf16)
}
