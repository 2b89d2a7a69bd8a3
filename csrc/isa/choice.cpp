#include "choice.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "detect.h"
#include "list.h"

namespace dsconv {

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
  for (const std::string_view found : isa_found())
    for (const Kernels* const kernels : kBuiltKernels)
      if (found == kernels->isa) usable.push_back(kernels);
  return usable;
}

const Kernels& best_kernels(std::string_view at_most) {
  // The order of dsconv/ops/native.py.
  static constexpr std::string_view kKnown[] = {"scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "neondotprod"};
  const auto place = [](std::string_view isa) { return std::find(std::begin(kKnown), std::end(kKnown), isa); };
  if (!at_most.empty() && place(at_most) == std::end(kKnown)) {
    std::string names;
    for (const std::string_view isa : kKnown) names += (names.empty() ? "" : ", ") + std::string(isa);
    throw std::invalid_argument("DSCONV_MAX_ISA: expected one of " + names + ", got '" + std::string(at_most) + "'");
  }
  const Kernels* best = nullptr;
  for (const Kernels* const kernels : usable_kernels())
    if (at_most.empty() || place(kernels->isa) <= place(at_most)) best = kernels;
  return best ? *best : scalar::kernels;
}

}  // namespace dsconv
