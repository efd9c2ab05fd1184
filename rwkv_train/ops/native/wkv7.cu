// WKV-7 on the GPU: built by NVRTC at first use and launched by wkv7_cuda.py. Formulas in wkv7.h.
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
// SHARE threads of a warp share a row (a column is one, too) and hold P rows each; a block has some of the rows of one
// head. It walks TILE tokens that are in shared memory, while the next ones are on their way to registers, and flushes
// what came out. With few heads a thread holds one row, and more blocks are there for the multiprocessors; with many it
// holds two and reads half as much. What comes out for a row takes the place of a number that only its threads read.
//
// Only gw needs S and G of the same token, as m_t = sum over rows of S_t G_t. But what two neighbouring tokens' m have
// between them the other gradients tell (both sides follow from the formulas of one token):
//
//   m_t = gw_t + b_t gb_t + k_t gk_t         m_{t-1} = gw_t + a_t ga_t + r_{t-1} gr_{t-1}
//
// `reads` writes the latter two terms, `between`, and every ANCHOR tokens a state, from which `writes` finds m anew, so
// that rounding errors do not add up. Nothing is divided by a decay, and no state is computed twice.
//
// r, k, v and y and their gradients are stored as WKV_X, all else as numbers are computed with. All tensors begin at
// multiples of 16 bytes. No atomics: every result is the same to the bit.
#include "wkv7_gpu.h"

constexpr int ANCHOR = 64;  // in wkv7_cuda.py too

// Where the state after token t is, the last of ANCHOR tokens, in anchors [B, H, T / ANCHOR, N, N].
WKV_FN Size anchor(const Place& p, int t, Size T) { return (p.head * (T / ANCHOR) + t / ANCHOR) * N * N; }

// y; the state after the last token, `end`; and, unless null, what is removed, [B, T, H, N].
KERNEL(512) forward(Size T, Size H, const X* r_, const R* w_, const X* k_, const X* v_, const R* a_, const R* b_,
                    const unsigned char* reset, const R* state, X* y_, R* end, R* removed_) {
    __shared__ Tile tiles[7];
    __shared__ bool opens[TILE];
    Tile &r = tiles[0], &decay = tiles[1], &k = tiles[2], &v = tiles[3], &a = tiles[4],
         &b = tiles[5], &removed = tiles[6];
    Tile& y = v;
    const Place p(T, H);
    All in(Stream(r_, r), Decays(w_, decay), Stream(k_, k), Stream(v_, v), Stream(a_, a), Stream(b_, b),
           Resets(reset, p, T, opens));
    Rows S;
    Part part(p, 0, T);
    in.load(part);
    get_rows(state, p.matrix, p, S);
    for (; part.n; part.move(1)) {
        fetch(in, part, 1);
        for (int s = 0; s < part.n; s++) {
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
                const Four d = four(decay[s], p, e), bs = four(b[s], p, e);
                const Four ks = four(k[s], p, e), rs = four(r[s], p, e);
                UNROLL for (int i = 0; i < P; i++)
                    UNROLL for (int j = 0; j < 4; j++) {
                        S[i][e + j] = wkv7_step(S[i][e + j], d.x[j], gone[i], bs.x[j], vs[i], ks.x[j]);
                        after.x[i][j] += S[i][e + j] * rs.x[j];
                    }
            }
            after.total(ys);
            __syncwarp();
            keep(ys, p, y[s]), keep(gone, p, removed[s]);
        }
        __syncthreads();
        flush(y, p, part, y_);
        if (removed_) flush(removed, p, part, removed_);
    }
    put_rows(S, p, end, p.matrix);
}

// gv, gremoved, and `initial`, the gradient of the state before the first token. gy and gend, the gradient of the state
// after the last token, may be null for zeros, here and below.
KERNEL(512) gradients(Size T, Size H, const X* r_, const R* w_, const X* k_, const R* a_, const R* b_,
                      const unsigned char* reset, const X* gy_, const R* gend, X* gv_, R* gremoved_, R* initial) {
    __shared__ Tile tiles[7];
    __shared__ bool opens[TILE];
    Tile &r = tiles[0], &decay = tiles[1], &k = tiles[2], &a = tiles[3], &b = tiles[4],
         &gy = tiles[5], &gremoved = tiles[6];
    Tile& gv = gy;
    const Place p(T, H);
    All in(Stream(r_, r), Decays(w_, decay), Stream(k_, k), Stream(a_, a), Stream(b_, b), Optional(gy_, gy),
           Resets(reset, p, T, opens));
    Rows G;
    Part part(p, (T - 1) / TILE * TILE, T);
    in.load(part);
    get_rows(gend, p.matrix, p, G);
    for (; part.n; part.move(-1)) {
        fetch(in, part, -1);
        for (int s = part.n - 1; s >= 0; s--) {
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
            __syncwarp();
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
        flush(gv, p, part, gv_), flush(gremoved, p, part, gremoved_);
    }
    put_rows(G, p, initial, p.matrix);
}

// gr, ga, `between` [B, T, H, N], and the columns of the state after every ANCHOR tokens, `anchors`.
KERNEL(384) reads(Size T, Size H, const X* r_, const R* w_, const X* k_, const X* v_, const R* a_, const R* b_,
                  const unsigned char* reset, const R* state, const R* removed_, const X* gy_, const R* gremoved_, X* gr_,
                  R* ga_, R* between_, R* anchors) {
    __shared__ Tile tiles[9];
    __shared__ bool opens[TILE];
    Tile &r = tiles[0], &decay = tiles[1], &k = tiles[2], &v = tiles[3], &a = tiles[4], &b = tiles[5],
         &removed = tiles[6], &gy = tiles[7], &gremoved = tiles[8];
    Tile &gr = r, &ga = a, &between = k;
    const Place p(T, H);
    All in(Stream(r_, r), Decays(w_, decay), Stream(k_, k), Stream(v_, v), Stream(a_, a), Stream(b_, b),
           Stream(removed_, removed), Optional(gy_, gy), Stream(gremoved_, gremoved), Resets(reset, p, T, opens));
    Rows S;
    R read[P] = {};  // r gr of the token before
    Part part(p, 0, T);
    in.load(part);
    get_columns(state, p.matrix, p, S);
    for (; part.n; part.move(1)) {
        fetch(in, part, 1);
        for (int s = 0; s < part.n; s++) {
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
            __syncwarp();
            keep(gas, p, ga[s]), keep(grs, p, gr[s]), keep(sum, p, between[s]);
            if ((part.t + s + 1) % ANCHOR == 0) put_rows(S, p, anchors, anchor(p, part.t + s, T));
        }
        __syncthreads();
        flush(gr, p, part, gr_), flush(ga, p, part, ga_), flush(between, p, part, between_);
    }
}

// gk, gb and gw. `end` and `gend` belong to the state after the last token.
KERNEL(384) writes(Size T, Size H, const X* r_, const R* w_, const X* k_, const X* v_, const R* a_, const R* b_,
                   const unsigned char* reset, const R* removed_, const X* gy_, const R* gremoved_, const R* between_,
                   const R* anchors, const R* end, const R* gend, X* gk_, R* gb_, R* gw_) {
    __shared__ Tile tiles[10];
    __shared__ bool opens[TILE];
    Tile &r = tiles[0], &decay = tiles[1], &k = tiles[2], &v = tiles[3], &a = tiles[4], &b = tiles[5],
         &removed = tiles[6], &gy = tiles[7], &gremoved = tiles[8], &between = tiles[9];
    Tile &gk = k, &gb = b, &gw = between;
    const Place p(T, H);
    All in(Stream(r_, r), Decays(w_, decay), Stream(k_, k), Stream(v_, v), Stream(a_, a), Stream(b_, b),
           Stream(removed_, removed), Optional(gy_, gy), Stream(gremoved_, gremoved), Stream(between_, between),
           Resets(reset, p, T, opens));
    Rows G;
    R m[P] = {};
    Part part(p, (T - 1) / TILE * TILE, T);
    in.load(part);
    get_columns(gend, p.matrix, p, G);
    for (; part.n; part.move(-1)) {
        fetch(in, part, -1);
        for (int s = part.n - 1; s >= 0; s--) {
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
            const int t = part.t + s;
            Rows S;
            if (t + 1 == T) get_columns(end, p.matrix, p, S), products(S, G, m);
            else if ((t + 1) % ANCHOR == 0) get_rows(anchors, anchor(p, t, T), p, S), products(S, G, m);
            by_v.total(gks), by_removed.total(gbs);
            UNROLL for (int i = 0; i < P; i++) {
                gws[i] = opens[s] ? R(0) : m[i] - (bs[i] * gbs[i] + ks[i] * gks[i]);
                m[i] = gws[i] + steps[i];
            }
            __syncwarp();
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
        flush(gk, p, part, gk_), flush(gb, p, part, gb_), flush(gw, p, part, gw_);
    }
}
