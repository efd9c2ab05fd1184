// What lies between matrix products, number by number: see elementwise.py and elementwise7.py, which say it in torch.
//
// Sequences are stored as WKV_X, decays, their gradient, and parameters as numbers are computed with. Backwards read the
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
