// WKV-7 on the GPU: built by NVRTC at first use and launched by cuda7.py. Formulas in wkv7.h.
//
// Rows of the state do not see each other as it is carried forward, and nor do rows of its gradient as that is carried
// back. Columns do not either, once it is known for all tokens what was removed from the rows (`removed`, kept by the
// forward) and the gradient of that (`gremoved`). So there are four walks along the tokens, each of which has rows, or
// columns, in registers and hands no part of a matrix on to any other:
//
//   forward     rows of S, to the right      y, removed
//   gradients   rows of G, to the left       gv, gremoved
//   reads       columns of S, to the right   gr, ga
//   writes      columns of G, to the left    gk, gb, gw
//
// SHARE neighbouring threads share a row (a column is one, too) and hold P rows each; a block has some of the rows of
// one head. It fetches TILE tokens into shared memory, walks them, and flushes what came out. With few heads a thread
// holds one row, and more blocks are there for the multiprocessors; with many it holds two and reads half as much.
//
// Only gw needs S and G of the same token, as m_t = sum over rows of S_t G_t. But what two neighbouring tokens' m have
// between them the other gradients tell (both sides follow from the formulas of one token):
//
//   m_t = gw_t + b_t gb_t + k_t gk_t         m_{t-1} = gw_t + a_t ga_t + r_{t-1} gr_{t-1}
//
// `reads` writes the latter two terms, `between`, and every ANCHOR tokens a state, from which `writes` finds m anew, so
// that rounding errors do not add up. Nothing is divided by a decay, and no state is computed twice.
//
// r, k, v and y and their gradients are stored as WKV_X, all else as numbers are computed with. No atomics: every result
// is the same to the bit. Macros of the build, besides those of gpu.h: WKV_N, the head size, a multiple of 16; WKV_P.
#include "gpu.h"
#include "wkv7.h"

constexpr int N = WKV_N, P = WKV_P, SHARE = 4;
constexpr int E = N / SHARE;              // entries of a row that a thread holds
constexpr int ROOM = 2048 / sizeof(R);    // numbers of a tile
constexpr int TILE = ROOM / N > 16 ? 16 : ROOM / N > 1 ? ROOM / N : 1;
constexpr int ANCHOR = 64;                // in cuda7.py too
constexpr int PIECES = N % (32 * P) ? 1 : N / (32 * P);  // blocks of a head, in cuda7.py too
constexpr int ROWS = N / PIECES, THREADS = ROWS * SHARE / P, STEP = ROWS / P;

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

using Token = R[N];
using Rows = R[P][E];  // of S, G or their transposes
struct alignas(32) Tile {  // of tokens of a head, in shared memory
    Token tokens[TILE];
    MEMBER Token& operator[](int s) { return tokens[s]; }
    MEMBER const Token& operator[](int s) const { return tokens[s]; }
};

struct alignas(4 * sizeof(R)) Four { R x[4]; };

// Where a thread works: the block's rows begin at `first`, and the thread's are row, row + STEP, ...
struct Place {
    Size token, stride, matrix;  // of the head in a [B, T, H, N] and in a [B, H, N, N]
    Size head, lane;
    int first, row, quarter;

    MEMBER Place(Size T, Size H) {
        head = blockIdx.x / PIECES, lane = head / H;
        token = (lane * T * H + head % H) * N, stride = H * N, matrix = head * N * N;
        first = blockIdx.x % PIECES * ROWS, row = first + threadIdx.x / SHARE, quarter = threadIdx.x % SHARE;
    }
};

// Entry e of a thread is this one of the row: neighbours hold neighbouring fours.
WKV_FN int entry(const Place& p, int e) { return (e / 4 * SHARE + p.quarter) * 4 + e % 4; }

template <class From> WKV_FN void fetch(const From* from, const Place& p, int t, int n, Tile& to) {
    for (int i = threadIdx.x; i < n * N; i += THREADS)
        to[i / N][i % N] = real(from[p.token + (t + i / N) * p.stride + i % N]);
}

WKV_FN void fetch_decay(const R* w, const Place& p, int t, int n, Tile& to) {
    constexpr R LOG2E = R(1.4426950408889634);
    for (int i = threadIdx.x; i < n * N; i += THREADS)
        to[i / N][i % N] = wkv_exp(w[p.token + (t + i / N) * p.stride + i % N] * LOG2E);
}

// Whether tokens t, ... open a document.
WKV_FN void fetch_resets(const unsigned char* reset, const Place& p, int t, Size T, int n, bool (&to)[TILE]) {
    if (int(threadIdx.x) < n) to[threadIdx.x] = reset && reset[p.lane * T + t + threadIdx.x];
}

template <class To> WKV_FN void flush(const Tile& from, const Place& p, int t, int n, To* to) {
    for (int i = threadIdx.x; i < n * ROWS; i += THREADS)
        store(from[i / ROWS][p.first + i % ROWS], to[p.token + (t + i / ROWS) * p.stride + p.first + i % ROWS]);
}

// Rows of a matrix whose rows are `row` numbers apart, and entries `along`; N and 1, or 1 and N for its columns.
WKV_FN void get_rows(const R* from, const Place& p, int row, int along, Rows& to) {
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e++) to[i][e] = from[(p.row + i * STEP) * row + entry(p, e) * along];
}
WKV_FN void put_rows(const Rows& from, const Place& p, R* to) {
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e++) to[(p.row + i * STEP) * N + entry(p, e)] = from[i][e];
}
WKV_FN void empty(Rows& x) {
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e++) x[i][e] = 0;
}

WKV_FN Four four(const Token& token, const Place& p, int e) {
    return *reinterpret_cast<const Four*>(&token[entry(p, e)]);
}
// Of the thread's rows.
WKV_FN void scalars(const Token& token, const Place& p, R (&to)[P]) {
    UNROLL for (int i = 0; i < P; i++) to[i] = token[p.row + i * STEP];
}
WKV_FN void keep(const R (&from)[P], const Place& p, Token& token) {
    if (p.quarter == 0)
        UNROLL for (int i = 0; i < P; i++) token[p.row + i * STEP] = from[i];
}

// The rows times a vector, for all threads that share a row.
struct Sums {
    R x[P][4];

    MEMBER Sums() {
        UNROLL for (int i = 0; i < P; i++)
            UNROLL for (int j = 0; j < 4; j++) x[i][j] = 0;
    }
    MEMBER void total(R (&to)[P]) const {
        UNROLL for (int i = 0; i < P; i++) {
            R sum = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
            sum += exchange(sum, 1);
            to[i] = sum + exchange(sum, 2);
        }
    }
};

// y; the state after the last token, `end`; and, unless null, what is removed, [B, T, H, N].
KERNEL forward(Size T, Size H, const X* r_, const R* w_, const X* k_, const X* v_, const R* a_, const R* b_,
               const unsigned char* reset, const R* state, X* y_, R* end, R* removed_) {
    __shared__ Tile r, decay, k, v, a, b, y, removed;
    __shared__ bool opens[TILE];
    const Place p(T, H);
    Rows S;
    get_rows(state + p.matrix, p, N, 1, S);
    for (int t = 0; t < T; t += TILE) {
        const int n = T - t < TILE ? T - t : TILE;
        fetch(r_, p, t, n, r), fetch_decay(w_, p, t, n, decay), fetch(k_, p, t, n, k), fetch(v_, p, t, n, v);
        fetch(a_, p, t, n, a), fetch(b_, p, t, n, b), fetch_resets(reset, p, t, T, n, opens);
        __syncthreads();
        for (int s = 0; s < n; s++) {
            if (opens[s]) empty(S);
            R gone[P], vs[P], ys[P];
            scalars(v[s], p, vs);
            Sums before, after;
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four as = four(a[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++) before.x[i][j] += S[i][e + j] * as.x[j];
            }
            before.total(gone);
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four d = four(decay[s], p, e), bs = four(b[s], p, e), ks = four(k[s], p, e), rs = four(r[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++) {
                        S[i][e + j] = wkv7_step(S[i][e + j], d.x[j], gone[i], bs.x[j], vs[i], ks.x[j]);
                        after.x[i][j] += S[i][e + j] * rs.x[j];
                    }
            }
            after.total(ys);
            keep(ys, p, y[s]), keep(gone, p, removed[s]);
        }
        __syncthreads();
        flush(y, p, t, n, y_);
        if (removed_) flush(removed, p, t, n, removed_);
    }
    put_rows(S, p, end + p.matrix);
}

// gv, gremoved, and `initial`, the gradient of the state before the first token.
KERNEL gradients(Size T, Size H, const X* r_, const R* w_, const X* k_, const R* a_, const R* b_,
                 const unsigned char* reset, const X* gy_, const R* gstate, X* gv_, R* gremoved_, R* initial) {
    __shared__ Tile r, decay, k, a, b, gy, gv, gremoved;
    __shared__ bool opens[TILE];
    const Place p(T, H);
    Rows G;
    get_rows(gstate + p.matrix, p, N, 1, G);
    for (int t = (T - 1) / TILE * TILE; t >= 0; t -= TILE) {
        const int n = T - t < TILE ? T - t : TILE;
        fetch(r_, p, t, n, r), fetch_decay(w_, p, t, n, decay), fetch(k_, p, t, n, k), fetch(a_, p, t, n, a);
        fetch(b_, p, t, n, b), fetch(gy_, p, t, n, gy), fetch_resets(reset, p, t, T, n, opens);
        __syncthreads();
        for (int s = n - 1; s >= 0; s--) {
            R gys[P], gvs[P], gone[P];
            scalars(gy[s], p, gys);
            Sums by_k, by_b;
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four rs = four(r[s], p, e), ks = four(k[s], p, e), bs = four(b[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++) {
                        G[i][e + j] += gys[i] * rs.x[j];
                        by_k.x[i][j] += G[i][e + j] * ks.x[j], by_b.x[i][j] += G[i][e + j] * bs.x[j];
                    }
            }
            by_k.total(gvs), by_b.total(gone);
            keep(gvs, p, gv[s]), keep(gone, p, gremoved[s]);
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four d = four(decay[s], p, e), as = four(a[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++)
                        G[i][e + j] = wkv7_back(G[i][e + j], d.x[j], gone[i], as.x[j]);
            }
            if (opens[s]) empty(G);
        }
        __syncthreads();
        flush(gv, p, t, n, gv_), flush(gremoved, p, t, n, gremoved_);
    }
    put_rows(G, p, initial + p.matrix);
}

// gr, ga, `between` [B, T, H, N], and the columns of the state after every ANCHOR tokens, anchors [B, H, T / ANCHOR, N, N].
KERNEL reads(Size T, Size H, const X* r_, const R* w_, const X* k_, const X* v_, const R* a_, const R* b_,
             const unsigned char* reset, const R* state, const R* removed_, const X* gy_, const R* gremoved_, X* gr_,
             R* ga_, R* between_, R* anchors) {
    __shared__ Tile r, decay, k, v, a, b, removed, gy, gremoved, gr, ga, between;
    __shared__ bool opens[TILE];
    const Place p(T, H);
    Rows S;
    R read[P];  // r gr of the token before
    UNROLL for (int i = 0; i < P; i++) read[i] = 0;
    get_rows(state + p.matrix, p, 1, N, S);
    for (int t = 0; t < T; t += TILE) {
        const int n = T - t < TILE ? T - t : TILE;
        fetch(r_, p, t, n, r), fetch_decay(w_, p, t, n, decay), fetch(k_, p, t, n, k), fetch(v_, p, t, n, v);
        fetch(a_, p, t, n, a), fetch(b_, p, t, n, b), fetch_resets(reset, p, t, T, n, opens);
        fetch(removed_, p, t, n, removed), fetch(gy_, p, t, n, gy), fetch(gremoved_, p, t, n, gremoved);
        __syncthreads();
        for (int s = 0; s < n; s++) {
            if (opens[s]) empty(S);
            R ds[P], bs[P], ks[P], as[P], rs[P], gas[P], grs[P], sum[P];
            scalars(decay[s], p, ds), scalars(b[s], p, bs), scalars(k[s], p, ks);
            scalars(a[s], p, as), scalars(r[s], p, rs);
            Sums before, after;
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four gone = four(removed[s], p, e), vs = four(v[s], p, e);
                const Four ggone = four(gremoved[s], p, e), gys = four(gy[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++) {
                        before.x[i][j] += S[i][e + j] * ggone.x[j];
                        S[i][e + j] = wkv7_step(S[i][e + j], ds[i], gone.x[j], bs[i], vs.x[j], ks[i]);
                        after.x[i][j] += S[i][e + j] * gys.x[j];
                    }
            }
            before.total(gas), after.total(grs);
            UNROLL for (int i = 0; i < P; i++) sum[i] = as[i] * gas[i] + read[i], read[i] = rs[i] * grs[i];
            keep(gas, p, ga[s]), keep(grs, p, gr[s]), keep(sum, p, between[s]);
            if ((t + s + 1) % ANCHOR == 0) put_rows(S, p, anchors + (p.head * (T / ANCHOR) + (t + s) / ANCHOR) * N * N);
        }
        __syncthreads();
        flush(gr, p, t, n, gr_), flush(ga, p, t, n, ga_), flush(between, p, t, n, between_);
    }
}

// gk, gb and gw. `end` and `gstate` belong to the state after the last token.
KERNEL writes(Size T, Size H, const X* r_, const R* w_, const X* k_, const X* v_, const R* a_, const R* b_,
              const unsigned char* reset, const R* removed_, const X* gy_, const R* gremoved_, const R* between_,
              const R* anchors, const R* end, const R* gstate, X* gk_, R* gb_, R* gw_) {
    __shared__ Tile r, decay, k, v, a, b, removed, gy, gremoved, between, gk, gb, gw;
    __shared__ bool opens[TILE];
    const Place p(T, H);
    Rows G;
    R m[P] = {};
    get_rows(gstate + p.matrix, p, 1, N, G);
    for (int t = (T - 1) / TILE * TILE; t >= 0; t -= TILE) {
        const int n = T - t < TILE ? T - t : TILE;
        fetch(r_, p, t, n, r), fetch_decay(w_, p, t, n, decay), fetch(k_, p, t, n, k), fetch(v_, p, t, n, v);
        fetch(a_, p, t, n, a), fetch(b_, p, t, n, b), fetch_resets(reset, p, t, T, n, opens);
        fetch(removed_, p, t, n, removed), fetch(gy_, p, t, n, gy), fetch(gremoved_, p, t, n, gremoved);
        fetch(between_, p, t, n, between);
        __syncthreads();
        for (int s = n - 1; s >= 0; s--) {
            R ds[P], bs[P], ks[P], as[P], rs[P], steps[P], gks[P], gbs[P], gws[P];
            scalars(decay[s], p, ds), scalars(b[s], p, bs), scalars(k[s], p, ks);
            scalars(a[s], p, as), scalars(r[s], p, rs), scalars(between[s], p, steps);
            Sums by_v, by_removed;
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four gys = four(gy[s], p, e), vs = four(v[s], p, e), gone = four(removed[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++) {
                        G[i][e + j] += gys.x[j] * rs[i];
                        by_v.x[i][j] += G[i][e + j] * vs.x[j], by_removed.x[i][j] += G[i][e + j] * gone.x[j];
                    }
            }
            const bool last = t + s + 1 == T;
            if (last || (t + s + 1) % ANCHOR == 0) {
                const R* from = last ? end + p.matrix : anchors + (p.head * (T / ANCHOR) + (t + s) / ANCHOR) * N * N;
                Rows S;
                Sums both;
                last ? get_rows(from, p, 1, N, S) : get_rows(from, p, N, 1, S);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int e = 0; e < E; e++) both.x[i][e % 4] += S[i][e] * G[i][e];
                both.total(m);
            }
            by_v.total(gks), by_removed.total(gbs);
            UNROLL for (int i = 0; i < P; i++) {
                gws[i] = opens[s] ? R(0) : m[i] - (bs[i] * gbs[i] + ks[i] * gks[i]);
                m[i] = gws[i] + steps[i];
            }
            keep(gks, p, gk[s]), keep(gbs, p, gb[s]), keep(gws, p, gw[s]);
            UNROLL for (int e = 0; e < E; e += 4) {
                const Four ggone = four(gremoved[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++)
                        G[i][e + j] = wkv7_back(G[i][e + j], ds[i], ggone.x[j], as[i]);
            }
            if (opens[s]) empty(G);
        }
        __syncthreads();
        flush(gk, p, t, n, gk_), flush(gb, p, t, n, gb_), flush(gw, p, t, n, gw_);
    }
}
