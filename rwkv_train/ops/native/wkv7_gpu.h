// What the kernels of wkv7.cu are made of: where a thread works, sequences on their way in and out, rows of a matrix.
//
// Macros of the build, besides those of gpu.h: WKV_N, the head size, a multiple of 16; WKV_P, rows of a thread.
#pragma once

#include "gpu.h"
#include "wkv7.h"

constexpr int N = WKV_N, P = WKV_P, SHARE = 4;
constexpr int E = N / SHARE;            // entries of a row that a thread holds
constexpr int ROOM = 2048 / sizeof(R);  // numbers of a tile
constexpr int TILE = ROOM / N > 16 ? 16 : ROOM / N > 1 ? ROOM / N : 1;
constexpr int PIECES = N % (32 * P) ? 1 : N / (32 * P);  // blocks of a head, in wkv7_cuda.py too
constexpr int ROWS = N / PIECES, THREADS = ROWS * SHARE / P, STEP = ROWS / P;
constexpr bool AHEAD = sizeof(R) == 4;                        // whether there are registers for the next tile
constexpr int EACH = (TILE * N / 4 + THREADS - 1) / THREADS;  // fours of a tile that a thread moves

// Registers suffice for so many threads on a multiprocessor: 512 have 128 each, 256 all that a thread can have. There are
// the fewer the more of a state a thread holds; `most` is for two rows of 64.
constexpr int FITTING = !AHEAD || P * E > 32 ? 256 : P * E > 16 ? 384 : 512;
#define KERNEL(most)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, (P * E == 32 && P == 2 && AHEAD ? most : FITTING) / THREADS)

using Token = R[N];
using Rows = R[P][E];  // of S, G or their transposes
struct alignas(16) Tile {  // of tokens of a head, in shared memory
    Token tokens[TILE];
    MEMBER Token& operator[](int s) { return tokens[s]; }
    MEMBER const Token& operator[](int s) const { return tokens[s]; }
};

// Four neighbours, read and written as one.
template <class T> struct alignas(sizeof(T) == 2 ? 8 : 16) Pack { T x[4]; };
using Four = Pack<R>;
template <class T> WKV_FN Pack<T>& pack(T& first) { return reinterpret_cast<Pack<T>&>(first); }
template <class T> WKV_FN const Pack<T>& pack(const T& first) { return reinterpret_cast<const Pack<T>&>(first); }

// ---- where a thread works

// The block's rows begin at `first`, and the thread's are row, row + STEP, ... Of each it has every fourth four, from the
// one with the number `quarter` on. Eight neighbours have the same, so that they read one four of a token.
struct Place {
    Size token, stride, matrix;  // of the head in a [B, T, H, N] and in a [B, H, N, N]
    Size head, lane;
    int first, row, quarter;

    MEMBER Place(Size T, Size H) {
        head = blockIdx.x / PIECES, lane = head / H;
        token = (lane * T * H + head % H) * N, stride = H * N, matrix = head * N * N;
        first = blockIdx.x % PIECES * ROWS, row = first + threadIdx.x / 32 * 8 + threadIdx.x % 8;
        quarter = threadIdx.x / 8 % SHARE;
    }
};

// ---- sequences

// The fours of a tile that a thread moves, in shared memory; the last may lie beyond it.
WKV_FN int spot(int j) { return (threadIdx.x + j * THREADS) * 4; }

// A tile in global memory, [B, T, H, N]. It has n tokens, of them none before the first and after the last.
struct Part {
    int t, T, n, step;  // `step` numbers are between it and the next
    Size at;            // of the thread's first four

    MEMBER Part(const Place& p, int t, int T) : t(t), T(T), step(int(p.stride) * TILE) {
        at = p.token + t * p.stride + (spot(0) / N * int(p.stride) + spot(0) % N), count();
    }
    MEMBER void count() { n = t < 0 || t >= T ? 0 : T - t < TILE ? T - t : TILE; }
    MEMBER void move(int tiles) { t += tiles * TILE, at += tiles * step, hide(at), count(); }
    MEMBER bool has(int j) const { return spot(j) < n * N; }
    MEMBER Size four(int j) const {
        return at + (spot(j) / N - spot(0) / N) * (step / TILE) + (spot(j) % N - spot(0) % N);
    }
};

// A four that waits in registers. Numbers of 16 bits share them: unpacked, the compiler would give each its own.
template <class T, bool SHORT = sizeof(T) == 2> struct Waiting {
    Pack<T> x;
    MEMBER R operator[](int i) const { return real(x.x[i]); }
};
template <class T> struct alignas(8) Waiting<T, true> {
    unsigned pairs[2];
    MEMBER R operator[](int i) const { return real(T{static_cast<unsigned short>(pairs[i / 2] >> i % 2 * 16)}); }
};

// A sequence on its way to shared memory: a thread's fours of the next tile wait.
template <class From, bool DECAY = false> struct Stream {
    const From* from;
    Tile& to;
    Waiting<From> next[EACH];

    MEMBER Stream(const From* from, Tile& to) : from(from), to(to), next() {}
    MEMBER void load(const Part& part) {
        UNROLL for (int j = 0; j < EACH; j++) {
            if (!AHEAD) next[j] = {};
            if (part.has(j)) next[j] = *reinterpret_cast<const Waiting<From>*>(from + part.four(j));
        }
    }
    MEMBER void put() const {
        UNROLL for (int j = 0; j < EACH; j++) {
            Four out;
            UNROLL for (int i = 0; i < 4; i++) out.x[i] = ready(next[j][i]);
            if (TILE * N / 4 % THREADS == 0 || spot(j) < TILE * N) pack(to[0][spot(j)]) = out;
        }
    }
    MEMBER static R ready(R x) { return DECAY ? wkv_exp(x * R(1.4426950408889634)) : x; }
};
using Decays = Stream<R, true>;

template <class From> struct Optional : Stream<From> {  // zeros if null
    MEMBER Optional(const From* from, Tile& to) : Stream<From>(from, to) {}
    MEMBER void load(const Part& part) {
        if (this->from) Stream<From>::load(part);
    }
};

struct Resets {  // whether tokens open a document; none if null
    const unsigned char* from;
    bool (&to)[TILE];
    bool next;

    MEMBER Resets(const unsigned char* reset, const Place& p, Size T, bool (&to)[TILE])
        : from(reset ? reset + p.lane * T : nullptr), to(to), next(false) {}
    MEMBER void load(const Part& part) {
        if (from && int(threadIdx.x) < part.n) next = from[part.t + int(threadIdx.x)];
    }
    MEMBER void put() const {
        if (threadIdx.x < TILE) to[threadIdx.x] = next;
    }
};

// Several of these.
template <class... Each> struct All {
    MEMBER void load(const Part&) {}
    MEMBER void put() const {}
};
template <class First, class... Rest> struct All<First, Rest...> {
    First first;
    All<Rest...> rest;

    MEMBER All(First first, Rest... rest) : first(first), rest(rest...) {}
    MEMBER void load(const Part& part) { first.load(part), rest.load(part); }
    MEMBER void put() const { first.put(), rest.put(); }
};
template <class... Each> All(Each...) -> All<Each...>;

// A tile's tokens are in shared memory after this, and the next one's, a tile in that direction, on their way.
template <class In> WKV_FN void fetch(In& in, Part& part, int direction) {
    if (!AHEAD) in.load(part);
    in.put();
    __syncthreads();
    if (AHEAD) part.move(direction), in.load(part), part.move(-direction);
}

// The block's rows of a tile.
template <class To> WKV_FN void flush(const Tile& from, const Place& p, const Part& part, To* to) {
    UNROLL for (int j = 0; j < EACH; j++) {
        if (!part.has(j) || unsigned(spot(j) % N - p.first) >= ROWS) continue;
        const Four in = pack(from[0][spot(j)]);
        Pack<To> out;
        UNROLL for (int i = 0; i < 4; i++) store(in.x[i], out.x[i]);
        pack(to[part.four(j)]) = out;
    }
}

// ---- rows of a matrix

WKV_FN void empty(Rows& x) {
    asm volatile("");  // so that it is jumped over; else every token would choose between each number and 0
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e++) x[i][e] = 0;
}
// The thread's rows of a matrix, `at` numbers from the first, or of its transpose; zeros if there are none.
WKV_FN void get_rows(const R* from, Size at, const Place& p, Rows& to) {
    if (!from) return empty(to);
    from += at + p.row * N + p.quarter * 4;
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e += 4) pack(to[i][e]) = pack(from[i * STEP * N + e * SHARE]);
}
WKV_FN void get_columns(const R* from, Size at, const Place& p, Rows& to) {
    if (!from) return empty(to);
    from += at + p.row + p.quarter * 4 * N;
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e++) to[i][e] = from[i * STEP + (e / 4 * SHARE * 4 + e % 4) * N];
}
WKV_FN void put_rows(const Rows& from, const Place& p, R* to, Size at) {
    to += at + p.row * N + p.quarter * 4;
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e += 4) pack(to[i * STEP * N + e * SHARE]) = pack(from[i][e]);
}

WKV_FN const Four& four(const Token& token, const Place& p, int e) { return pack(token[e * SHARE + p.quarter * 4]); }
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
            sum += exchange(sum, 8);
            to[i] = sum + exchange(sum, 16);
        }
    }
};
// Of rows and rows.
WKV_FN void products(const Rows& x, const Rows& y, R (&to)[P]) {
    Sums sums;
    UNROLL for (int i = 0; i < P; i++)
        UNROLL for (int e = 0; e < E; e++) sums.x[i][e % 4] += x[i][e] * y[i][e];
    sums.total(to);
}
