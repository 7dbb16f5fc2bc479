// Loops over blocks of numbers by all threads. Exceptions may not leave an OpenMP region by themselves.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <type_traits>

struct Nothing {};

// Calls body(i0, i1), or body(i0, i1, scratch) with a thread's own Scratch, on blocks of [0, n) in parallel; the first
// exception of any thread is thrown again here. A single block is not worth waking up threads for.
template <class Scratch = Nothing, class Body>
void parallel_blocks(int64_t n, int64_t block, Body body) {
    std::exception_ptr error;
    std::atomic<bool> failed{false};
    const int64_t nblock = (n + block - 1) / block;
#pragma omp parallel if (nblock > 1)
    {
        std::unique_ptr<Scratch> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < nblock; b++) {
            if (failed) continue;
            try {
                if (!scratch) scratch.reset(new Scratch());
                const int64_t i0 = b * block, i1 = std::min(n, i0 + block);
                if constexpr (std::is_invocable_v<Body, int64_t, int64_t>)
                    body(i0, i1);
                else
                    body(i0, i1, *scratch);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
            }
        }
    }
    if (error) std::rethrow_exception(error);
}
