#pragma once

#include <string_view>
#include <vector>

namespace dsconv {

// Returns the instruction sets that processor and operating system support, detected at run time, weakest first.
// x86-64: scalar, avx2, avxvnni, avx512vnni, amx. AArch64: scalar, neon, neondotprod.
std::vector<std::string_view> isa_found();

}  // namespace dsconv
