#include "balanced.h"

#include <algorithm>

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {

namespace balanced_plain {
#define DSCONV_LANES 4
#include "balanced.inc"
}  // namespace balanced_plain

#if defined(__x86_64__)
namespace balanced_avx2 {
extern const BalancedKernel kernel;
}
namespace balanced_avx512 {
extern const BalancedKernel kernel;
}
#endif

namespace {

const BalancedKernel& kernel_of([[maybe_unused]] std::string_view isa) {
#if defined(__x86_64__)
  if (isa == "avx512vnni" || isa == "amx") return balanced_avx512::kernel;
  if (isa == "avx2" || isa == "avxvnni") return balanced_avx2::kernel;
#endif
  return balanced_plain::kernel;
}

}  // namespace

void round_balanced(std::string_view isa, const WeightRows& rows, const InputModel& model, const InputModel& regularized,
                    const BalancedRule& rule, const Results& results) {
  const BalancedKernel& kernel = kernel_of(isa);
  const std::int64_t bytes = kernel.memory_bytes(rows, rule);
  const std::int64_t of_kind = rows.rows / rows.kinds, parts = (of_kind + kernel.lanes - 1) / kernel.lanes;
  parallel(rows.kinds * parts, [&](std::int64_t task) {
    Scratch<BalancedTask> memory(bytes);
    const std::int64_t kind = task / parts, at = task % parts * kernel.lanes;
    const int count = static_cast<int>(std::min<std::int64_t>(kernel.lanes, of_kind - at));
    kernel.round({rows, model, regularized, rule, results, kind, kind * of_kind + at, count, memory.take<std::byte>(bytes)});
  });
}

}  // namespace dsconv
