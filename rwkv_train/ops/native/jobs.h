// What the CPU kernels share: qualifiers, the width of vectors, and sharing jobs out among threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#define WKV_FN static inline __attribute__((always_inline))

// Bytes of a vector: as wide as a register. Wider ones run too, but what should stay in registers would not.
#ifdef __AVX512F__
constexpr int REGISTER = 64;
#else
constexpr int REGISTER = 32;
#endif

// The iterations of the next loop do not depend on each other. Not `omp simd`: GCC then keeps the small structs of the
// loop's body in memory, and gives up on loops like ours.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

// Runs a function on several threads, this one among them: OpenMP's way in, GOMP_parallel, of the library that torch has
// loaded; null until wkv_use_team (wkv4_cpu.cpp). Threads of our own would have to be started, 25 us each, and would
// fight for the cores with torch's, which wait for their next work in a loop.
inline void (*team)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

// Calls job(j) for all 0 <= j < jobs, in any order, on as many of `threads` threads as the work is `worth`.
template <class Job> static void share_out(int64_t jobs, int threads, int64_t worth, Job job) {
    std::atomic<int64_t> next(0);
    auto work = [&] {
        for (int64_t j; (j = next++) < jobs;) job(j);
    };
    if (worth > jobs) worth = jobs;
    if (threads < 2 || worth < 2) return work();
    using Work = decltype(work);
    if (team)  // always all of them: a team of another size is made anew
        return team([](void* work) { (*static_cast<Work*>(work))(); }, &work, unsigned(threads), 0);
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads && i < worth; i++) others.emplace_back(work);
    } catch (const std::system_error&) {
        // no more threads to be had: those that run, and this one, do all the work
    }
    work();
    for (auto& thread : others) thread.join();
}

// The same for jobs that read or write so many numbers together.
template <class Job> static void share_numbers(int64_t numbers, int64_t jobs, int threads, Job job) {
    const int64_t worth_a_thread = 1 << 16;
    share_out(jobs, threads, numbers / worth_a_thread, job);
}
