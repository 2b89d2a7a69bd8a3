// Runs independent tasks: on the threads that PyTorch has, on a pool of our own, or one after another.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace dsconv {

using Range = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);

// What runs the tasks; null is one after another. Set before the first task; the child of a fork changes to its own pool.
inline std::atomic<ParallelFor> parallel_for{nullptr};

// Runs on a pool that is made when first used, of as many threads as were last asked for with pool_threads.
void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);
void pool_threads(int count);

// Threads take one task after another, so that none waits for another that has longer ones. What a task throws is thrown
// to the caller when all others are done, the first of several.
template <class Function>
void parallel(std::int64_t tasks, Function function) {
  struct Context {
    Function& function;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
  } all{function, tasks};
  // Whatever range a thread is given, it goes on until nothing is left.
  const auto run = [](std::int64_t, std::int64_t, void* context) {
    Context& c = *static_cast<Context*>(context);
    try {
      for (std::int64_t i; !c.failed && (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.tasks;) c.function(i);
    } catch (...) {
      if (!c.failed.exchange(true)) c.error = std::current_exception();
    }
  };
  const ParallelFor on_threads = parallel_for;
  if (on_threads && tasks > 1) on_threads(0, tasks, 1, run, &all);
  else run(0, tasks, &all);
  if (all.failed) std::rethrow_exception(all.error);
}

}  // namespace dsconv
