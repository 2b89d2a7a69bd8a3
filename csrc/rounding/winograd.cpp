#include "winograd.h"

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {

void round_winograd(const Kernels& kernels, const WinogradWeights& of, const WinogradIntegers& to) {
  const std::int64_t bytes = kernels.vector.winograd_weight_bytes(of);
  parallel(of.outputs, [&](std::int64_t output) {
    Scratch<WinogradWeightArgs> memory(bytes);
    kernels.vector.round_winograd({of, to, output, memory.take<std::byte>(bytes)});
  });
}

}  // namespace dsconv
