// Runs independent tasks: on the threads that PyTorch has, on a pool of our own, or one after another.
#pragma once

#include <cstdint>

namespace dsconv {

using Range = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);

// What runs the tasks; null is one after another. Set before the first task.
inline ParallelFor parallel_for = nullptr;

// Runs on a pool that is made when first used, of as many threads as were last asked for with pool_threads.
void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);
void pool_threads(int count);

template <class Function>
void parallel(std::int64_t tasks, Function function) {
  const auto run = [](std::int64_t begin, std::int64_t end, void* context) {
    for (std::int64_t i = begin; i < end; ++i) (*static_cast<Function*>(context))(i);
  };
  if (parallel_for && tasks > 1)
    parallel_for(0, tasks, 1, run, &function);
  else
    run(0, tasks, &function);
}

}  // namespace dsconv
