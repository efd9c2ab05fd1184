// Matrices times a few vectors on the CPU, what generation consists of: plain C ABI, loaded by linear.py with ctypes.
//
// With one vector the limit is the memory that a matrix comes from, so every number of it is read once, by all threads;
// with several it is arithmetic, so what was read is used for all of them while it is in the cache. Arithmetic is in
// float; each result is summed in the same order however many vectors, products and threads there are.
#include <memory>
#include <vector>
#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "jobs.h"
#include "storage.h"

namespace {

typedef float V __attribute__((vector_size(REGISTER)));
typedef uint32_t Bits __attribute__((vector_size(REGISTER)));
typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2)));

constexpr int WIDTH = REGISTER / 4, PAIR = 2 * WIDTH;  // numbers of a vector, and that are taken at once
constexpr int ABREAST = 4;                             // vectors of a block, at most
constexpr int COLUMNS = 256, LANES = 16, ADDED = 4;     // sums of a job at once; rows that are added at once
constexpr int64_t EACH = 48;                           // rows of a job

WKV_FN V as_floats(Bits x) {
    V y;
    memcpy(&y, &x, sizeof y);
    return y;
}
// a b + c. Left to itself, the compiler rounds in between where it thinks that faster: in some of the loops below.
WKV_FN V fused(V a, V b, V c) {
#ifdef __AVX512F__
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}
template <class T, class S> WKV_FN T read(const S* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}
// PAIR numbers as two vectors: of floats one after the other, of 16 bits the even ones and the odd ones.
WKV_FN void take(const float* from, V (&to)[2]) { to[0] = read<V>(from), to[1] = read<V>(from + WIDTH); }
WKV_FN void take(const Bf16* from, V (&to)[2]) {
    const Bits x = read<Bits>(from);
    to[0] = as_floats(x << 16), to[1] = as_floats(x & 0xffff0000u);
}
// WIDTH numbers in their order.
WKV_FN V vector_of(const float* from) { return read<V>(from); }
WKV_FN V vector_of(const Bf16* from) {
    return as_floats(__builtin_convertvector(read<Halves>(from), Bits) << 16);
}

// A product that nothing is lost of, so that it does not matter which instructions the compiler adds it up with.
template <class S> WKV_FN double exact(S a, S b) { return double(load(a)) * load(b); }

WKV_FN float total(V x) {
    float part[WIDTH];
    memcpy(part, &x, sizeof x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int l = 0; l < half; l++) part[l] += part[l + half];
    return part[0];
}

template <class S> struct Product {  // as in linear.py
    int64_t n, rows, width, turned;
    const S *x, *matrix;  // [n,width]; [rows,width], or turned [width,rows]
    S* y;                 // [n,rows]
};

// Vectors as floats, in the order in which `take` gives them: [n, pairs * PAIR].
WKV_FN const float* taken(const Product<float>& p, std::unique_ptr<float[]>&, int64_t& stride) {
    stride = p.width;
    return p.x;
}
static const float* taken(const Product<Bf16>& p, std::unique_ptr<float[]>& own, int64_t& stride) {
    stride = p.width / PAIR * PAIR;
    own.reset(new float[p.n * stride]);
    for (int64_t i = 0; i < p.n; i++)
        for (int64_t j = 0; j < stride; j += PAIR) {
            V both[2];
            take(p.x + i * p.width + j, both);
            memcpy(own.get() + i * stride + j, both, sizeof both);
        }
    return own.get();
}

// ---- a matrix that lies row by row: each result is a row's product with a vector

template <class S> struct Rows {
    const Product<S>& p;
    const float* x;  // as `taken`
    int64_t stride;
};

// Results of R rows, each `step` behind the last, and G vectors; meanwhile LINES rows behind these are fetched.
template <int R, int G, int LINES, class S>
void block(const Rows<S>& in, int64_t row, int64_t step, int64_t first, int fetched) {
    const Product<S>& p = in.p;
    const int64_t whole = p.width / PAIR * PAIR;
    const S *w = p.matrix + row * p.width, *next = w + (fetched * step + (step == 1 ? R : 1)) * p.width;
    const float* x = in.x + first * in.stride;
    V sums[R][G] = {};
    for (int64_t j = 0; j < whole; j += PAIR) {
        for (int l = 0; l < LINES; l++) __builtin_prefetch(next + l * step * p.width + j, 0, 2);
        V xs[2][G];
        for (int g = 0; g < G; g++) xs[0][g] = read<V>(x + g * in.stride + j);
        for (int g = 0; g < G; g++) xs[1][g] = read<V>(x + g * in.stride + j + WIDTH);
        for (int r = 0; r < R; r++) {
            V ws[2];
            take(w + r * step * p.width + j, ws);
            for (int h = 0; h < 2; h++)
                for (int g = 0; g < G; g++) sums[r][g] = fused(ws[h], xs[h][g], sums[r][g]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) {
            double sum = total(sums[r][g]);
            for (int64_t j = whole; j < p.width; j++)
                sum += exact(w[r * step * p.width + j], p.x[(first + g) * p.width + j]);
            store(p.y[(first + g) * p.rows + row + r * step], float(sum));
        }
}

// R rows and all vectors, a group after the other; with each, some of the next rows are fetched.
template <int R, int LINES, class S> void strip(const Rows<S>& in, int64_t row, int64_t step) {
    for (int64_t first = 0; first < in.p.n; first += ABREAST) {
        const int64_t left = in.p.n - first;
        const int fetched = int(first / ABREAST * LINES);
        if (left == 1) block<R, 1, LINES>(in, row, step, first, fetched);
        if constexpr (R <= 6)
            if (left == 2) block<R, 2, LINES>(in, row, step, first, fetched);
        if constexpr (R <= 4)
            if (left == 3) block<R, 3, LINES>(in, row, step, first, fetched);
        if constexpr (R <= 3)
            if (left >= 4) block<R, 4, LINES>(in, row, step, first, fetched);
    }
}

// All rows but a rest, R abreast. For few vectors they lie apart, and each goes on being read where it left off: so
// memory is fastest. For many they are neighbours, which have other places in the cache.
template <int R, int LINES, class S> void strips(const Rows<S>& in, int64_t& row, int64_t end) {
    if (in.p.n > 2 * ABREAST) {
        for (; row + R <= end; row += R) strip<R, LINES>(in, row, 1);
        return;
    }
    const int64_t step = (end - row) / R;
    for (int64_t i = 0; i < step; i++) strip<R, LINES>(in, row + i, step);
    row += R * step;
}

// As many rows abreast as registers hold the sums of. What few rows of many vectors leave undone, fetching ahead does.
template <class S> void some_rows(const Rows<S>& in, int64_t job) {
    int64_t row = job * EACH;
    const int64_t end = row + EACH < in.p.rows ? row + EACH : in.p.rows;
    if (in.p.n == 1) strips<8, 0>(in, row, end);
    else if (in.p.n == 2) strips<6, 0>(in, row, end);
    else if (in.p.n == 3) strips<4, 2>(in, row, end);
    else if (in.p.n <= 2 * ABREAST) strips<3, 2>(in, row, end);
    else strips<3, 1>(in, row, end);
    strips<1, 0>(in, row, end);
}

// ---- a matrix that lies column by column: its rows, each times one number of a vector, are added up

// Adds R rows of the matrix, each `step` behind the last, to the sums [lanes][COLUMNS] of `columns` columns.
template <int R, class S>
void add_rows(const Product<S>& p, int64_t k, int64_t step, int64_t column, int columns, int64_t first, int64_t lanes,
              float* sums) {
    const S* w = p.matrix + k * p.rows + column;
    for (int64_t i = 0; i < lanes; i++, sums += COLUMNS) {
        V xs[R];
        for (int r = 0; r < R; r++) xs[r] = load(p.x[(first + i) * p.width + k + r * step]) - V{};
        for (int c = 0; c < columns; c += WIDTH) {
            V sum = read<V>(sums + c);
            for (int r = 0; r < R; r++) sum = fused(vector_of(w + r * step * p.rows + c), xs[r], sum);
            memcpy(sums + c, &sum, sizeof sum);
        }
    }
}

template <class S> void some_columns(const Product<S>& p, int64_t job) {
    const int64_t begin = job * COLUMNS, end = begin + COLUMNS < p.rows ? begin + COLUMNS : p.rows;
    const int columns = int(end - begin) / WIDTH * WIDTH;
    for (int64_t first = 0; first < p.n && columns; first += LANES) {
        const int64_t lanes = p.n - first < LANES ? p.n - first : LANES;
        float sums[LANES * COLUMNS];
        memset(sums, 0, size_t(lanes * COLUMNS) * sizeof(float));
        const int64_t step = p.width / ADDED;
        for (int64_t k = 0; k < step; k++) add_rows<ADDED>(p, k, step, begin, columns, first, lanes, sums);
        for (int64_t k = step * ADDED; k < p.width; k++) add_rows<1>(p, k, 0, begin, columns, first, lanes, sums);
        for (int64_t i = 0; i < lanes; i++)
            for (int c = 0; c < columns; c++) store(p.y[(first + i) * p.rows + begin + c], sums[i * COLUMNS + c]);
    }
    for (int64_t column = begin + columns; column < end; column++)
        for (int64_t i = 0; i < p.n; i++) {
            double sum = 0;
            for (int64_t k = 0; k < p.width; k++) sum += exact(p.x[i * p.width + k], p.matrix[k * p.rows + column]);
            store(p.y[i * p.rows + column], float(sum));
        }
}

template <class S> void multiply(const Product<S>* products, int64_t count, int threads) {
    const int64_t worth_a_thread = 1 << 18;  // bytes
    struct Part {
        Rows<S> rows;
        std::unique_ptr<float[]> own;
        int64_t jobs;
    };
    std::vector<Part> parts;
    int64_t bytes = 0, jobs = 0;
    for (const Product<S>* p = products; p < products + count; p++) {
        parts.push_back({{*p, nullptr, 0}, nullptr, 0});
        Part& part = parts.back();
        const int64_t each = p->turned ? COLUMNS : EACH;
        if (!p->turned) part.rows.x = taken(*p, part.own, part.rows.stride);
        jobs += part.jobs = (p->rows + each - 1) / each;
        bytes += p->rows * p->width * int64_t(sizeof(S));
    }
    share_out(jobs, threads, bytes / worth_a_thread, [&](int64_t job) {
        const Part* part = parts.data();
        for (; job >= part->jobs; part++) job -= part->jobs;
        if (part->rows.p.turned) some_columns(part->rows.p, job);
        else some_rows(part->rows, job);
    });
}

}  // namespace

extern "C" {
int most_vectors_bf16() {  // with more of them torch's product is faster; without instructions for them it is slow
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16)
    return 2;
#else
    return 16;
#endif
}
void products_f32(const Product<float>* p, int64_t count, int threads) { multiply(p, count, threads); }
void products_bf16(const Product<Bf16>* p, int64_t count, int threads) { multiply(p, count, threads); }
}
