// RWKV-7's operations that sum over a head: its keys, and what becomes of the operator's result. See elementwise7.py.
//
// GROUP neighbouring threads share a head, and hold E packs of it each. Sequences are stored as WKV_X, what the
// operator unlearns and parameters as numbers are computed with. Backwards compute anew whatever is no input.
#include "elementwise_gpu.h"

constexpr int N = WKV_N, PACKS = N / V;
// In elementwise7_cuda.py too.
constexpr int GROUP = PACKS > 16 ? 32 : PACKS > 8 ? 16 : PACKS > 4 ? 8 : PACKS > 2 ? 4 : PACKS;
constexpr int ABREAST = WIDTH / GROUP, E = (PACKS + GROUP - 1) / GROUP;
constexpr R NORM_EPS = R(64e-5), SHORTEST = R(1e-12);  // in elementwise7.py too

#define HEADS extern "C" __global__ void __launch_bounds__(WIDTH * ROWS, sizeof(R) * E * V <= 32 ? 2 : 1)
#define EACH UNROLL for (int e = 0; e < E; e++) UNROLL for (int j = 0; j < V; j++)

using Numbers = R[E][V];

// A thread's share of a head. All threads of a block walk equally many tokens, for they exchange sums; what is beyond
// the last token, head or pack is read as 0 and not written.
struct Share : Strip {
    Size C, begin;
    int packs;  // of this thread

    MEMBER Share(Size tokens, Size H, Size strip) : Strip(tokens, strip, (H + ABREAST - 1) / ABREAST), C(H * N) {
        const Size head = Size(group) * ABREAST + threadIdx.x / GROUP;
        const int lane = threadIdx.x % GROUP;
        begin = head * N + lane * V, packs = head < H ? (PACKS - lane + GROUP - 1) / GROUP : 0;
    }
    template <class T> MEMBER void load(const T* from, Size token, Numbers& to) const {
        UNROLL for (int e = 0; e < E; e++)
            if (e < packs && token < end) ::load(from + token * C + begin + e * GROUP * V, to[e]);
            else clear(to[e]);
    }
    MEMBER void load(const R* parameter, Numbers& to) const {
        UNROLL for (int e = 0; e < E; e++)
            if (e < packs) ::load(parameter + begin + e * GROUP * V, to[e]);
            else clear(to[e]);
    }
    template <class T> MEMBER void put(const Numbers& from, Size token, T* to) const {
        UNROLL for (int e = 0; e < E; e++)
            if (e < packs && token < end) ::put(from[e], to + token * C + begin + e * GROUP * V);
    }
    // A tile's sum of a parameter's gradient: number `which` of three, in sums [tiles, 3, C].
    MEMBER void put_sum(Numbers& x, int which, R* sums) const {
        UNROLL for (int e = 0; e < E; e++) {
            add_rows(x[e]);
            if (threadIdx.y == 0 && e < packs) ::put(x[e], sums + (tile * 3 + which) * C + begin + e * GROUP * V);
        }
    }
};

WKV_FN void clear(Numbers& x) { EACH x[e][j] = 0; }

// Sums over a head, known to all of its threads.
template <int K> WKV_FN void add_up(R (&x)[K]) {
    UNROLL for (int bit = 1; bit < GROUP; bit *= 2)
        UNROLL for (int i = 0; i < K; i++) x[i] += exchange(x[i], bit);
}

// What the state learns and unlearns under: `out`, and the operator's a and b, `remove` and `add`.
HEADS keys(Size tokens, Size H, Size strip, const X* k_, const X* raw_, const R* a0_, const R* k_k_, const R* k_a_,
           X* out, R* remove, R* add) {
    const Share p(tokens, H, strip);
    Numbers a0, k_k, k_a, k, raw;
    p.load(a0_, a0), p.load(k_k_, k_k), p.load(k_a_, k_a);
    for (Size i = 0; i < strip; i++) {
        const Size token = p.first + i;
        p.load(k_, token, k), p.load(raw_, token, raw);
        R square[1] = {0};
        EACH square[0] += k[e][j] * k_k[e][j] * (k[e][j] * k_k[e][j]);
        add_up(square);
        const R length = wkv_sqrt(square[0]), one = 1 / (length < SHORTEST ? SHORTEST : length);
        Numbers removed, added;
        EACH {
            const R a = sigmoid(raw[e][j] + a0[e][j]), kk = k[e][j] * k_k[e][j] * one;
            removed[e][j] = -kk, added[e][j] = kk * a, k[e][j] *= 1 + (a - 1) * k_a[e][j];
        }
        p.put(k, token, out), p.put(removed, token, remove), p.put(added, token, add);
    }
}

// gk, graw, and sums of the gradients of a0, k_k and k_a.
HEADS keys_back(Size tokens, Size H, Size strip, const X* k_, const X* raw_, const R* a0_, const R* k_k_,
                const R* k_a_, const X* gout_, const R* gremove_, const R* gadd_, X* gk, X* graw, R* sums) {
    const Share p(tokens, H, strip);
    Numbers a0, k_k, k_a, ga0, gk_k, gk_a;
    p.load(a0_, a0), p.load(k_k_, k_k), p.load(k_a_, k_a), clear(ga0), clear(gk_k), clear(gk_a);
    for (Size i = 0; i < strip; i++) {
        const Size token = p.first + i;
        Numbers k, raw, gout, gkk, gadd;
        p.load(k_, token, k), p.load(raw_, token, raw), p.load(gout_, token, gout);
        p.load(gremove_, token, gkk), p.load(gadd_, token, gadd);
        R sum[2] = {0, 0};  // of the squares of k k_k, and of k k_k times the gradient of kk
        EACH {
            const R u = k[e][j] * k_k[e][j];
            raw[e][j] = sigmoid(raw[e][j] + a0[e][j]), gkk[e][j] = gadd[e][j] * raw[e][j] - gkk[e][j];
            sum[0] += u * u, sum[1] += u * gkk[e][j];
        }
        add_up(sum);
        const R length = wkv_sqrt(sum[0]), one = 1 / (length < SHORTEST ? SHORTEST : length);
        const R along = length < SHORTEST ? R(0) : sum[1] * one * one;  // a length that is not divided by: no gradient
        EACH {
            const R a = raw[e][j], u = k[e][j] * k_k[e][j], gu = (gkk[e][j] - u * along) * one;
            const R ga = gadd[e][j] * u * one + gout[e][j] * k[e][j] * k_a[e][j];
            raw[e][j] = ga * a * (1 - a);
            ga0[e][j] += raw[e][j], gk_k[e][j] += gu * k[e][j], gk_a[e][j] += gout[e][j] * k[e][j] * (a - 1);
            k[e][j] = gu * k_k[e][j] + gout[e][j] * (1 + (a - 1) * k_a[e][j]);
        }
        p.put(k, token, gk), p.put(raw, token, graw);
    }
    p.put_sum(ga0, 0, sums), p.put_sum(gk_k, 1, sums), p.put_sum(gk_a, 2, sums);
}

// (norm(y) weight + bias + (sum of r k r_k) v) g.
HEADS head_output(Size tokens, Size H, Size strip, const X* y_, const X* r_, const X* k_, const X* v_, const X* g_,
                  const R* r_k_, const R* weight_, const R* bias_, X* out) {
    const Share p(tokens, H, strip);
    Numbers r_k, weight, bias;
    p.load(r_k_, r_k), p.load(weight_, weight), p.load(bias_, bias);
    for (Size i = 0; i < strip; i++) {
        const Size token = p.first + i;
        Numbers y, r, k, v, g;
        p.load(y_, token, y), p.load(r_, token, r), p.load(k_, token, k), p.load(v_, token, v), p.load(g_, token, g);
        R sum[2] = {0, 0}, square[1] = {0};
        EACH sum[0] += y[e][j], sum[1] += r[e][j] * k[e][j] * r_k[e][j];
        add_up(sum);
        EACH y[e][j] = e < p.packs ? y[e][j] - sum[0] / N : R(0), square[0] += y[e][j] * y[e][j];
        add_up(square);
        const R one = 1 / wkv_sqrt(square[0] / N + NORM_EPS);
        EACH y[e][j] = (y[e][j] * one * weight[e][j] + bias[e][j] + sum[1] * v[e][j]) * g[e][j];
        p.put(y, token, out);
    }
}

// The gradients of the sequences, and sums of those of r_k, weight and bias.
HEADS head_output_back(Size tokens, Size H, Size strip, const X* y_, const X* r_, const X* k_, const X* v_, const X* g_,
                       const R* r_k_, const R* weight_, const R* bias_, const X* gout_, X* gy, X* gr, X* gk, X* gv,
                       X* gg, R* sums) {
    const Share p(tokens, H, strip);
    Numbers r_k, weight, bias, gr_k, gweight, gbias;
    p.load(r_k_, r_k), p.load(weight_, weight), p.load(bias_, bias), clear(gr_k), clear(gweight), clear(gbias);
    for (Size i = 0; i < strip; i++) {
        const Size token = p.first + i;
        Numbers y, r, k, v, g, gout;
        p.load(y_, token, y), p.load(r_, token, r), p.load(k_, token, k), p.load(v_, token, v), p.load(g_, token, g);
        p.load(gout_, token, gout);
        R sum[4] = {0, 0, 0, 0}, square[2] = {0, 0};  // of y, the bonus, its gradient, and that of norm(y)
        EACH {
            const R d = gout[e][j] * g[e][j];
            sum[0] += y[e][j], sum[1] += r[e][j] * k[e][j] * r_k[e][j], sum[2] += d * v[e][j];
            sum[3] += d * weight[e][j];
        }
        add_up(sum);
        EACH {
            y[e][j] = e < p.packs ? y[e][j] - sum[0] / N : R(0);
            square[0] += y[e][j] * y[e][j], square[1] += y[e][j] * gout[e][j] * g[e][j] * weight[e][j];
        }
        add_up(square);
        const R one = 1 / wkv_sqrt(square[0] / N + NORM_EPS);
        const R along = square[1] * one * one / N, mean = sum[3] / N;
        EACH {
            const R d = gout[e][j] * g[e][j], rk = r[e][j] * k[e][j], bonus = sum[1] * v[e][j];
            g[e][j] = gout[e][j] * (y[e][j] * one * weight[e][j] + bias[e][j] + bonus);
            v[e][j] = d * sum[1];
            gr_k[e][j] += sum[2] * rk, gweight[e][j] += d * y[e][j] * one, gbias[e][j] += d;
            const R by = sum[2] * r_k[e][j], kept = r[e][j];
            r[e][j] = by * k[e][j], k[e][j] = by * kept;
            y[e][j] = (d * weight[e][j] - mean - y[e][j] * along) * one;
        }
        p.put(y, token, gy), p.put(r, token, gr), p.put(k, token, gk), p.put(v, token, gv), p.put(g, token, gg);
    }
    p.put_sum(gr_k, 0, sums), p.put_sum(gweight, 1, sums), p.put_sum(gbias, 2, sums);
}
