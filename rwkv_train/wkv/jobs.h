// What the CPU kernels share: qualifiers, and sharing jobs out among threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#define WKV_FN static inline __attribute__((always_inline))

// Calls job(j) for all 0 <= j < jobs, on up to `threads` threads; any order, any thread.
template <class Job> static void share_out(int64_t jobs, int threads, Job job) {
    std::atomic<int64_t> next(0);
    auto work = [&] {
        for (int64_t j; (j = next++) < jobs;) job(j);
    };
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads && i < jobs; i++) others.emplace_back(work);
    } catch (const std::system_error&) {
        // no more threads to be had: those that run, and this one, do all the work
    }
    work();
    for (auto& thread : others) thread.join();
}
