// Work items shared among threads: each worker makes its own scratch once, then takes the next item
// until none is left. Nobody spins: a worker ends with its last item, the caller sleeps until all
// have ended.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace vise {

// work(index, scratch) for index in 0..count-1 on at most `threads` threads, on fewer where the
// system gives no more. The first exception stops all and is rethrown.
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
    pool.reserve(helpers);
    try {
        for (std::size_t i = 1; i < helpers; ++i) pool.emplace_back(worker);
    } catch (const std::system_error&) {  // the threads that started do the work
    }
    worker();
    for (std::thread& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);
}

// range(first, last) over 0..count-1 in one stretch per thread; on one thread a plain call.
template <class Range>
void for_each_stretch(std::int64_t count, int threads, const Range& range) {
    struct None {};
    const std::int64_t stretch = (count + threads - 1) / std::max(threads, 1);
    if (threads <= 1 || stretch == 0) return range(std::int64_t{0}, count);
    for_each_parallel<None>((count + stretch - 1) / stretch, threads, [&](std::size_t i, None&) {
        const std::int64_t first = static_cast<std::int64_t>(i) * stretch;
        range(first, std::min(first + stretch, count));
    });
}

}  // namespace vise
