// What lies between matrix products, number by number: see elementwise.py and elementwise7.py, which say it in torch.
//
// Sequences are stored as WKV_X; decays, their gradient and parameters as numbers are computed with. Backwards read the
// inputs once more and compute the rest anew.
#include "elementwise_gpu.h"

// Where a thread's pack begins; the last one may be cut off.
struct Flat {
    Size at, left;

    MEMBER Flat(Size n) {
        at = (Size(blockIdx.x) * WIDTH * ROWS + threadIdx.y * WIDTH + threadIdx.x) * V, left = n - at;
    }
    MEMBER void load(const X* from, R (&to)[V]) const {
        if (left >= V) ::load(from + at, to);
        else UNROLL for (int j = 0; j < V; j++) to[j] = j < left ? real(from[at + j]) : R(0);
    }
    MEMBER void put(const R (&from)[V], X* to) const {
        if (left >= V) ::put(from, to + at);
        else UNROLL for (int j = 0; j < V; j++) if (j < left) store(from[j], to[at + j]);
    }
};

// ---- the channel mix's activation, and gates

KERNEL squared_relu(Size n, const X* x_, X* y_) {
    const Flat p(n);
    R x[V], y[V];
    p.load(x_, x);
    UNROLL for (int j = 0; j < V; j++) y[j] = x[j] <= 0 ? R(0) : x[j] * x[j];  // what is no number stays none
    p.put(y, y_);
}

KERNEL squared_relu_back(Size n, const X* x_, const X* g_, X* gx_) {
    const Flat p(n);
    R x[V], g[V];
    p.load(x_, x), p.load(g_, g);
    UNROLL for (int j = 0; j < V; j++) g[j] = x[j] <= 0 ? R(0) : 2 * x[j] * g[j];
    p.put(g, gx_);
}

KERNEL gate(Size n, const X* r_, const X* y_, X* out) {
    const Flat p(n);
    R r[V], y[V];
    p.load(r_, r), p.load(y_, y);
    UNROLL for (int j = 0; j < V; j++) y[j] *= sigmoid(r[j]);
    p.put(y, out);
}

KERNEL gate_back(Size n, const X* r_, const X* y_, const X* g_, X* gr, X* gy) {
    const Flat p(n);
    R r[V], y[V], g[V];
    p.load(r_, r), p.load(y_, y), p.load(g_, g);
    UNROLL for (int j = 0; j < V; j++) {
        const R s = sigmoid(r[j]);
        y[j] *= g[j] * s * (1 - s), g[j] *= s;
    }
    p.put(y, gr), p.put(g, gy);
}

// ---- RWKV-7's decays and value residual: sigmoids of sums, whose parameter is of a channel

constexpr R FASTEST = R(0.60653065971263342);  // in elementwise7.py, too

KERNEL decay(Size tokens, Size C, Size strip, const X* raw_, const R* w0_, R* w_) {
    const Place p(tokens, C, strip);
    if (p.first >= p.end) return;
    R w0[V], raw[V];
    load(w0_ + p.c, w0);
    for (Size at = p.first * C + p.c; at < p.end * C; at += C) {
        load(raw_ + at, raw);
        UNROLL for (int j = 0; j < V; j++) raw[j] = -FASTEST * sigmoid(raw[j] + w0[j]);
        put(raw, w_ + at);
    }
}

// graw, and sums [tiles, C] of w0's gradient.
KERNEL decay_back(Size tokens, Size C, Size strip, const X* raw_, const R* w0_, const R* gw_, X* graw_, R* sums) {
    const Place p(tokens, C, strip);
    R w0[V], raw[V], gw[V], total[V];
    clear(total), clear(w0);
    if (p.first < p.end) load(w0_ + p.c, w0);
    for (Size at = p.first * C + p.c; at < p.end * C; at += C) {
        load(raw_ + at, raw), load(gw_ + at, gw);
        UNROLL for (int j = 0; j < V; j++) {
            const R s = sigmoid(raw[j] + w0[j]);
            gw[j] *= -FASTEST * s * (1 - s), total[j] += gw[j];
        }
        put(gw, graw_ + at);
    }
    put_sum(p, total, 0, 1, sums);
}

KERNEL value_residual(Size tokens, Size C, Size strip, const X* v_, const X* first_, const X* raw_, const R* v0_,
                      X* out) {
    const Place p(tokens, C, strip);
    if (p.first >= p.end) return;
    R v0[V], v[V], first[V], raw[V];
    load(v0_ + p.c, v0);
    for (Size at = p.first * C + p.c; at < p.end * C; at += C) {
        load(v_ + at, v), load(first_ + at, first), load(raw_ + at, raw);
        UNROLL for (int j = 0; j < V; j++) v[j] += (first[j] - v[j]) * sigmoid(raw[j] + v0[j]);
        put(v, out + at);
    }
}

// gv, gfirst, graw, and sums [tiles, C] of v0's gradient.
KERNEL value_residual_back(Size tokens, Size C, Size strip, const X* v_, const X* first_, const X* raw_, const R* v0_,
                           const X* g_, X* gv, X* gfirst, X* graw, R* sums) {
    const Place p(tokens, C, strip);
    R v0[V], v[V], first[V], raw[V], g[V], total[V];
    clear(total), clear(v0);
    if (p.first < p.end) load(v0_ + p.c, v0);
    for (Size at = p.first * C + p.c; at < p.end * C; at += C) {
        load(v_ + at, v), load(first_ + at, first), load(raw_ + at, raw), load(g_ + at, g);
        UNROLL for (int j = 0; j < V; j++) {
            const R s = sigmoid(raw[j] + v0[j]);
            raw[j] = g[j] * (first[j] - v[j]) * s * (1 - s), total[j] += raw[j];
            first[j] = g[j] * s, v[j] = g[j] - first[j];
        }
        put(v, gv + at), put(first, gfirst + at), put(raw, graw + at);
    }
    put_sum(p, total, 0, 1, sums);
}
