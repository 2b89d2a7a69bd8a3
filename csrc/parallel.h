// Runs independent tasks on the threads that PyTorch has, or one after another.
#pragma once

#include <cstdint>

namespace dsconv {

using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                             void (*)(std::int64_t, std::int64_t, void*), void*);

inline ParallelFor parallel_for_of_host = nullptr;

template <class Function>
void parallel(std::int64_t tasks, Function function) {
  const auto run = [](std::int64_t begin, std::int64_t end, void* context) {
    for (std::int64_t i = begin; i < end; ++i) (*static_cast<Function*>(context))(i);
  };
  if (parallel_for_of_host && tasks > 1)
    parallel_for_of_host(0, tasks, 1, run, &function);
  else
    run(0, tasks, &function);
}

}  // namespace dsconv
