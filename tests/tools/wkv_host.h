// Runs the CUDA kernels on a CPU, block by block: what a test needs who has no GPU. Included before a .cu file.
//
// The threads of a block take turns, each up to the next __syncthreads(), in ascending order or in descending: a
// kernel that lacks a barrier reads what has not been written yet in one of the two.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>
#include <ucontext.h>

#define WKV_HOST
#define MEMBER inline
#define WKV_FN static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

template <class R> WKV_FN R wkv_exp(R x) { return std::exp2(x); }
template <class R> WKV_FN R wkv_log(R x) { return std::log2(x); }
template <class R> WKV_FN R wkv_sqrt(R x) { return std::sqrt(x); }
template <class R> WKV_FN R wkv_below(R x) { return -std::fabs(x); }
template <class R> WKV_FN R wkv_max(R x, R y) { return x > y ? x : y; }

template <class To, class From> WKV_FN To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
WKV_FN unsigned bits_of(float x) { return same_bits<unsigned>(x); }
WKV_FN float from_bits(unsigned x) { return same_bits<float>(x); }

// Finite halves: of a 10-bit mantissa, in steps of 2^-24 at the least.
WKV_FN float half_to_float(unsigned short x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const float size = std::ldexp(exponent ? 1024 + mantissa : mantissa, exponent ? exponent - 25 : -24);
    return x >> 15 ? -size : size;
}
WKV_FN unsigned short float_to_half(float x) {
    const int exponent = std::max(x == 0 ? -14 : std::ilogb(x), -14);
    const int bits = int(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent))) + (exponent + 14) * 1024;
    return std::min(bits, 0x7c00) | std::signbit(x) << 15;
}


template <class P> WKV_FN void advance(P*& p, long long by) { p += by; }
WKV_FN void hide(long long&) {}

// Touches what the GPU would: an address outside of the tensors is found by a sanitizer, or by luck.
WKV_FN void prefetch(const void* p) { (void)*static_cast<const volatile char*>(p); }

struct Index { unsigned x, y; };
static Index blockIdx, threadIdx, blockDim;

struct Thread {
    static constexpr size_t STACK = 1 << 18;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done;
    double handed[2];  // by turns, so that nobody writes what a slower thread has yet to read
    int turn;
};
static std::vector<Thread> threads(1024);
static ucontext_t scheduler;
static Thread* current;

static void __syncthreads() { swapcontext(&current->context, &scheduler); }
WKV_FN void __syncwarp() {}  // an exchange comes first, at which all have caught up

// All threads of a block come here equally often, as they must on a GPU.
template <class R> static R exchange(R x, int bit) {
    const int turn = current->turn ^= 1;
    current->handed[turn] = x;
    __syncthreads();
    return R(threads[(current - threads.data()) ^ bit].handed[turn]);
}

static const int64_t* arguments;
static void (*body)();
static void run_thread() {
    body();
    current->done = true;
}

template <class A> WKV_FN A argument(int64_t x) {
    if constexpr (std::is_pointer_v<A>) return reinterpret_cast<A>(x);
    else if constexpr (std::is_same_v<A, double>) return same_bits<double>(x);
    else return x;
}
template <class... A, size_t... I> void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(argument<A>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }

static void run_grid(void (*kernel)(), int blocks, int width, int rows, bool descending, const int64_t* args) {
    body = kernel, arguments = args;
    blockDim = {unsigned(width), unsigned(rows)};
    const int n = width * rows;
    for (blockIdx = {0, 0}; int(blockIdx.x) < blocks; blockIdx.x++) {
        for (int i = 0; i < n; i++) {
            Thread& thread = threads[i];
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = Thread::STACK;
            thread.context.uc_link = &scheduler, thread.done = false, thread.turn = 0;
            makecontext(&thread.context, run_thread, 0);
        }
        for (bool more = true; more;) {
            more = false;
            for (int i = 0; i < n; i++) {
                const int turn = descending ? n - 1 - i : i;
                current = &threads[turn];
                if (current->done) continue;
                threadIdx = {unsigned(turn % width), unsigned(turn / width)};
                swapcontext(&scheduler, &current->context);
                more |= !current->done;
            }
        }
    }
}

// One C function a kernel, with the grid, the order of the threads and the kernel's arguments.
#define HOST_KERNEL(name)                                                                                          \
    extern "C" void host_##name(int blocks, int width, int rows, bool descending, const int64_t* args) {           \
        run_grid([] { call(name); }, blocks, width, rows, descending, args);                                       \
    }
