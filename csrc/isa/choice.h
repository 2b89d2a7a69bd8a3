#pragma once

#include <string_view>
#include <vector>

#include "../kernels/kernels.h"

namespace dsconv {

// Returns the kernels that this processor can run, of the weakest instruction set first.
std::vector<const Kernels*> usable_kernels();

// Returns the best of them whose instruction set is none above `at_most`, the value of DSCONV_MAX_ISA; empty: of any. Throws
// std::invalid_argument where that names no instruction set.
const Kernels& best_kernels(std::string_view at_most);

}  // namespace dsconv
