// A matrix times a few vectors on the CPU, what generation consists of: plain C ABI, loaded by linear.py with ctypes.
//
// Its limit is the memory that the matrix comes from, so every number of it is read once, by all threads. Arithmetic is
// in float; each result is summed in the same order however many vectors and threads there are.
#include <memory>

#include "jobs.h"
#include "storage.h"

namespace {

typedef float V __attribute__((vector_size(REGISTER)));
typedef uint32_t Bits __attribute__((vector_size(REGISTER)));

constexpr int WIDTH = REGISTER / 4, PAIR = 2 * WIDTH;  // numbers of a vector, and that are taken at once
constexpr int ROWS = 4;                                // of the matrix, abreast
constexpr int ABREAST = REGISTER / 32;                 // vectors: as many as the registers hold the sums of
constexpr int AHEAD = 4096;  // bytes that are asked for before their turn: the processor stops at the end of a page

WKV_FN V as_floats(Bits x) {
    V y;
    memcpy(&y, &x, sizeof y);
    return y;
}
// PAIR numbers as two vectors: of floats one after the other, of 16 bits the even ones and the odd ones.
WKV_FN void take(const float* from, V (&to)[2]) {  // not one memcpy: the compiler would let it go through memory
    memcpy(&to[0], from, sizeof to[0]), memcpy(&to[1], from + WIDTH, sizeof to[1]);
}
WKV_FN void take(const Bf16* from, V (&to)[2]) {
    Bits x;
    memcpy(&x, from, sizeof x);
    to[0] = as_floats(x << 16), to[1] = as_floats(x & 0xffff0000u);
}

template <class S> struct Product {
    int64_t n, rows, width;
    const S *x, *matrix;  // [n, width], [rows, width]
    S* y;                 // [n, rows]
};

// Results of R rows from `row` and G vectors from `first`. x: in the order in which `take` gives them.
template <int R, int G, class S> static void block(const Product<S>& p, const V* x, int64_t row, int64_t first) {
    const int64_t pairs = p.width / PAIR;
    const S* w = p.matrix + row * p.width;
    V sums[R][G][2] = {};
    for (int64_t j = 0; j < pairs; j++) {
        V xs[G][2];
        for (int g = 0; g < G; g++)
            for (int h = 0; h < 2; h++) xs[g][h] = x[((first + g) * pairs + j) * 2 + h];
        for (int r = 0; r < R; r++) {
            V ws[2];
            take(w + r * p.width + j * PAIR, ws);
            __builtin_prefetch(w + r * p.width + j * PAIR + AHEAD / sizeof(S));
            for (int g = 0; g < G; g++)
                for (int h = 0; h < 2; h++) sums[r][g][h] += ws[h] * xs[g][h];
        }
    }
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) {
            const V both = sums[r][g][0] + sums[r][g][1];
            float sum = 0;
            for (int l = 0; l < WIDTH; l++) sum += both[l];
            for (int64_t j = pairs * PAIR; j < p.width; j++)
                sum += load(w[r * p.width + j]) * load(p.x[(first + g) * p.width + j]);
            store(p.y[(first + g) * p.rows + row + r], sum);
        }
}

template <int R, class S> static void strip(const Product<S>& p, const V* x, int64_t row) {
    int64_t first = 0;
    for (; first + ABREAST <= p.n; first += ABREAST) block<R, ABREAST>(p, x, row, first);
    for (; first < p.n; first++) block<R, 1>(p, x, row, first);
}

template <class S> static void multiply(const Product<S>& p, int threads) {
    const int64_t worth_a_thread = 1 << 18, each = 16 * ROWS;  // bytes; rows of a job
    const int64_t bytes = p.rows * p.width * int64_t(sizeof(S)), pairs = p.width / PAIR;
    std::unique_ptr<V[]> x(new V[p.n * pairs * 2]);
    for (int64_t i = 0; i < p.n; i++)
        for (int64_t j = 0; j < pairs; j++)
            take(p.x + i * p.width + j * PAIR, *reinterpret_cast<V(*)[2]>(&x[(i * pairs + j) * 2]));
    share_out((p.rows + each - 1) / each, threads, bytes / worth_a_thread, [&](int64_t job) {
        int64_t row = job * each;
        const int64_t end = row + each < p.rows ? row + each : p.rows;
        for (; row + ROWS <= end; row += ROWS) strip<ROWS>(p, x.get(), row);
        for (; row < end; row++) strip<1>(p, x.get(), row);
    });
}

}  // namespace

extern "C" {
void linear_f32(const Product<float>* p, int threads) { multiply(*p, threads); }
void linear_bf16(const Product<Bf16>* p, int threads) { multiply(*p, threads); }
}
