// Rounding of weights by rule `balanced`, as dsconv/numerics/balanced.py defines it, some rows at a time in cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace dsconv {

// The normal equations of a row's scales are of a size that grows with their square.
inline constexpr std::int64_t kMostTaps = 128;

struct WeightRows {
  const float* w;  // (taps, n, rows), rows of one kind of inputs side by side
  std::int64_t taps, n, rows, kinds;
};

// What is expected of the inputs, (n, kinds) each: dsconv.numerics.balanced.Model.
struct InputModel {
  const double *own, *shared, *mean;
};

struct BalancedRule {
  int bits;
  bool shift;
  double held;  // what holds a scale where it is, as a fraction of its part of the normal equations
};

struct Results {
  std::int8_t* q;        // (taps, n, rows)
  float *scale, *shift;  // (taps, rows)
};

// Some rows of one kind, as many as a kernel has lanes at most.
struct BalancedTask {
  WeightRows rows;
  InputModel model, regularized;
  BalancedRule rule;
  Results results;
  std::int64_t kind, first;
  int count;
  std::byte* memory;
};

struct BalancedKernel {
  int lanes;
  std::int64_t (*memory_bytes)(const WeightRows&, const BalancedRule&);
  void (*round)(const BalancedTask&);
};

// Rows are rounded for `regularized`, where by `model` that is no worse than without it.
void round_balanced(std::string_view isa, const WeightRows&, const InputModel& model, const InputModel& regularized,
                    const BalancedRule&, const Results&);

}  // namespace dsconv
