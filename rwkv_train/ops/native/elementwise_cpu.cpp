// What lies between the matrix products, on the CPU: plain C ABI, loaded by elementwise.py with ctypes.
//
// Each pass reads and writes every number once; torch, which does one operation at a time, goes through memory several
// times more often. Arithmetic is in R, storage in S: float and double in themselves, and bfloat16 computed in float.
#include "exp_log.h"
#include "jobs.h"
#include "storage.h"

namespace {

const int64_t IGNORE_INDEX = -100;  // as in elementwise.py

// ---- each token mixed with the one before it

constexpr int MOST = 8;       // mixes at once
constexpr int WIDEST = 256;   // channels of a block
constexpr int TOKENS = 64;    // of a job

template <class R, class S> struct Mix {
    int64_t B, T, C, N;
    const R *x, *last;     // [B,T,C], [B,C] the token before the first
    const uint8_t* reset;  // [B,T] or null
    S* out;                // [N,B,T,C]
    const R* m[MOST];      // N times [C]
};

template <class R, class S> struct MixBack {
    const S* g[MOST];     // N times [B,T,C]
    const R* glast;       // [B,C], arrives on the last token
    R *x, *last, *m;      // [B,T,C], [B,C], [jobs,N,C] to be summed over jobs
};

WKV_FN int64_t jobs_of(int64_t B, int64_t T) { return B * ((T + TOKENS - 1) / TOKENS); }

// Calls row(lane, t, c0, n) for the tokens of a job in order, a block of channels after the other.
template <class Begin, class Row, class End>
void walk(int64_t T, int64_t C, int64_t job, Begin begin, Row row, End end) {
    const int64_t blocks = (T + TOKENS - 1) / TOKENS, lane = job / blocks, t0 = job % blocks * TOKENS;
    for (int64_t c0 = 0; c0 < C; c0 += WIDEST) {
        const int n = int(C - c0 < WIDEST ? C - c0 : WIDEST);
        begin(n);
        for (int64_t t = t0; t < T && t < t0 + TOKENS; t++) row(lane, t, c0, n);
        end(c0, n);
    }
}

// The token before token t of a lane; null where a document begins.
template <class R, class S> WKV_FN const R* before(const Mix<R, S>& in, int64_t lane, int64_t t) {
    if (in.reset && in.reset[lane * in.T + t]) return nullptr;
    return t ? in.x + (lane * in.T + t - 1) * in.C : in.last + lane * in.C;
}

template <class R, class S> void mix(const Mix<R, S>& in, int64_t job) {
    walk(in.T, in.C, job, [](int) {}, [&](int64_t lane, int64_t t, int64_t c0, int n) {
        const R zeros[WIDEST] = {}, *x = in.x + (lane * in.T + t) * in.C + c0, *old = before(in, lane, t);
        old = old ? old + c0 : zeros;
        for (int64_t i = 0; i < in.N; i++) {
            const R* m = in.m[i] + c0;
            S* out = in.out + ((i * in.B + lane) * in.T + t) * in.C + c0;
            INDEPENDENT
            for (int c = 0; c < n; c++) store(out[c], old[c] + m[c] * (x[c] - old[c]));
        }
    }, [](int64_t, int) {});
}

template <class R, class S> void mix_back(const Mix<R, S>& in, const MixBack<R, S>& out, int64_t job) {
    R gm[MOST][WIDEST];
    auto begin = [&](int n) {
        for (int64_t i = 0; i < in.N; i++)
            for (int c = 0; c < n; c++) gm[i][c] = 0;
    };
    auto row = [&](int64_t lane, int64_t t, int64_t c0, int n) {
        const int64_t at = (lane * in.T + t) * in.C + c0;
        const R zeros[WIDEST] = {}, *x = in.x + at, *old = before(in, lane, t);
        old = old ? old + c0 : zeros;
        const bool goes_on = t + 1 < in.T && !(in.reset && in.reset[lane * in.T + t + 1]);
        R sum[WIDEST];
        for (int c = 0; c < n; c++) sum[c] = t + 1 < in.T ? R(0) : out.glast[lane * in.C + c0 + c];
        for (int64_t i = 0; i < in.N; i++) {
            const R* m = in.m[i] + c0;
            const S *g = out.g[i] + at, *next = g + in.C;
            R* total = gm[i];
            INDEPENDENT
            for (int c = 0; c < n; c++) {
                const R here = load(g[c]);
                sum[c] += here * m[c];
                total[c] += here * (x[c] - old[c]);
            }
            if (!goes_on) continue;
            INDEPENDENT
            for (int c = 0; c < n; c++) sum[c] += load(next[c]) * (1 - m[c]);
        }
        for (int c = 0; c < n; c++) out.x[at + c] = sum[c];
        if (t) return;
        const bool opened = in.reset && in.reset[lane * in.T];
        for (int c = 0; c < n; c++) {
            R first = 0;
            for (int64_t i = 0; i < in.N && !opened; i++) first += load(out.g[i][at + c]) * (1 - in.m[i][c0 + c]);
            out.last[lane * in.C + c0 + c] = first;
        }
    };
    walk(in.T, in.C, job, begin, row, [&](int64_t c0, int n) {
        for (int64_t i = 0; i < in.N; i++)
            for (int c = 0; c < n; c++) out.m[(job * in.N + i) * in.C + c0 + c] = gm[i][c];
    });
}

template <class R, class S> void mix_all(const Mix<R, S>& in, int threads) {
    share_numbers(in.N * in.B * in.T * in.C, jobs_of(in.B, in.T), threads, [&](int64_t job) { mix(in, job); });
}

template <class R, class S> void mix_back_all(const Mix<R, S>& in, const MixBack<R, S>& out, int threads) {
    share_numbers(in.N * in.B * in.T * in.C, jobs_of(in.B, in.T), threads, [&](int64_t job) { mix_back(in, out, job); });
}

// ---- gates and the channel mix's activation, number by number

constexpr int64_t PIECE = 1 << 14;  // numbers of a job

template <class Each> void for_each(int64_t size, int threads, Each each) {
    share_numbers(size, (size + PIECE - 1) / PIECE, threads, [=](int64_t job) {
        const int64_t end = (job + 1) * PIECE < size ? (job + 1) * PIECE : size;
        INDEPENDENT
        for (int64_t i = job * PIECE; i < end; i++) each(i);
    });
}

template <class R, class S> void squared_relu(const S* x, S* y, int64_t size, int threads) {
    for_each(size, threads, [=](int64_t i) {
        const R a = load(x[i]), b = a > 0 ? a : R(0);
        store(y[i], a != a ? a : b * b);
    });
}

template <class R, class S> void squared_relu_back(const S* x, const S* g, S* gx, int64_t size, int threads) {
    for_each(size, threads, [=](int64_t i) {
        const R a = load(x[i]), b = 2 * a * load(g[i]);  // before the question: a load behind it would not vectorise
        store(gx[i], a > 0 ? b : R(0));
    });
}

template <class R, class S> void gate(const S* r, const S* y, S* out, int64_t size, int threads) {
    for_each(size, threads, [=](int64_t i) { store(out[i], sigmoid<R>(load(r[i])) * load(y[i])); });
}

template <class R, class S>
void gate_back(const S* r, const S* y, const S* g, S* gr, S* gy, int64_t size, int threads) {
    for_each(size, threads, [=](int64_t i) {
        const R s = sigmoid<R>(load(r[i])), at = load(g[i]);
        store(gr[i], at * load(y[i]) * s * (1 - s));
        store(gy[i], at * s);
    });
}

// ---- cross entropy

// Row by row: logits [N,V] become their gradient, nll [N] their cross entropy with targets [N].
template <class R, class S>
void cross_entropy(S* logits, const int64_t* targets, R* nll, int64_t N, int64_t V, double z_loss, int threads) {
    share_numbers(N * V, N, threads, [=](int64_t row) {
        S* l = logits + row * V;
        if (targets[row] == IGNORE_INDEX) {
            nll[row] = 0;
            for (int64_t i = 0; i < V; i++) store(l[i], R(0));
            return;
        }
        constexpr int WIDE = 64;  // maxima and sums side by side, so that they vectorise
        R top[WIDE], sum[WIDE];
        for (int c = 0; c < WIDE; c++) top[c] = -R(3e38), sum[c] = 0;
        const int64_t whole = V / WIDE * WIDE;
        for (int64_t i = 0; i < whole; i += WIDE)
            for (int c = 0; c < WIDE; c++) {
                const R x = load(l[i + c]);
                top[c] = x > top[c] ? x : top[c];
            }
        R most = -R(3e38);
        for (int c = 0; c < WIDE; c++) most = top[c] > most ? top[c] : most;
        for (int64_t i = whole; i < V; i++) most = load(l[i]) > most ? load(l[i]) : most;
        for (int64_t i = 0; i < whole; i += WIDE)
            for (int c = 0; c < WIDE; c++) sum[c] += wkv_exp(load(l[i + c]) - most);
        R total = 0;
        for (int c = 0; c < WIDE; c++) total += sum[c];
        for (int64_t i = whole; i < V; i++) total += wkv_exp(load(l[i]) - most);
        const R lse = total == total ? most + wkv_log(total) : total, wanted = load(l[targets[row]]);
        nll[row] = lse - wanted;
        int64_t likeliest = -1;
        for (int64_t i = 0; z_loss && likeliest < 0 && i < V; i++)
            if (load(l[i]) == most) likeliest = i;
        INDEPENDENT
        for (int64_t i = 0; i < V; i++) store(l[i], wkv_exp(load(l[i]) - lse));
        store(l[targets[row]], wkv_exp(wanted - lse) - 1);
        if (likeliest >= 0) store(l[likeliest], load(l[likeliest]) + R(z_loss) * most);
    });
}

}  // namespace

extern "C" {
#define FOR_TYPES(R, S, name)                                                                                        \
    void mix_##name(const Mix<R, S>* in, int threads) { mix_all(*in, threads); }                                     \
    void mix_back_##name(const Mix<R, S>* in, const MixBack<R, S>* out, int threads) {                               \
        mix_back_all(*in, *out, threads);                                                                            \
    }                                                                                                                \
    void squared_relu_##name(const S* x, S* y, int64_t size, int threads) { squared_relu<R>(x, y, size, threads); }  \
    void squared_relu_back_##name(const S* x, const S* g, S* gx, int64_t size, int threads) {                        \
        squared_relu_back<R>(x, g, gx, size, threads);                                                               \
    }                                                                                                                \
    void gate_##name(const S* r, const S* y, S* out, int64_t size, int threads) { gate<R>(r, y, out, size, threads); } \
    void gate_back_##name(const S* r, const S* y, const S* g, S* gr, S* gy, int64_t size, int threads) {             \
        gate_back<R>(r, y, g, gr, gy, size, threads);                                                                \
    }                                                                                                                \
    void cross_entropy_##name(S* l, const int64_t* t, R* nll, int64_t N, int64_t V, double z, int threads) {         \
        cross_entropy<R>(l, t, nll, N, V, z, threads);                                                               \
    }
FOR_TYPES(float, float, f32)
FOR_TYPES(double, double, f64)
FOR_TYPES(float, Bf16, bf16)
}
