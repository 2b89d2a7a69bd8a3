#include "balanced.h"

#include <algorithm>

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {

void round_balanced(const Kernels& kernels, const WeightRows& rows, const InputModel& model, const InputModel& regularized,
                    const BalancedRule& rule, const BalancedResults& results) {
  const std::int64_t lanes = kernels.vector.balanced_rows, bytes = kernels.vector.balanced_bytes(rows, rule);
  const std::int64_t of_kind = rows.rows / rows.kinds, parts = (of_kind + lanes - 1) / lanes;
  parallel(rows.kinds * parts, [&](std::int64_t task) {
    Scratch<BalancedArgs> memory(bytes);
    const std::int64_t kind = task / parts, at = task % parts * lanes;
    const int count = static_cast<int>(std::min<std::int64_t>(lanes, of_kind - at));
    kernels.vector.round_balanced(
        {rows, model, regularized, rule, results, kind, kind * of_kind + at, count, memory.take<std::byte>(bytes)});
  });
}

}  // namespace dsconv
