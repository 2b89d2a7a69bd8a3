#pragma once

#include <string_view>
#include <vector>

#include "../kernels/kernels.h"

namespace dsconv {

// Returns the kernels that this processor can run, from the weakest instruction set to the strongest.
std::vector<const Kernels*> usable_kernels();

// Returns the best of them up to instruction set `at_most`, the value of DSCONV_MAX_ISA; empty means no limit. Throws
// std::invalid_argument if the value is not an instruction set.
const Kernels& best_kernels(std::string_view at_most);

}  // namespace dsconv
