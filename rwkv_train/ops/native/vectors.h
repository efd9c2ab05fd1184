// Vectors as wide as registers, and products of small matrices in the first cache levels.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>

#include "jobs.h"

template <class R> struct Wide;  // vectors, and the indices that shuffle them
template <> struct Wide<float> {
    typedef float V __attribute__((vector_size(REGISTER)));
    typedef int32_t Index __attribute__((vector_size(REGISTER)));
};
template <> struct Wide<double> {
    typedef double V __attribute__((vector_size(REGISTER)));
    typedef int64_t Index __attribute__((vector_size(REGISTER)));
};

template <class R> using V = typename Wide<R>::V;
template <class R> constexpr int WIDTH = sizeof(V<R>) / sizeof(R);

template <class R> WKV_FN V<R> get(const R* from) {
    V<R> x;
    memcpy(&x, from, sizeof x);
    return x;
}

template <class R> WKV_FN void put(R* to, V<R> x) { memcpy(to, &x, sizeof x); }

// Memory for matrices of numbers whose rows begin where cache lines do.
template <class R> class Scratch {
    static constexpr std::align_val_t LINE{64};
    R* const memory;
    R* free;

  public:
    explicit Scratch(int64_t numbers) : memory(static_cast<R*>(::operator new(numbers * sizeof(R), LINE))), free(memory) {}
    ~Scratch() { ::operator delete(memory, LINE); }
    Scratch(const Scratch&) = delete;
    R* take(int64_t numbers) { return (free += numbers) - numbers; }
};

// Halves of stretches of 2 * W lanes of x and y: the lower ones, x's before y's, or (UPPER) the upper ones.
template <class R, int W, bool UPPER> WKV_FN V<R> halves(V<R> x, V<R> y) {
    typename Wide<R>::Index index;
    for (int l = 0; l < WIDTH<R>; l++) index[l] = l % (2 * W) < W ? l + UPPER * W : l + WIDTH<R> - W + UPPER * W;
#ifdef __clang__  // which has no such builtin for an index that is a variable, and finds the instruction itself
    V<R> out;
    for (int l = 0; l < WIDTH<R>; l++) out[l] = index[l] < WIDTH<R> ? x[index[l]] : y[index[l] - WIDTH<R>];
    return out;
#else
    return __builtin_shuffle(x, y, index);
#endif
}

// Lane l of the result is the sum over the lanes of x[l]; x[0], ..., x[WIDTH - 1] are used up.
template <class R, int W = WIDTH<R> / 2> WKV_FN V<R> sum_each(V<R>* x) {
    for (int i = 0; i < W; i++) x[i] = halves<R, W, false>(x[i], x[i + W]) + halves<R, W, true>(x[i], x[i + W]);
    if constexpr (W > 1) return sum_each<R, W / 2>(x);
    else return x[0];
}

// Rows and columns of the square x[0], ..., x[WIDTH - 1] change places.
template <class R, int W = WIDTH<R> / 2> WKV_FN void turn(V<R>* x) {
    for (int i = 0; i < WIDTH<R>; i++)
        if (!(i & W)) {
            const V<R> upper = halves<R, W, true>(x[i], x[i + W]);
            x[i] = halves<R, W, false>(x[i], x[i + W]);
            x[i + W] = upper;
        }
    if constexpr (W > 1) turn<R, W / 2>(x);
}

// `from` [rows, columns] becomes `to` [columns, rows]; both are multiples of a vector's width.
template <class R> static void transpose(int64_t rows, int64_t columns, const R* from, R* to) {
    for (int64_t i = 0; i < rows; i += WIDTH<R>)
        for (int64_t j = 0; j < columns; j += WIDTH<R>) {
            V<R> x[WIDTH<R>];
            for (int l = 0; l < WIDTH<R>; l++) x[l] = get(from + (i + l) * columns + j);
            turn<R>(x);
            for (int l = 0; l < WIDTH<R>; l++) put(to + (j + l) * rows + i, x[l]);
        }
}

// A matrix in memory, or its transpose: entry (i, j) is at[i * row + j * column].
template <class R> struct Matrix {
    const R* at;
    int64_t row, column;
};

// The product below for some rows of x and VECTORS of columns, from rows `from` to `to` of y.
template <class R, int ROWS, int VECTORS>
WKV_FN void add_tile(Matrix<R> x, int64_t from, int64_t to, const R* y, int64_t width, R* out, bool fresh) {
    V<R> sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = fresh ? V<R>{} : get(out + i * width + v * WIDTH<R>);
    for (int64_t k = from; k < to; k++) {
        V<R> line[VECTORS];
        for (int v = 0; v < VECTORS; v++) line[v] = get(y + k * width + v * WIDTH<R>);
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECTORS; v++) sum[i][v] += x.at[i * x.row + k * x.column] * line[v];
    }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) put(out + i * width + v * WIDTH<R>, sum[i][v]);
}

enum Shape { FULL, LOWER, UPPER };  // of x: which triangle of it is not zero

// out [rows, width] += x [rows, inner] times y [inner, width], or (fresh) = that; rows and width are multiples of 16.
template <class R>
static void add_product(int64_t rows, int64_t inner, int64_t width, Matrix<R> x, const R* y, R* out, bool fresh = false,
                        Shape shape = FULL) {
    constexpr int ROWS = REGISTER / 4;  // sums fill half of the registers
    for (int64_t j = 0; j < width; j += WIDTH<R>)
        for (int64_t i = 0; i < rows; i += ROWS) {
            const Matrix<R> part{x.at + i * x.row, x.row, x.column};
            const int64_t from = shape == UPPER ? i : 0, to = shape == LOWER ? i + ROWS : inner;
            add_tile<R, ROWS, 1>(part, from, to, y + j, width, out + i * width + j, fresh);
        }
}
