// Work items shared among threads: each worker makes its own scratch once, then takes the next item until none is left.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace vise {

// work(index, scratch) for index in 0..count-1 on at most `threads` threads. The first exception stops all and is rethrown.
template <class Scratch, class Work>
void for_each_parallel(std::size_t count, int threads, const Work& work) {
    std::atomic<std::size_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    auto worker = [&] {
        try {
            Scratch scratch;
            for (std::size_t i = next++; i < count; i = next++) work(i, scratch);
        } catch (...) {  // handed to the caller below
            std::lock_guard<std::mutex> lock(guard);
            if (!failure) failure = std::current_exception();
            next = count;
        }
    };
    std::size_t helpers = std::min<std::size_t>(std::max(threads, 1), count);
    std::vector<std::thread> pool;
    for (std::size_t i = 1; i < helpers; ++i) pool.emplace_back(worker);
    worker();
    for (std::thread& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace vise
