// Runs independent tasks: on the threads that PyTorch has, on a pool of our own, or one after another.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace dsconv {

using Range = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);

// What runs the tasks; null is one after another. Set before the first task.
inline ParallelFor parallel_for = nullptr;

// Runs on a pool that is made when first used, of as many threads as were last asked for with pool_threads.
void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);
void pool_threads(int count);

// What a task throws is thrown to the caller when all others are done, the first of several.
template <class Function>
void parallel(std::int64_t tasks, Function function) {
  struct Context {
    Function& function;
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
  } all{function};
  const auto run = [](std::int64_t begin, std::int64_t end, void* context) {
    Context& c = *static_cast<Context*>(context);
    try {
      for (std::int64_t i = begin; i < end && !c.failed; ++i) c.function(i);
    } catch (...) {
      if (!c.failed.exchange(true)) c.error = std::current_exception();
    }
  };
  if (parallel_for && tasks > 1)
    parallel_for(0, tasks, 1, run, &all);
  else
    run(0, tasks, &all);
  if (all.failed) std::rethrow_exception(all.error);
}

}  // namespace dsconv
