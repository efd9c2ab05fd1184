// WKV-7 on the CPU: plain C ABI, loaded by cpu.py with ctypes. Formulas in wkv7.h.
//
// A job is one head of one lane. It walks the tokens with the state in the first-level cache, laid out [key][value], so
// that the vectors go along values, which do not see each other; what is summed over values is gathered for as many keys
// as a vector has lanes and then summed at once. The forward keeps the state before every chunk of `chunk` tokens; the
// backward runs a chunk's forward again, keeping all its states in the second-level cache, and then goes back over it.
#include <cstring>
#include <memory>

#include "jobs.h"
#include "wkv7.h"

namespace {  // wkv4_cpu.cpp has other structures of these names

template <class R> struct Wide;  // vectors as wide as registers, and the indices that shuffle them
template <> struct Wide<float> {
    typedef float V __attribute__((vector_size(REGISTER)));
    typedef int32_t Index __attribute__((vector_size(REGISTER)));
};
template <> struct Wide<double> {
    typedef double V __attribute__((vector_size(REGISTER)));
    typedef int64_t Index __attribute__((vector_size(REGISTER)));
};

template <class R> using V = typename Wide<R>::V;
template <class R> constexpr int WIDTH = sizeof(V<R>) / sizeof(R);

template <class R> struct Inputs {
    int64_t B, T, H, N, chunk, apart;            // N is a multiple of 16; from a lane's state to the next one's
    const R *r, *decay, *k, *v, *a, *b, *state;  // [B,T,H,N] each, decay = exp(w); [B,H,N,N]
    const uint8_t* reset;                        // [B,T] or null
};

template <class R> struct Results {
    R *y, *state;  // [B,T,H,N] [B,H,N,N]
    R* saved;      // [B,H,M,N,N] for M chunks, laid out as the kernel likes; null when no gradient is wanted
};

template <class R> struct Gradients {
    const R *gy, *gstate, *saved;         // those that arrive on the results
    R *r, *w, *k, *v, *a, *b, *initial;  // [B,T,H,N] each, [B,H,N,N]
};

// ---- vectors

template <class R> WKV_FN V<R> load(const R* from) {
    V<R> x;
    memcpy(&x, from, sizeof x);
    return x;
}

template <class R> WKV_FN void store(R* to, V<R> x) { memcpy(to, &x, sizeof x); }

// Halves of stretches of 2 * W lanes of x and y: the lower ones, x's before y's, or (UPPER) the upper ones.
template <class R, int W, bool UPPER> WKV_FN V<R> halves(V<R> x, V<R> y) {
    typename Wide<R>::Index index;
    for (int l = 0; l < WIDTH<R>; l++) index[l] = l % (2 * W) < W ? l + UPPER * W : l + WIDTH<R> - W + UPPER * W;
#ifdef __clang__  // which has no such builtin for an index that is a variable, and finds the instruction itself
    V<R> out;
    for (int l = 0; l < WIDTH<R>; l++) out[l] = index[l] < WIDTH<R> ? x[index[l]] : y[index[l] - WIDTH<R>];
    return out;
#else
    return __builtin_shuffle(x, y, index);
#endif
}

// Lane l of the result is the sum over the lanes of x[l]; x[0], ..., x[WIDTH - 1] are used up.
template <class R, int W = WIDTH<R> / 2> WKV_FN V<R> sum_each(V<R>* x) {
    for (int i = 0; i < W; i++) x[i] = halves<R, W, false>(x[i], x[i + W]) + halves<R, W, true>(x[i], x[i + W]);
    if constexpr (W > 1) return sum_each<R, W / 2>(x);
    else return x[0];
}

// ---- one head, block by block of P vectors of values

template <class R> struct Place {  // of a head in the tensors
    int64_t lane, first, stride, square;

    Place(const Inputs<R>& in, int64_t head)
        : lane(head / in.H), first((lane * in.T * in.H + head % in.H) * in.N), stride(in.H * in.N),
          square(head * in.N * in.N) {}
    int64_t at(int64_t t) const { return first + t * stride; }
    bool opens(const Inputs<R>& in, int64_t t) const { return in.reset && in.reset[lane * in.T + t]; }
};

template <class R> static std::unique_ptr<V<R>[]> scratch(int64_t n) { return std::unique_ptr<V<R>[]>(new V<R>[n]); }

// Rows i0, ... of a matrix [value][key], to and from vectors [key][P].
template <class R, int P> static void turn_in(const R* matrix, int64_t N, int64_t i0, V<R>* S) {
    for (int64_t j = 0; j < N; j++)
        for (int i = 0; i < P * WIDTH<R>; i++) S[j * P + i / WIDTH<R>][i % WIDTH<R>] = matrix[(i0 + i) * N + j];
}

template <class R, int P> static void turn_out(const V<R>* S, int64_t N, int64_t i0, R* matrix) {
    for (int64_t j = 0; j < N; j++)
        for (int i = 0; i < P * WIDTH<R>; i++) matrix[(i0 + i) * N + j] = S[j * P + i / WIDTH<R>][i % WIDTH<R>];
}

template <class R, int P> WKV_FN void times(const V<R>* S, const R* x, int64_t N, V<R>* out) {
    for (int p = 0; p < P; p++) out[p] = V<R>{};
    for (int64_t j = 0; j < N; j++)
        for (int p = 0; p < P; p++) out[p] += S[j * P + p] * x[j];
}

template <class R, int P, bool SAVE>
static void forward(const Inputs<R>& in, const Results<R>& out, int64_t head, int64_t i0) {
    const Place<R> place(in, head);
    const int64_t N = in.N, size = N * P;
    auto S = scratch<R>(size);
    V<R> removed[P], v[P];
    turn_in<R, P>(in.state + place.square, N, i0, S.get());
    times<R, P>(S.get(), in.a + place.at(0), N, removed);
    for (int64_t t = 0; t < in.T; t++) {
        if (SAVE && t % in.chunk == 0) {
            const int64_t M = (in.T + in.chunk - 1) / in.chunk;
            memcpy(out.saved + (head * M + t / in.chunk) * N * N + i0 * N, S.get(), size * sizeof(V<R>));
        }
        if (place.opens(in, t)) {
            memset(S.get(), 0, size * sizeof(V<R>));
            for (auto& x : removed) x = V<R>{};
        }
        const int64_t at = place.at(t), after = place.at(t + 1 < in.T ? t + 1 : t);
        V<R> y[P] = {}, next[P] = {};
        for (int p = 0; p < P; p++) v[p] = load(in.v + at + i0 + p * WIDTH<R>);
        for (int64_t j = 0; j < N; j++)
            for (int p = 0; p < P; p++) {
                V<R>& s = S[j * P + p];
                s = wkv7_step(s, in.decay[at + j], removed[p], in.b[at + j], v[p], in.k[at + j]);
                y[p] += s * in.r[at + j];
                next[p] += s * in.a[after + j];
            }
        for (int p = 0; p < P; p++) {
            store(out.y + at + i0 + p * WIDTH<R>, y[p]);
            removed[p] = next[p];
        }
    }
    turn_out<R, P>(S.get(), N, i0, out.state + place.square);
}

// A single token, of which no gradient is wanted: the state stays as it lies, and the vectors go along keys.
template <class R> static void one_token(const Inputs<R>& in, const Results<R>& out, int64_t head) {
    const Place<R> place(in, head);
    const int64_t N = in.N, at = place.at(0);
    const R* from = in.state + place.lane * in.apart + head % in.H * N * N;
    R* to = out.state + place.square;
    if (place.opens(in, 0)) {
        memset(to, 0, size_t(N * N) * sizeof(R));
        from = to;
    }
    for (int64_t i = 0; i < N; i += WIDTH<R>, from += WIDTH<R> * N, to += WIDTH<R> * N) {
        V<R> removed[WIDTH<R>] = {}, y[WIDTH<R>] = {};
        for (int64_t j = 0; j < N; j += WIDTH<R>)
            for (int l = 0; l < WIDTH<R>; l++) removed[l] += load(from + l * N + j) * load(in.a + at + j);
        const V<R> removals = sum_each<R>(removed);
        for (int64_t j = 0; j < N; j += WIDTH<R>) {
            const V<R> decay = load(in.decay + at + j), b = load(in.b + at + j), k = load(in.k + at + j);
            for (int l = 0; l < WIDTH<R>; l++) {
                const V<R> all_removed = removals[l] - V<R>{}, v = in.v[at + i + l] - V<R>{};
                const V<R> s = wkv7_step(load(from + l * N + j), decay, all_removed, b, v, k);
                store(to + l * N + j, s);
                y[l] += s * load(in.r + at + j);
            }
        }
        store(out.y + at + i, sum_each<R>(y));
    }
}

template <class R, int P> struct Backward {
    const Inputs<R>& in;
    const Gradients<R>& g;
    const Place<R> place;
    const int64_t i0, N, size;
    std::unique_ptr<V<R>[]> G, states, removals;  // gradient of the state; states before each token of a chunk

    Backward(const Inputs<R>& in, const Gradients<R>& g, int64_t head, int64_t i0)
        : in(in), g(g), place(in, head), i0(i0), N(in.N), size(N * P), G(scratch<R>(size)),
          states(scratch<R>((in.chunk + 1) * size)), removals(scratch<R>(in.chunk * P)) {
        const int64_t M = (in.T + in.chunk - 1) / in.chunk;
        turn_in<R, P>(g.gstate + place.square, N, i0, G.get());
        for (int64_t m = M; m-- > 0;) {
            const int64_t t0 = m * in.chunk, n = in.T - t0 < in.chunk ? in.T - t0 : in.chunk;
            memcpy(states.get(), g.saved + (head * M + m) * N * N + i0 * N, size * sizeof(V<R>));
            for (int64_t s = 0; s < n; s++) again(t0 + s, &states[s * size], &removals[s * P]);
            for (int64_t s = n; s-- > 0;) back(t0 + s, &states[s * size], &removals[s * P]);
        }
        turn_out<R, P>(G.get(), N, i0, g.initial + place.square);
    }

    // The first block of values writes, the others add.
    void add(R* to, V<R> x) const { store(to, i0 ? load(to) + x : x); }

    // The forward of a token, from S to the next of the states; its gradient of r, too.
    void again(int64_t t, V<R>* S, V<R>* removed) {
        const int64_t at = place.at(t);
        if (place.opens(in, t)) memset(S, 0, size * sizeof(V<R>));
        times<R, P>(S, in.a + at, N, removed);
        V<R> v[P], gy[P], old[P];
        for (int p = 0; p < P; p++) {
            v[p] = load(in.v + at + i0 + p * WIDTH<R>), gy[p] = load(g.gy + at + i0 + p * WIDTH<R>);
            old[p] = removed[p];
        }
        for (int64_t j0 = 0; j0 < N; j0 += WIDTH<R>) {
            V<R> gr[WIDTH<R>];
            for (int l = 0; l < WIDTH<R>; l++) {
                const int64_t j = j0 + l;
                gr[l] = V<R>{};
                for (int p = 0; p < P; p++) {
                    V<R> s = wkv7_step(S[j * P + p], in.decay[at + j], old[p], in.b[at + j], v[p], in.k[at + j]);
                    S[size + j * P + p] = s;
                    gr[l] += s * gy[p];
                }
            }
            add(g.r + at + j0, sum_each<R>(gr));
        }
    }

    // From the gradient of the state after a token to that of S, the state before it.
    void back(int64_t t, const V<R>* S, const V<R>* saved) {
        const int64_t at = place.at(t);
        V<R> v[P], gy[P], removed[P], gv[P] = {}, gremoved[P] = {};
        for (int p = 0; p < P; p++) {
            v[p] = load(in.v + at + i0 + p * WIDTH<R>), gy[p] = load(g.gy + at + i0 + p * WIDTH<R>);
            removed[p] = saved[p];
        }
        for (int64_t j0 = 0; j0 < N; j0 += WIDTH<R>) {
            V<R> gk[WIDTH<R>], gb[WIDTH<R>], gw[WIDTH<R>];
            for (int l = 0; l < WIDTH<R>; l++) {
                const int64_t j = j0 + l;
                gk[l] = gb[l] = gw[l] = V<R>{};
                for (int p = 0; p < P; p++) {
                    V<R> x = G[j * P + p] + gy[p] * in.r[at + j];
                    G[j * P + p] = x;
                    gv[p] += x * in.k[at + j];
                    gremoved[p] += x * in.b[at + j];
                    gk[l] += x * v[p];
                    gb[l] += x * removed[p];
                    gw[l] += x * S[j * P + p];
                }
            }
            add(g.k + at + j0, sum_each<R>(gk));
            add(g.b + at + j0, sum_each<R>(gb));
            add(g.w + at + j0, sum_each<R>(gw) * load(in.decay + at + j0));
        }
        for (int p = 0; p < P; p++) store(g.v + at + i0 + p * WIDTH<R>, gv[p]);
        for (int64_t j0 = 0; j0 < N; j0 += WIDTH<R>) {
            V<R> ga[WIDTH<R>];
            for (int l = 0; l < WIDTH<R>; l++) {
                const int64_t j = j0 + l;
                ga[l] = V<R>{};
                for (int p = 0; p < P; p++) {
                    ga[l] += S[j * P + p] * gremoved[p];
                    G[j * P + p] = wkv7_back(G[j * P + p], in.decay[at + j], gremoved[p], in.a[at + j]);
                }
            }
            add(g.a + at + j0, sum_each<R>(ga));
        }
        if (place.opens(in, t)) memset(G.get(), 0, size * sizeof(V<R>));
    }
};

// ---- sharing the work out

// Calls job(head, first value, P) for all blocks of all heads, those of one head in order.
template <class R, class Job> static void for_each_head(const Inputs<R>& in, int threads, Job job) {
    const int64_t worth_a_thread = 1 << 20;  // entries of states, 100 us of work or more
    const int64_t work = in.B * in.T * in.H * in.N * in.N / worth_a_thread;
    share_out(in.B * in.H, threads, work, [=](int64_t head) {
        if (in.N % (4 * WIDTH<R>) == 0)
            for (int64_t i0 = 0; i0 < in.N; i0 += 4 * WIDTH<R>) job(head, i0, std::integral_constant<int, 4>());
        else
            for (int64_t i0 = 0; i0 < in.N; i0 += WIDTH<R>) job(head, i0, std::integral_constant<int, 1>());
    });
}

template <class R> static void run_forward(const Inputs<R>* in, const Results<R>* out, int threads) {
    if (in->T == 1 && !out->saved) {
        const int64_t heads = in->B * in->H;
        return share_numbers(heads * in->N * in->N, heads, threads, [=](int64_t head) { one_token(*in, *out, head); });
    }
    for_each_head(*in, threads, [=](int64_t head, int64_t i0, auto P) {
        if (out->saved) forward<R, P.value, true>(*in, *out, head, i0);
        else forward<R, P.value, false>(*in, *out, head, i0);
    });
}

template <class R> static void run_backward(const Inputs<R>* in, const Gradients<R>* g, int threads) {
    for_each_head(*in, threads, [=](int64_t head, int64_t i0, auto P) { Backward<R, P.value>(*in, *g, head, i0); });
}

}  // namespace

extern "C" {
void wkv7_forward_f32(const Inputs<float>* in, const Results<float>* out, int threads) {
    run_forward(in, out, threads);
}
void wkv7_forward_f64(const Inputs<double>* in, const Results<double>* out, int threads) {
    run_forward(in, out, threads);
}
void wkv7_backward_f32(const Inputs<float>* in, const Gradients<float>* g, int threads) {
    run_backward(in, g, threads);
}
void wkv7_backward_f64(const Inputs<double>* in, const Gradients<double>* g, int threads) {
    run_backward(in, g, threads);
}
}
