// What the kernels of wkv4.cu are made of: values in memory, and where a thread works.
//
// Macros of the build, besides those of gpu.h: WKV_V, channels of a thread; WKV_FORWARD or WKV_BACKWARD, or both.
#pragma once

#include "gpu.h"
#include "wkv4.h"

using State = Wkv4State<R>;
using Adjoint = Wkv4Adjoint<R>;

constexpr int V = WKV_V;
constexpr int S = sizeof(R) == 4 ? 16 : 4;  // tokens of a row, _row in cuda.py
constexpr int WIDTH = 32;                   // threads abreast in a block
constexpr int ROWS = 8;                     // of a block of the chunked kernels, in cuda.py too

// `blocks`: how many the registers should suffice for on a multiprocessor; in double, one at least.
#define KERNEL(rows, blocks) extern "C" __global__ void __launch_bounds__(WIDTH * rows, sizeof(R) == 4 ? blocks : 1)

// GPUs compute powers of 2. So k, u, w and every exponent are multiplied by this on their way in, and exponents are
// divided on their way out; gradients are sums of products of weights and have no base.
constexpr R LOG2E = R(1.4426950408889634), LN2 = R(0.69314718055994531);

// Neighbouring channels of one token, read and written as one.
struct alignas(sizeof(X) * V) Pack { X x[V]; };

// How a thread holds k, v and gy: ready for use if that takes no more registers.
constexpr bool READY = V == 1;
template <bool> struct Ready {};
WKV_FN R hold(X x, R scale, Ready<true>) { return real(x) * scale; }
WKV_FN X hold(X x, R scale, Ready<false>) { return x; }
using Held = decltype(hold(X(), R(), Ready<READY>()));
using Tokens = Held[S][V];

WKV_FN R key(Held x) { return READY ? real(x) : real(x) * LOG2E; }

// What is handed from one stretch or row to the next: a state, or an adjoint's (ga, gb, f) and the residual of the
// exponent's gradient, which waits for the token that last set the exponent.
struct Handed { State s; R residual; };

// What a stretch or row does to what is handed through it. `renewed`, 1 or 0: one of its tokens has set the exponent.
struct Crossing { State own; R decay, renewed; };

WKV_FN void cross(Handed& x, const Crossing& by) {
    wkv4_cross(x.s, by.decay, by.own);
    x.residual = by.renewed != 0 ? R(0) : x.residual;
}

// The decay of n tokens, of which some open documents or none.
WKV_FN R decay(R w, int n, bool closed) { return closed ? wkv_empty<R>() : R(n) * w; }

WKV_FN State nothing() { return {0, 0, wkv_empty<R>()}; }

// In memory the parts of a value lie `stride` apart, so that threads abreast read neighbours.
WKV_FN State get(const R* from, Size stride) { return {from[0], from[stride], from[2 * stride]}; }
WKV_FN Handed get_handed(const R* from, Size stride) { return {get(from, stride), from[3 * stride]}; }
WKV_FN Crossing get_crossing(const R* from, Size stride) {
    return {get(from, stride), from[3 * stride], from[4 * stride]};
}
WKV_FN State get_natural(const R* from, Size stride) { return {from[0], from[stride], from[2 * stride] * LOG2E}; }
WKV_FN void put(R* to, Size stride, const State& x) { to[0] = x.a, to[stride] = x.b, to[2 * stride] = x.e; }
WKV_FN void put(R* to, Size stride, const Handed& x) { put(to, stride, x.s), to[3 * stride] = x.residual; }
WKV_FN void put(R* to, Size stride, const Crossing& x) {
    put(to, stride, x.own), to[3 * stride] = x.decay, to[4 * stride] = x.renewed;
}

// ---- where a thread works

struct Place {
    int lane, begin, end, stretch;  // the stretch has the tokens begin to end - 1, and a number among all [B, stretches]
    int first, c;                   // the first channels of the block and of the thread
    bool last;                      // whether this is the lane's last stretch
};

WKV_FN Place place(Size T, Size C, Size L) {
    const int groups = (C + WIDTH * V - 1) / (WIDTH * V), stretches = (T + L - 1) / L, stretch = blockIdx.x / groups;
    const int begin = stretch % stretches * L, end = T - begin > L ? begin + L : T;
    const int first = blockIdx.x % groups * WIDTH * V, c = first + threadIdx.x * V, most = C - V;
    return {stretch / stretches, begin, end, stretch, first, c < most ? c : most, end == T};
}

// A row is plain if it is full and no document opens in it. Nearly all are, and go without tests for every token.
struct Row {
    int t, n, first;  // its first token; tokens, and tokens before the first reset
    Size at;          // where the thread's channels of the first token are in a [B, T, C]
    unsigned resets;  // bit i: token i opens a document
    bool plain;
};

WKV_FN Row row_at(int t, const Place& p, Size T, Size C, const unsigned char* reset) {
    const int left = p.end - t, n = left < S ? (left > 0 ? left : 0) : S;
    Row row = {t, n, n, (p.lane * T + (n > 0 ? t : p.end - 1)) * C + p.c, 0, false};
    if (reset)
        UNROLL for (int i = S - 1; i >= 0; i--)
            if (i < row.n && reset[p.lane * T + t + i]) row.resets |= 1u << i, row.first = i;
    row.plain = row.n == S && row.resets == 0;
    return row;
}

WKV_FN bool opens(const Row& row, int i) { return row.resets >> i & 1; }

WKV_FN void load_token(const X* from, R scale, Held (&to)[V]) {
    const Pack in = *reinterpret_cast<const Pack*>(from);
    UNROLL for (int j = 0; j < V; j++) to[j] = hold(in.x[j], scale, Ready<READY>());
}

// What is beyond the row's last token repeats it, unused.
WKV_FN void load(const X* from, const Row& row, Size C, R scale, Tokens& to) {
    from += row.at;
    if (row.n == S) {
        UNROLL for (int i = 0; i < S; i++, advance(from, C)) load_token(from, scale, to[i]);
    } else {
        UNROLL for (int i = 0; i < S; i++, advance(from, i < row.n ? C : 0)) load_token(from, scale, to[i]);
    }
}

// Has the row at t brought into the L2 cache, 32 bytes a thread, before it is loaded a tile later: the registers to
// load it earlier would cost more threads.
WKV_FN void prefetch_row(const X* x, int t, const Place& p, Size T, Size C) {
    constexpr int EACH = 32 / sizeof(X), PIECES = WIDTH * V / EACH;  // of a token
    UNROLL for (int n = 0; n < S * PIECES / WIDTH; n++) {
        const int i = n * WIDTH + threadIdx.x, token = t + i / PIECES, channel = p.first + i % PIECES * EACH;
        if (p.begin <= token && token < p.end && channel < C) prefetch(x + (p.lane * T + token) * C + channel);
    }
}
