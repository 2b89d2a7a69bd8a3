// Runs independent tasks: on PyTorch's thread pool, on our own, or sequentially.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace dsconv {

using Range = void (*)(std::int64_t begin, std::int64_t end, void* context);
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);

// Runs the tasks; null means sequentially. Set before the first task; the child of a fork switches to its own pool.
inline std::atomic<ParallelFor> parallel_for{nullptr};

// Expected number of threads, for work whose total cost grows with the number of tasks.
inline std::atomic<int> expected_threads{4};

// Runs on a pool with the number of threads that pool_threads last set; it starts at its first use.
void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t grain, Range, void* context);
void pool_threads(int count);

// Threads take tasks dynamically, which balances tasks of different length. The first exception of a task is rethrown in
// the caller after all tasks have finished.
template <class Function>
void parallel(std::int64_t tasks, Function function) {
  struct Context {
    Function& function;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
  } all{function, tasks};
  // A thread continues until no task is left, regardless of its range.
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
