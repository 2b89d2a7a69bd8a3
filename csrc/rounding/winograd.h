// Rounds the transformed weights of Winograd to integers, as dsconv/numerics/winograd.py defines them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/kernels.h"

namespace dsconv {

struct WinogradWeights {
  const float* w;                              // (outputs, channels, 3, 3)
  std::int64_t outputs, channels, block_size;  // a block is no larger than all channels

  std::int64_t blocks() const { return (channels + block_size - 1) / block_size; }
};

struct WinogradIntegers {
  std::int8_t* q;  // (kWinogradProducts, outputs, channels)
  float* scale;    // (kWinogradProducts, outputs, blocks)
};

// One output.
struct WinogradWeightArgs {
  WinogradWeights of;
  WinogradIntegers to;
  std::int64_t output;
  std::byte* memory;
};

void round_winograd(const Kernels&, const WinogradWeights&, const WinogradIntegers&);

}  // namespace dsconv
