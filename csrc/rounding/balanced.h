// Rounds weights by rule `balanced`, as defined in dsconv/numerics/balanced.py, a few rows at a time in cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/kernels.h"

namespace dsconv {

// The memory of a row's normal equations grows with the square of its taps.
inline constexpr std::int64_t kMostTaps = 128;

struct WeightRows {
  const float* w;  // (taps, n, rows), with rows of one kind of inputs adjacent
  std::int64_t taps, n, rows, kinds;
};

// Expected moments of the inputs, (n, kinds) each: dsconv.numerics.balanced.Model.
struct InputModel {
  const double *own, *shared, *mean;
};

struct BalancedRule {
  int bits;
  bool shift;
  double held;  // regularization that holds a scale at its value, as a fraction of its part of the normal equations
};

struct BalancedResults {
  std::int8_t* q;        // (taps, n, rows)
  float *scale, *shift;  // (taps, rows)
};

// Rows of one kind, at most VectorKernels::balanced_rows.
struct BalancedArgs {
  WeightRows rows;
  InputModel model, regularized;
  BalancedRule rule;
  BalancedResults results;
  std::int64_t kind, first;
  int count;
  std::byte* memory;
};

// Rounds rows for `regularized`; a row that is worse according to `model` than with rule `refined` uses that rule.
void round_balanced(const Kernels&, const WeightRows&, const InputModel& model, const InputModel& regularized, const BalancedRule&,
                    const BalancedResults&);

}  // namespace dsconv
