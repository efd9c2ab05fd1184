// The backward of WKV-7 on the CPU, one head: chunk by chunk from the end, as products of small matrices.
//
// With the product P_t of the decays of a stretch's tokens up to token t, S the state before the stretch, u_t what token t
// removed, and   R_t = P_t r_t   A_t = P_(t-1) a_t   K_t = k_t / P_t   B_t = b_t / P_t
//
//     state after t = (S + sum over s <= t of v_s K_s^T + u_s B_s^T) diag(P_t)
//     y_t = S R_t + sum over s <= t of v_s (K_s . R_t) + u_s (B_s . R_t)        u_t = the same of A_t, over s < t
//
// Below G is the gradient of what stands before diag(P) at the stretch's end, and gu_t are found from the last to the first.
// A stretch ends with its chunk, before a token that opens a document, and where P gets too small to divide by.
#pragma once
#include <algorithm>

#include "exp_log.h"
#include "jobs.h"
#include "storage.h"
#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 16;  // tokens, as in wkv7_cpu.py

// R is what is computed with, S what r, k, v, y and their gradients are stored as.
template <class R, class S> struct Inputs {
    int64_t B, T, H, N, apart;   // N is a multiple of 16; from a lane's state to the next one's
    const S *r, *k, *v;  // [B,T,H,N] each
    const R *w, *a, *b, *state;  // the log decay and others [B,T,H,N], [B,H,N,N]
    const uint8_t* reset;        // [B,T] or null
};

template <class R, class S> struct Gradients {
    const S* gy;  // those that arrive on the results
    const R* gstate;  // or null for zeros
    const R *saved, *removed;  // the states [key][value] before each of M chunks [B,H,M,N,N]; [B,T,H,N]
    S *r, *k, *v;
    R *w, *a, *b, *initial;
};

template <class R, class S> struct Place {  // of a head in the tensors
    int64_t lane, first, stride, square, chunks;

    Place(const Inputs<R, S>& in, int64_t head)
        : lane(head / in.H), first((lane * in.T * in.H + head % in.H) * in.N), stride(in.H * in.N),
          square(head * in.N * in.N), chunks((in.T + CHUNK - 1) / CHUNK) {}
    int64_t at(int64_t t) const { return first + t * stride; }
    int64_t saved(int64_t t, int64_t N) const { return square * chunks + t / CHUNK * N * N; }
    bool opens(const Inputs<R, S>& in, int64_t t) const { return in.reset && in.reset[lane * in.T + t]; }
};

template <class R, class S> class Backward {
    static constexpr int64_t TWO = 2 * CHUNK;
    const Inputs<R, S>& in;
    const Gradients<R, S>& out;
    const Place<R, S> place;
    const int64_t N;
    Scratch<R> scratch;
    // [TWO,N] each, two rows a token: A and R, K and B, v and u, gu and gy; gradients of the first three; a transpose
    R *const ar, *const kb, *const vu, *const guy, *const gar, *const gkb, *const gvu, *const turned;
    R *const P, *const over;    // [CHUNK + 1,N]: P_(t-1) of each token t, and 1 / P_(t-1)
    R *const met, *const gmet;  // [TWO,TWO]: ar kb^T, guy vu^T, 0 where the token of the second comes too late
    R *const G, *const square;  // [N,N]; the transpose of G or of a state
    R *const states;            // [CHUNK,N,N]: before each stretch of a chunk, if they are not the saved one

  public:
    Backward(const Inputs<R, S>& in, const Gradients<R, S>& out, int64_t head)
        : in(in), out(out), place(in, head), N(in.N),
          scratch((8 * TWO + 2 * (CHUNK + 1) + (2 + CHUNK) * N) * N + 2 * TWO * TWO), ar(rows(TWO)), kb(rows(TWO)),
          vu(rows(TWO)), guy(rows(TWO)), gar(rows(TWO)), gkb(rows(TWO)), gvu(rows(TWO)), turned(rows(TWO)),
          P(rows(CHUNK + 1)), over(rows(CHUNK + 1)), met(scratch.take(TWO * TWO)), gmet(scratch.take(TWO * TWO)),
          G(rows(N)), square(rows(N)), states(rows(CHUNK * N)) {
        if (out.gstate) transpose(N, N, out.gstate + place.square, G);
        else std::fill_n(G, N * N, R(0));
        for (int64_t m = place.chunks; m-- > 0;) chunk(m * CHUNK, std::min(in.T, (m + 1) * CHUNK));
        transpose(N, N, G, out.initial + place.square);
    }

  private:
    R* rows(int64_t n) { return scratch.take(n * N); }

    void chunk(int64_t t0, int64_t end) {
        int64_t begins[CHUNK + 1] = {t0}, last = 0;
        const R* before[CHUNK] = {out.saved + place.saved(t0, N)};
        for (;; last++) {
            R* state = states + last * N * N;
            if (place.opens(in, begins[last])) {
                std::fill_n(state, N * N, R(0));
                before[last] = state;
            }
            begins[last + 1] = read(begins[last], end);
            if (begins[last + 1] == end) break;
            memcpy(state + N * N, before[last], N * N * sizeof(R));
            before[last + 1] = state + N * N;
            add_product(N, TWO, N, {kb, 1, N}, vu, state + N * N);
            scale(state + N * N, P + (begins[last + 1] - begins[last]) * N);
        }
        for (int64_t i = last; i >= 0; i--) {
            if (i < last) read(begins[i], begins[i + 1]);
            back(begins[i], begins[i + 1] - begins[i], before[i]);
            if (place.opens(in, begins[i])) std::fill_n(G, N * N, R(0));
        }
    }

    // Fills ar, kb, vu and gy for the stretch that begins at t0; returns where it ends, at most at `end`.
    int64_t read(int64_t t0, int64_t end) {
        std::fill_n(P, N, R(1));
        std::fill_n(over, N, R(1));
        int64_t t = 0;
        for (; t0 + t < end && !(t && place.opens(in, t0 + t)); t++) {
            const int64_t at = place.at(t0 + t), one = 2 * t * N, other = one + N, now = t * N, next = now + N;
            const R least = 1e-30, short_of = 2e-9;  // a smaller decay is as good as 0; P of several tokens stays above
            int too_small = 0;
            for (int64_t j = 0; j < N; j++) {
                const R decay = wkv_exp(in.w[at + j]);
                P[next + j] = P[now + j] * (decay < least ? least : decay);
                too_small += P[next + j] < short_of;
            }
            if (t && too_small) break;
            INDEPENDENT
            for (int64_t j = 0; j < N; j++) {
                const R inverse = 1 / P[next + j];
                over[next + j] = inverse;
                ar[one + j] = in.a[at + j] * P[now + j], ar[other + j] = load(in.r[at + j]) * P[next + j];
                kb[one + j] = load(in.k[at + j]) * inverse, kb[other + j] = in.b[at + j] * inverse;
                vu[one + j] = load(in.v[at + j]), vu[other + j] = out.removed[at + j];
                guy[other + j] = load(out.gy[at + j]);
            }
        }
        for (R* x : {ar, kb, vu, guy}) std::fill_n(x + 2 * t * N, (TWO - 2 * t) * N, R(0));
        return t0 + t;
    }

    void scale(R* matrix, const R* by) {
        for (int64_t j = 0; j < N; j++) {
            INDEPENDENT
            for (int64_t i = 0; i < N; i++) matrix[j * N + i] *= by[j];
        }
    }

    // product [TWO,TWO] = x y^T: what A_t and R_t meet of earlier tokens, and R_t of its own.
    void meet(const R* x, const R* y, R* product) {
        transpose(TWO, N, y, turned);
        add_product(TWO, N, TWO, {x, N, 1}, turned, product, true);
        for (int64_t p = 0; p < TWO; p++) std::fill(product + p * TWO + p + p % 2, product + (p + 1) * TWO, R(0));
    }

    // The gradients of a stretch of n tokens, and G from that of the state after it to that of the state before it.
    void back(int64_t t0, int64_t n, const R* state) {
        scale(G, P + n * N);
        add_product(TWO, N, N, {kb, N, 1}, G, gvu, true);
        meet(ar, kb, met);
        for (int64_t t = n - 1; t >= 0; t--) {
            constexpr int VECTORS = 16 / WIDTH<R>;
            for (int64_t i = 0; i < N; i += VECTORS * WIDTH<R>)
                add_tile<R, 2, VECTORS>({met + 2 * t, 1, TWO}, 2 * t + 1, 2 * n, guy + i, N, gvu + 2 * t * N + i, false);
            memcpy(guy + 2 * t * N, gvu + (2 * t + 1) * N, N * sizeof(R));
        }
        meet(guy, vu, gmet);
        transpose(N, N, state, square);
        add_product(TWO, N, N, {guy, N, 1}, square, gar, true);
        add_product(TWO, TWO, N, {gmet, TWO, 1}, kb, gar, false, LOWER);
        transpose(N, N, G, square);
        add_product(TWO, N, N, {vu, N, 1}, square, gkb, true);
        R *const gw = turned, *const first = turned + N;
        for (int64_t j = 0; j < N; j++) gw[j] = met_by(state, j);
        for (int64_t p = 0; p < 2 * n; p++)
            for (int64_t j = 0; j < N; j++) gw[j] += gkb[p * N + j] * kb[p * N + j];
        add_product(TWO, TWO, N, {gmet, 1, TWO}, ar, gkb, false, UPPER);
        add_product(N, TWO, N, {ar, 1, N}, guy, G);
        for (int64_t j = 0; j < N; j++) first[j] = met_by(state, j) - gar[j] * ar[j];
        write(t0, n, gw, first);
    }

    R met_by(const R* state, int64_t j) {
        V<R> sum = {};
        for (int64_t i = 0; i < N; i += WIDTH<R>) sum += get(G + j * N + i) * get(state + j * N + i);
        R total = 0;
        for (int l = 0; l < WIDTH<R>; l++) total += sum[l];
        return total;
    }

    // A decay scales what the state holds after it, and what its token and those behind read; not what they have written.
    // So the sums gw go from the end, where tokens without gradients are, and these get exactly 0. Of the first token gw
    // is what the state before the stretch meets: exactly 0 after a document's beginning.
    void write(int64_t t0, int64_t n, R* gw, const R* first) {
        for (int64_t t = n - 1; t >= 0; t--) {
            const int64_t at = place.at(t0 + t), one = 2 * t * N, other = one + N, now = t * N, next = now + N;
            const int64_t later = other + N;
            INDEPENDENT
            for (int64_t j = 0; j < N; j++) {
                store(out.r[at + j], gar[other + j] * P[next + j]);
                store(out.k[at + j], gkb[one + j] * over[next + j]);
                store(out.v[at + j], gvu[one + j]);
                out.a[at + j] = gar[one + j] * P[now + j];
                out.b[at + j] = gkb[other + j] * over[next + j];
                gw[j] += gar[other + j] * ar[other + j] - gkb[one + j] * kb[one + j] - gkb[other + j] * kb[other + j];
                if (t + 1 < n) gw[j] += gar[later + j] * ar[later + j];
                out.w[at + j] = t ? gw[j] : first[j];
            }
        }
    }
};

}  // namespace
