// The token shift on the GPU: y_i[t] = x[t-1] + m_i (x[t] - x[t-1]), all mixes of one x in one pass.
//
// x and its gradient are stored as WKV_X, the mixes and theirs as WKV_Y; m [n, C] as numbers are computed with. Lanes
// lie behind one another: a thread's strip of tokens may end one and begin the next.
#include "elementwise_gpu.h"

constexpr int MOST = 6;  // mixes of one call; in elementwise_cuda.py too

WKV_FN void load_mixes(const R* from, const Place& p, Size n, R (&to)[MOST][V]) {
    UNROLL for (int i = 0; i < MOST; i++)
        if (i < n) load(from + i * p.C + p.c, to[i]);
}

// All mixes [B, T, C], and the last tokens, end [B, C].
KERNEL mix(Size B, Size T, Size C, Size strip, Size n, const X* x_, const X* last, const unsigned char* reset,
           const R* mixes, X* end, Y* y0, Y* y1, Y* y2, Y* y3, Y* y4, Y* y5) {
    Y* const ys[MOST] = {y0, y1, y2, y3, y4, y5};
    const Place p(B * T, C, strip);
    if (p.first >= p.end) return;
    R m[MOST][V], x[V], before[V];
    load_mixes(mixes, p, n, m), clear(before);
    Size lane = p.first / T, t = p.first % T;
    if (t) load(x_ + (p.first - 1) * C + p.c, before);
    for (Size token = p.first; token < p.end; token++) {
        load(x_ + token * C + p.c, x);
        if (t == 0) load(last + lane * C + p.c, before);
        if (reset && reset[token]) clear(before);
        UNROLL for (int i = 0; i < MOST; i++) {
            if (i >= n) break;
            R y[V];
            UNROLL for (int j = 0; j < V; j++) y[j] = before[j] + m[i][j] * (x[j] - before[j]);
            put(y, ys[i] + token * C + p.c);
        }
        UNROLL for (int j = 0; j < V; j++) before[j] = x[j];
        if (++t == T) put(x, end + lane * C + p.c), t = 0, lane++;
    }
}

// Adds to `to` what the gradients of a token's mixes hand to the token before.
WKV_FN void hand_back(const Y* const (&g)[MOST], const R (&m)[MOST][V], const Place& p, Size n, Size token,
                      R (&to)[V]) {
    UNROLL for (int i = 0; i < MOST; i++) {
        if (i >= n) break;
        R gy[V];
        load(g[i] + token * p.C + p.c, gy);
        UNROLL for (int j = 0; j < V; j++) to[j] += (1 - m[i][j]) * gy[j];
    }
}

// gx, glast, and sums [tiles, n, C] of the mixes' gradients; gend, of the last tokens, may be null.
KERNEL mix_back(Size B, Size T, Size C, Size strip, Size n, const X* x_, const X* last, const unsigned char* reset,
                const R* mixes, const X* gend, X* gx_, X* glast, R* sums, const Y* g0, const Y* g1, const Y* g2,
                const Y* g3, const Y* g4, const Y* g5) {
    const Y* const gs[MOST] = {g0, g1, g2, g3, g4, g5};
    const Place p(B * T, C, strip);
    R m[MOST][V], gm[MOST][V], x[V], later[V];  // handed back by the token after
    clear(x), clear(later);
    UNROLL for (int i = 0; i < MOST; i++) clear(gm[i]);
    if (p.first < p.end) {
        load_mixes(mixes, p, n, m), load(x_ + (p.end - 1) * C + p.c, x);
        const bool goes_on = p.end % T && !(reset && reset[p.end]);
        if (goes_on) hand_back(gs, m, p, n, p.end, later);
    }
    Size lane = (p.end - 1) / T, t = (p.end - 1) % T;
    for (Size token = p.end - 1; token >= p.first; token--) {
        const bool opens = reset && reset[token];
        R before[V], gx[V], handed[V];
        load(t ? x_ + (token - 1) * C + p.c : last + lane * C + p.c, before), clear(handed);
        UNROLL for (int j = 0; j < V; j++) gx[j] = later[j], x[j] -= opens ? R(0) : before[j];
        if (t == T - 1 && gend) load(gend + lane * C + p.c, gx);
        UNROLL for (int i = 0; i < MOST; i++) {
            if (i >= n) break;
            R g[V];
            load(gs[i] + token * C + p.c, g);
            UNROLL for (int j = 0; j < V; j++) {
                gx[j] += m[i][j] * g[j], handed[j] += (1 - m[i][j]) * g[j];
                gm[i][j] += g[j] * x[j];
            }
        }
        put(gx, gx_ + token * C + p.c);
        UNROLL for (int j = 0; j < V; j++) later[j] = opens ? R(0) : handed[j], x[j] = before[j];
        if (t == 0) {
            put(later, glast + lane * C + p.c), clear(later), t = T, lane--;
            if (token > p.first) load(x_ + (token - 1) * C + p.c, x);
        }
        t--;
    }
    UNROLL for (int i = 0; i < MOST; i++)
        if (i < n) put_sum(p, gm[i], i, n, sums);
}
