// Runs independent tasks: on the threads of PyTorch, on a pool of our own, or one after another.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace dsconv {

using Range = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);

// Runs the tasks; null: one after another. Set before the first task; the child of a fork changes to its own pool.
inline std::atomic<ParallelFor> parallel_for{nullptr};

// How many threads tasks are expected to run on, for work that costs more the finer it is cut.
inline std::atomic<int> expected_threads{4};

// Runs on a pool of as many threads as pool_threads last asked for, which starts at its first use.
void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);
void pool_threads(int count);

// Threads take one task after another, so that none waits for another that has longer ones. The caller gets the first
// exception of a task when all others are done.
template <class Function>
void parallel(std::int64_t tasks, Function function) {
  struct Context {
    Function& function;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
  } all{function, tasks};
  // A thread goes on until nothing is left, whatever its range.
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
