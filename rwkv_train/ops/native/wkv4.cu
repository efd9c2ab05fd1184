// WKV-4 on the GPU: built by NVRTC at first use and launched by cuda.py. Formulas in wkv4.h.
//
// The recurrence is serial in the tokens, but what a stretch of tokens does to a state is itself a small value (a
// Wkv4State and a decay), and these compose. So time is cut on three levels:
//   row      S tokens, held by a thread in registers. It sums up what they do to a state, is told the state before
//            them, and goes through them a second time with that. They are read from memory once.
//   tile     ROWS rows, one a warp; the warps exchange what their rows do in shared memory. A block walks tile by tile.
//   stretch  L tokens, walked by one block. With many lanes and channels one stretch is all there is: k, v and y cross
//            the memory bus once, 6 bytes a token and channel in 16 bit. With few, `summarise` reads k and v first, one
//            thread a stretch and channel (then they mostly are in the L2 cache), and `scan` finds the states between.
// With one row a tile is the classic serial walk, a thread a channel: best for a few tokens or very many channels.
//
// The backward is the same from right to left. It replays the forward from the state before each row, which the
// forward keeps, 12 bytes every S tokens. So the two move 6.75 and 10.75 bytes a token and channel in 16 bit. The CPU's
// way, to keep the logarithm of every denominator and replay nothing, would move 10 and 16: that and y are read too.
//
// No atomics: partial gradients of w and u are added up in a fixed order, and every result is the same to the bit.
// Threads beyond the last channel do the work of the last one once more, and write the same: no store needs a test.

#include "wkv4_gpu.h"

// The adjoint after the last token, from the state there and its gradient.
WKV_FN Handed from_the_end(const State& s, const State& gs) { return {{gs.a, gs.b, -s.e}, wkv4_residual(s, gs)}; }

// That gradient; zeros if nobody gave one.
WKV_FN State get_gradient(const R* gend, Size at, Size stride) { return gend ? get(gend + at, stride) : State{0, 0, 0}; }

// What is handed to each stretch, [B, N, 4, C]: from `state` [B, 3, C] before the first token, the state before it; or,
// backward, with `state` after the last token and its gradient, the adjoint after it. A thread a lane and channel.
KERNEL(1, 1) scan(Size B, Size C, Size N, Size backward, const R* state, const R* gend, const R* crossings, R* handed) {
    const Size thread = Size(blockIdx.x) * WIDTH + threadIdx.x, lane = thread / C, c = thread % C;
    if (lane >= B) return;
    Handed x = {get_natural(state + lane * 3 * C + c, C), 0};
    if (backward) x = from_the_end(x.s, get_gradient(gend, lane * 3 * C + c, C));
    constexpr int AHEAD = 4;  // their loads do not wait for one another
    for (Size first = 0; first < N; first += AHEAD) {
        Crossing by[AHEAD];
        UNROLL for (int i = 0; i < AHEAD; i++) {
            const Size n = lane * N + (backward ? N - 1 - first - i : first + i);
            if (first + i < N) by[i] = get_crossing(crossings + n * 5 * C + c, C);
        }
        UNROLL for (int i = 0; i < AHEAD; i++) {
            const Size n = lane * N + (backward ? N - 1 - first - i : first + i);
            if (first + i < N) put(handed + n * 4 * C + c, C, x), cross(x, by[i]);
        }
    }
}

#ifdef WKV_FORWARD
// ---- forward

// Takes a state through a row.
template <bool PLAIN>
WKV_FN void absorb(const Row& row, const R (&w)[V], const Tokens& k, const Tokens& v, State (&s)[V]) {
    UNROLL for (int i = 0; i < S; i++) {
        if (!PLAIN && i >= row.n) break;
        UNROLL for (int j = 0; j < V; j++) {
            if (!PLAIN && opens(row, i)) s[j] = nothing();
            wkv4_step(w[j], key(k[i][j]), real(v[i][j]), s[j]);
        }
    }
}

// The same, and writes y.
template <bool PLAIN>
WKV_FN void emit(const Row& row, const R (&w)[V], const R (&u)[V], const Tokens& k, const Tokens& v,
                 State (&s)[V], X* y, Size C) {
    y += row.at;
    UNROLL for (int i = 0; i < S; i++, advance(y, C)) {
        if (!PLAIN && i >= row.n) break;
        Pack out;
        UNROLL for (int j = 0; j < V; j++) {
            const R ki = key(k[i][j]), vi = real(v[i][j]);
            if (!PLAIN && opens(row, i)) s[j] = nothing();
            store(wkv4_out(u[j], ki, vi, s[j]).y, out.x[j]);
            wkv4_step(w[j], ki, vi, s[j]);
        }
        *reinterpret_cast<Pack*>(y) = out;
    }
}

// What each stretch does to a state: crossings [B, stretches, 5, C].
KERNEL(1, 1) summarise(Size T, Size C, Size L, const R* w_, const X* k_, const X* v_, const unsigned char* reset,
                       R* crossings) {
    const Place p = place(T, C, L);
    R w[V];
    State s[V];
    bool closed = false;
    UNROLL for (int j = 0; j < V; j++) w[j] = w_[p.c + j] * LOG2E, s[j] = nothing();
    for (int t = p.begin; t < p.end; t += S) {
        const Row row = row_at(t, p, T, C, reset);
        Tokens k, v;
        load(k_, row, C, LOG2E, k), load(v_, row, C, R(1), v);
        prefetch_row(k_, t + S, p, T, C), prefetch_row(v_, t + S, p, T, C);
        row.plain ? absorb<true>(row, w, k, v, s) : absorb<false>(row, w, k, v, s);
        closed |= row.resets != 0;
    }
    UNROLL for (int j = 0; j < V; j++) {
        const Crossing by = {s[j], decay(w[j], p.end - p.begin, closed), R(0)};
        put(crossings + p.stretch * 5 * C + p.c + j, C, by);
    }
}

// y; the state after the last token, `end`; and, unless null, the state before each row, states [B, rows, 3, C].
KERNEL(ROWS, 2) forward(Size T, Size C, Size L, const R* w_, const R* u_, const X* k_, const X* v_,
                        const unsigned char* reset, const R* state, const R* handed, X* y, R* end, R* states) {
    __shared__ R crossings[2][ROWS][V][5][WIDTH], before_tile[2][V][3][WIDTH];  // of this tile and the next
    const Place p = place(T, C, L);
    const int rows = blockDim.y, me = threadIdx.y, x = threadIdx.x;
    const bool hands_on = me == rows - 1;
    R w[V], u[V];
    State s[V];
    UNROLL for (int j = 0; j < V; j++) {
        const int c = p.c + j;
        w[j] = w_[c] * LOG2E, u[j] = u_[c] * LOG2E;
        s[j] = p.begin ? get(handed + p.stretch * 4 * C + c, C) : get_natural(state + p.lane * 3 * C + c, C);
        if (hands_on) put(&before_tile[0][j][0][x], WIDTH, s[j]);
    }
    int turn = 0;
    for (int t0 = p.begin; t0 < p.end; t0 += rows * S, turn ^= 1) {
        const Row row = row_at(t0 + me * S, p, T, C, reset);
        Tokens k, v;
        load(k_, row, C, LOG2E, k), load(v_, row, C, R(1), v);
        prefetch_row(k_, row.t + rows * S, p, T, C), prefetch_row(v_, row.t + rows * S, p, T, C);
        if (!hands_on) {
            UNROLL for (int j = 0; j < V; j++) s[j] = nothing();
            row.plain ? absorb<true>(row, w, k, v, s) : absorb<false>(row, w, k, v, s);
            UNROLL for (int j = 0; j < V; j++)
                put(&crossings[turn][me][j][0][x], WIDTH, Crossing{s[j], decay(w[j], row.n, row.resets), R(0)});
        }
        __syncthreads();
        UNROLL for (int j = 0; j < V; j++) {
            Handed h = {get(&before_tile[turn][j][0][x], WIDTH), R(0)};
            for (int r = 0; r < me; r++) cross(h, get_crossing(&crossings[turn][r][j][0][x], WIDTH));
            s[j] = h.s;
            R* to = states + (p.lane * ((T + S - 1) / S) + row.t / S) * 3 * C + p.c + j;
            if (states && row.n > 0) put(to, C, s[j]);
        }
        row.plain ? emit<true>(row, w, u, k, v, s, y, C) : emit<false>(row, w, u, k, v, s, y, C);
        UNROLL for (int j = 0; j < V; j++)
            if (hands_on) put(&before_tile[turn ^ 1][j][0][x], WIDTH, s[j]);
    }
    UNROLL for (int j = 0; j < V; j++)
        if (p.last && hands_on) put(end + p.lane * 3 * C + p.c + j, C, State{s[j].a, s[j].b, s[j].e * LN2});
}

#endif  // WKV_FORWARD

#ifdef WKV_BACKWARD
// ---- backward

// Takes a state through a row, from left to right, and keeps y and the logarithm of its denominator. `last`: the last
// token that has set the exponent.
template <bool PLAIN>
WKV_FN void replay(const Row& row, const R (&w)[V], const R (&u)[V], const Tokens& k, const Tokens& v, State (&s)[V],
                   R (&y)[S][V], R (&lse)[S][V], int (&last)[V]) {
    UNROLL for (int i = 0; i < S; i++) {
        if (!PLAIN && i >= row.n) break;
        UNROLL for (int j = 0; j < V; j++) {
            const R ki = key(k[i][j]), vi = real(v[i][j]);
            if (!PLAIN && opens(row, i)) s[j] = nothing();
            const Wkv4Output<R> o = wkv4_out(u[j], ki, vi, s[j]);
            y[i][j] = o.y, lse[i][j] = wkv4_lse(o);
            last[j] = w[j] + s[j].e > ki ? last[j] : i;
            wkv4_step(w[j], ki, vi, s[j]);
        }
    }
}

// Adds to `own` what the row's tokens before the first reset hand to the left end, `offset` tokens before the row. All
// exponents are there already, so their maximum comes first and the weights need no comparing.
template <bool PLAIN>
WKV_FN void summarise_row(const Row& row, const R (&w)[V], const Tokens& gy, R offset, const R (&y)[S][V],
                          const R (&lse)[S][V], State (&own)[V]) {
    UNROLL for (int j = 0; j < V; j++) {
        State sum = {0, 0, wkv_empty<R>()};
        UNROLL for (int i = 0; i < S; i++)
            if (PLAIN || i < row.first) sum.e = wkv_max(sum.e, wkv4_reach(w[j], R(i), lse[i][j]));
        UNROLL for (int i = 0; i < S; i++) {
            if (!PLAIN && i >= row.first) break;
            const R z = wkv_exp(wkv4_reach(w[j], R(i), lse[i][j] + sum.e)) * real(gy[i][j]);
            sum.a += z, sum.b -= z * y[i][j];
        }
        wkv4_add(own[j], sum.a, sum.b, wkv_clamp(sum.e + offset * w[j]));
    }
}

// The two of them; the leftmost row of a tile has none to hand a summary to.
WKV_FN void go_through(const Row& row, bool sum_up, const R (&w)[V], const R (&u)[V], const Tokens& k, const Tokens& v,
                       const Tokens& gy, R offset, State (&s)[V], R (&y)[S][V], R (&lse)[S][V], State (&own)[V],
                       int (&last)[V]) {
    if (row.plain) {
        replay<true>(row, w, u, k, v, s, y, lse, last);
        if (sum_up) summarise_row<true>(row, w, gy, offset, y, lse, own);
    } else {
        replay<false>(row, w, u, k, v, s, y, lse, last);
        if (sum_up) summarise_row<false>(row, w, gy, offset, y, lse, own);
    }
}

// Takes an adjoint through a row, from right to left, and writes the gradients. Token `last` takes the residual, which
// is 0 in a plain row.
template <bool PLAIN>
WKV_FN void sweep(const Row& row, const R (&w)[V], const R (&u)[V], const Tokens& k, const Tokens& v,
                  const Tokens& gy, const R (&y)[S][V], const R (&lse)[S][V], const int (&last)[V],
                  const R (&residual)[V], Adjoint (&g)[V], R (&gw)[V], R (&gu)[V], X* gk, X* gv, Size C) {
    gk += row.at + (S - 1) * C, gv += row.at + (S - 1) * C;
    UNROLL for (int i = S - 1; i >= 0; i--, advance(gk, -C), advance(gv, -C)) {
        if (!PLAIN && i >= row.n) continue;
        Pack gki, gvi;
        UNROLL for (int j = 0; j < V; j++) {
            const R ki = key(k[i][j]), vi = real(v[i][j]), gyi = real(gy[i][j]);
            const Wkv4Grad<R> o = wkv4_back(w[j], u[j], ki, vi, y[i][j], lse[i][j], gyi, g[j]);
            store(!PLAIN && i == last[j] ? o.k + residual[j] : o.k, gki.x[j]), store(o.v, gvi.x[j]);
            gw[j] += o.w, gu[j] += o.u;
            if (!PLAIN && opens(row, i)) g[j] = {0, 0, wkv_empty<R>(), 0, 0};
        }
        *reinterpret_cast<Pack*>(gk) = gki;
        *reinterpret_cast<Pack*>(gv) = gvi;
    }
}

// What each stretch does to an adjoint: crossings [B, stretches, 5, C].
KERNEL(1, 1) summarise_adjoints(Size T, Size C, Size L, const R* w_, const R* u_, const X* k_, const X* v_,
                                const unsigned char* reset, const R* states, const X* gy_, R* crossings) {
    const Place p = place(T, C, L);
    R w[V], u[V];
    State s[V], own[V];
    int last[V];
    bool closed = false;
    UNROLL for (int j = 0; j < V; j++) {
        const int c = p.c + j;
        w[j] = w_[c] * LOG2E, u[j] = u_[c] * LOG2E, own[j] = nothing(), last[j] = -1;
        s[j] = get(states + (p.lane * ((T + S - 1) / S) + p.begin / S) * 3 * C + c, C);
    }
    for (int t = p.begin; t < p.end; t += S) {
        Row row = row_at(t, p, T, C, reset);
        if (closed) row.first = 0, row.plain = false;
        Tokens k, v, gy;
        load(k_, row, C, LOG2E, k), load(v_, row, C, R(1), v), load(gy_, row, C, R(1), gy);
        prefetch_row(k_, t + S, p, T, C), prefetch_row(v_, t + S, p, T, C), prefetch_row(gy_, t + S, p, T, C);
        R y[S][V], lse[S][V];
        go_through(row, true, w, u, k, v, gy, R(t - p.begin), s, y, lse, own, last);
        closed |= row.resets != 0;
    }
    UNROLL for (int j = 0; j < V; j++) {
        const Crossing by = {own[j], decay(w[j], p.end - p.begin, closed), R(last[j] >= 0)};
        put(crossings + p.stretch * 5 * C + p.c + j, C, by);
    }
}

// gk, gv; `initial`, the gradient of the state before the first token; and sums [B * stretches, 2, C], each stretch's
// part of the gradients of w and u. `end` and `gend` belong to the state after the last token.
KERNEL(ROWS, 2) backward(Size T, Size C, Size L, const R* w_, const R* u_, const X* k_, const X* v_,
                         const unsigned char* reset, const R* states, const R* end, const X* gy_, const R* gend,
                         const R* handed, X* gk, X* gv, R* sums, R* initial) {
    __shared__ R crossings[2][ROWS][V][5][WIDTH], after_tile[2][V][4][WIDTH], parts[ROWS][V][2][WIDTH];
    __shared__ R before_row[ROWS][V][3][WIDTH];  // each read by the thread that wrote it: registers are scarce
    const Place p = place(T, C, L);
    const int rows = blockDim.y, me = threadIdx.y, x = threadIdx.x;
    R w[V], u[V], gw[V], gu[V];
    UNROLL for (int j = 0; j < V; j++) {
        const Size c = p.c + j, at = p.lane * 3 * C + c;
        w[j] = w_[c] * LOG2E, u[j] = u_[c] * LOG2E, gw[j] = 0, gu[j] = 0;
        const Handed h = p.last ? from_the_end(get_natural(end + at, C), get_gradient(gend, at, C))
                                : get_handed(handed + p.stretch * 4 * C + c, C);
        if (me == 0) put(&after_tile[0][j][0][x], WIDTH, h);
    }
    int turn = 0;
    for (int t0 = p.begin + (p.end - p.begin - 1) / (rows * S) * (rows * S); t0 >= p.begin; t0 -= rows * S, turn ^= 1) {
        const Row row = row_at(t0 + me * S, p, T, C, reset);
        Tokens k, v, gy;
        load(k_, row, C, LOG2E, k), load(v_, row, C, R(1), v), load(gy_, row, C, R(1), gy);
        prefetch_row(k_, row.t - rows * S, p, T, C), prefetch_row(v_, row.t - rows * S, p, T, C);
        prefetch_row(gy_, row.t - rows * S, p, T, C);
        State s[V], own[V];
        int last[V];
        UNROLL for (int j = 0; j < V; j++) {
            const R* from = states + (p.lane * ((T + S - 1) / S) + row.t / S) * 3 * C + p.c + j;
            s[j] = row.n > 0 ? get(from, C) : nothing();
            put(&before_row[me][j][0][x], WIDTH, s[j]);
            own[j] = nothing(), last[j] = -1;
        }
        R y[S][V], lse[S][V];
        go_through(row, me > 0, w, u, k, v, gy, R(0), s, y, lse, own, last);
        UNROLL for (int j = 0; j < V; j++) {
            const Crossing by = {own[j], decay(w[j], row.n, row.resets), R(last[j] >= 0)};
            put(&crossings[turn][me][j][0][x], WIDTH, by);
        }
        __syncthreads();
        Adjoint g[V];
        R residual[V];
        UNROLL for (int j = 0; j < V; j++) {
            Handed h = get_handed(&after_tile[turn][j][0][x], WIDTH);
            for (int r = rows - 1; r > me; r--) cross(h, get_crossing(&crossings[turn][r][j][0][x], WIDTH));
            g[j] = {h.s.a, h.s.b, h.s.e, 0, 0}, residual[j] = h.residual;
        }
        bool plain = row.plain;
        UNROLL for (int j = 0; j < V; j++) plain &= residual[j] == 0;
        plain ? sweep<true>(row, w, u, k, v, gy, y, lse, last, residual, g, gw, gu, gk, gv, C)
              : sweep<false>(row, w, u, k, v, gy, y, lse, last, residual, g, gw, gu, gk, gv, C);
        UNROLL for (int j = 0; j < V; j++) {
            const State before = get(&before_row[me][j][0][x], WIDTH);
            const bool renewed = last[j] >= 0;  // from token `last` on the exponent only decayed, by w a token
            gw[j] += wkv4_close(before, g[j]) + residual[j] * R(row.n - (renewed ? last[j] + 1 : 0));
            const Handed h = {{g[j].ga, g[j].gb, g[j].f}, renewed ? R(0) : residual[j]};
            if (me == 0) put(&after_tile[turn ^ 1][j][0][x], WIDTH, h);
            if (row.t == 0) {
                State gs = wkv4_initial(before, g[j].ga, g[j].gb, g[j].f);
                gs.e += h.residual;
                put(initial + p.lane * 3 * C + p.c + j, C, gs);
            }
        }
    }
    UNROLL for (int j = 0; j < V; j++) parts[me][j][0][x] = gw[j], parts[me][j][1][x] = gu[j];
    __syncthreads();
    UNROLL for (int j = 0; j < V; j++) {
        for (int r = 1; r < rows; r++) gw[j] += parts[r][j][0][x], gu[j] += parts[r][j][1][x];
        R* to = sums + p.stretch * 2 * C + p.c + j;
        if (me == 0) to[0] = gw[j], to[C] = gu[j];
    }
}
#endif  // WKV_BACKWARD
