// WKV-7 on the CPU: plain C ABI, loaded by wkv7_cpu.py with ctypes. Formulas in wkv7.h, those of the backward in
// wkv7_back.h.
//
// A job is one head of one lane. The forward walks the tokens with the state in the first-level cache, laid out [key]
// [value], so that the vectors go along values, which do not see each other. It keeps the state before every chunk, and
// what each token removed; with those the backward is products of small matrices.
#include "wkv7_back.h"

#include "wkv7.h"

namespace {  // wkv4_cpu.cpp has other structures of these names

template <class R, class S> struct Results {
    S* y;                         // [B,T,H,N]
    R *state, *saved, *removed;  // [B,H,N,N]; the last two, as in Gradients, null when no gradient is wanted
};

template <class R, class S> class Forward {
    const Inputs<R, S>& in;
    const Results<R, S>& out;
    const Place<R, S> place;
    const int64_t head, N;
    Scratch<R> scratch;
    R *const r, *const decay, *const k, *const v, *const a, *const b, *const y;  // [CHUNK + 1,N], of a chunk
    R *const state, *const removed;                                              // [N,N], [N]

  public:
    Forward(const Inputs<R, S>& in, const Results<R, S>& out, int64_t head)
        : in(in), out(out), place(in, head), head(head), N(in.N), scratch((7 * (CHUNK + 1) + N + 1) * N), r(row()),
          decay(row()), k(row()), v(row()), a(row()), b(row()), y(row()), state(scratch.take(N * N)),
          removed(scratch.take(N)) {}

    void all_tokens() {
        transpose(N, N, in.state + place.square, state);
        std::fill_n(removed, N, R(0));
        for (int64_t j = 0; j < N; j++)
            for (int64_t i = 0; i < N; i++) removed[i] += in.a[place.at(0) + j] * state[j * N + i];
        for (int64_t t0 = 0; t0 < in.T; t0 += CHUNK) {
            const int64_t n = in.T - t0 < CHUNK ? in.T - t0 : CHUNK;
            read(t0, n);
            if (out.saved) memcpy(out.saved + place.saved(t0, N), state, N * N * sizeof(R));
            constexpr int P = 4;
            if (N % (P * WIDTH<R>) == 0)
                for (int64_t i0 = 0; i0 < N; i0 += P * WIDTH<R>) walk<P>(t0, n, i0);
            else
                for (int64_t i0 = 0; i0 < N; i0 += WIDTH<R>) walk<1>(t0, n, i0);
            write(t0, n);
        }
        transpose(N, N, state, out.state + place.square);
    }

    // A single token, of which no gradient is wanted: the state stays as it lies, and the vectors go along keys.
    void one_token() {
        const R* from = in.state + place.lane * in.apart + head % in.H * N * N;
        R* to = out.state + place.square;
        if (place.opens(in, 0)) {
            memset(to, 0, size_t(N * N) * sizeof(R));
            from = to;
        }
        read(0, 1);
        for (int64_t i = 0; i < N; i += WIDTH<R>, from += WIDTH<R> * N, to += WIDTH<R> * N) {
            V<R> lost[WIDTH<R>] = {}, sums[WIDTH<R>] = {};
            for (int64_t j = 0; j < N; j += WIDTH<R>)
                for (int l = 0; l < WIDTH<R>; l++) lost[l] += get(from + l * N + j) * get(a + j);
            const V<R> removals = sum_each<R>(lost);
            for (int64_t j = 0; j < N; j += WIDTH<R>) {
                const V<R> decays = get(decay + j), bs = get(b + j), ks = get(k + j), rs = get(r + j);
                for (int l = 0; l < WIDTH<R>; l++) {
                    const V<R> all_removed = removals[l] - V<R>{}, value = v[i + l] - V<R>{};
                    const V<R> s = wkv7_step(get(from + l * N + j), decays, all_removed, bs, value, ks);
                    put(to + l * N + j, s);
                    sums[l] += s * rs;
                }
            }
            put(y + i, sum_each<R>(sums));
        }
        write(0, 1);
    }

  private:
    R* row() { return scratch.take((CHUNK + 1) * N); }

    void read(int64_t t0, int64_t n) {
        for (int64_t t = 0; t < n; t++) {
            const int64_t at = place.at(t0 + t), to = t * N;
            INDEPENDENT
            for (int64_t j = 0; j < N; j++) {
                r[to + j] = load(in.r[at + j]), k[to + j] = load(in.k[at + j]), v[to + j] = load(in.v[at + j]);
                decay[to + j] = wkv_exp(in.w[at + j]);
            }
            memcpy(a + to, in.a + at, N * sizeof(R));
            memcpy(b + to, in.b + at, N * sizeof(R));
        }
        const int64_t after = t0 + n < in.T ? t0 + n : t0;  // after the last one it is not used
        memcpy(a + n * N, in.a + place.at(after), N * sizeof(R));
    }

    void write(int64_t t0, int64_t n) {
        for (int64_t t = 0; t < n; t++) {
            S* to = out.y + place.at(t0 + t);
            INDEPENDENT
            for (int64_t i = 0; i < N; i++) store(to[i], y[t * N + i]);
        }
    }

    // The state's values from `state` on, of all keys: one step; y and what the next token removes are added up.
    template <int P>
    WKV_FN void token(int64_t N, const R* __restrict r, const R* __restrict decay, const R* __restrict k,
                      const R* __restrict after, const R* __restrict b, const V<R>* old, const V<R>* value,
                      R* __restrict state, V<R>* y, V<R>* next) {
        for (int64_t j = 0; j < N; j++)
            for (int p = 0; p < P; p++) {
                R* entry = state + j * N + p * WIDTH<R>;
                const V<R> s = wkv7_step(get(entry), decay[j], old[p], b[j], value[p], k[j]);
                put(entry, s);
                y[p] += s * r[j];
                next[p] += s * after[j];
            }
    }

    // The tokens of a chunk, for P vectors of values.
    template <int P> void walk(int64_t t0, int64_t n, int64_t i0) {
        V<R> old[P];
        for (int p = 0; p < P; p++) old[p] = get(removed + i0 + p * WIDTH<R>);
        for (int64_t t = 0; t < n; t++) {
            if (place.opens(in, t0 + t)) {
                for (int64_t j = 0; j < N; j++) memset(state + j * N + i0, 0, sizeof old);
                for (auto& o : old) o = V<R>{};
            }
            V<R> sum[P] = {}, next[P] = {}, value[P];
            for (int p = 0; p < P; p++) value[p] = get(v + t * N + i0 + p * WIDTH<R>);
            const int64_t at = t * N;
            token<P>(N, r + at, decay + at, k + at, a + at + N, b + at, old, value, state + i0, sum, next);
            for (int p = 0; p < P; p++) {
                const int64_t i = i0 + p * WIDTH<R>;
                if (out.removed) put(out.removed + place.at(t0 + t) + i, old[p]);
                put(y + t * N + i, sum[p]);
                old[p] = next[p];
            }
        }
        for (int p = 0; p < P; p++) put(removed + i0 + p * WIDTH<R>, old[p]);
    }
};

// Shares the heads out among the threads.
template <class R, class S, class Job> static void for_each_head(const Inputs<R, S>& in, int threads, Job job) {
    const int64_t worth_a_thread = 1 << 20;  // entries of states, 100 us of work or more
    share_out(in.B * in.H, threads, in.B * in.T * in.H * in.N * in.N / worth_a_thread, job);
}

template <class R, class S> static void run_forward(const Inputs<R, S>& in, const Results<R, S>& out, int threads) {
    if (in.T == 1 && !out.saved) {
        const int64_t heads = in.B * in.H;
        auto job = [&](int64_t head) { Forward<R, S>(in, out, head).one_token(); };
        return share_numbers(heads * in.N * in.N, heads, threads, job);
    }
    for_each_head(in, threads, [&](int64_t head) { Forward<R, S>(in, out, head).all_tokens(); });
}

}  // namespace

extern "C" {
#define FOR_TYPES(R, S, name)                                                                                   \
    void wkv7_forward_##name(const Inputs<R, S>* in, const Results<R, S>* out, int threads) {                   \
        run_forward(*in, *out, threads);                                                                        \
    }                                                                                                           \
    void wkv7_backward_##name(const Inputs<R, S>* in, const Gradients<R, S>* out, int threads) {                \
        for_each_head(*in, threads, [=](int64_t head) { Backward<R, S>(*in, *out, head); });                    \
    }
FOR_TYPES(float, float, f32)
FOR_TYPES(double, double, f64)
FOR_TYPES(float, Bf16, bf16)
}
