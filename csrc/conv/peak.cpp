#include <algorithm>
#include <bit>
#include <chrono>
#include <numeric>
#include <vector>

#include "../scratch.h"
#include "conv.h"

namespace dsconv {

double peak_rate(const Kernels& kernels, double seconds) {
  constexpr int kDepth = 512, kRows = 24, kPanelBytes = kDepth / 8 * 64;  // weights and mantissas fit in the L1 cache
  std::vector<float> kds(kNR, 1.0f), sums(kRows * kNR);
  std::vector<BlockScale> scales(kRows, BlockScale{kMagicBits, std::bit_cast<float>(kMagicBits)});
  std::vector<std::int64_t> row(kRows);
  std::iota(row.begin(), row.end(), 0);
  const std::int64_t tap = 0;
  DotArgs a{};
  a.rows.scale = scales.data(), a.rows.row_bytes = kDepth, a.rows.blocks = 1;
  a.octets = a.last_octets = kDepth / 8;
  a.panel_bytes = kPanelBytes, a.panels = 2;
  a.octets_together = octets_together(4);
  a.kds = kds.data();
  a.row = row.data(), a.pixels = kRows;
  a.tap_row = &tap, a.taps = 1;
  a.sums = sums.data();
  // Data is aligned to 64 bytes, as in layers.
  constexpr std::int64_t kMantissas = kRows * kDepth + kReadPastEnd, kWeights = 2 * kPanelBytes;
  const std::int64_t needed = kernels.workspace_bytes ? kernels.workspace_bytes(a) : 0;
  struct User;
  using Mine = Scratch<User>;
  Mine scratch(Mine::size<std::int8_t>(kMantissas) + Mine::size<std::uint8_t>(kWeights) + Mine::size<std::uint8_t>(needed));
  a.rows.mantissa = std::fill_n(scratch.take<std::int8_t>(kMantissas), kMantissas, std::int8_t{3}) - kMantissas;
  a.weight = std::fill_n(scratch.take<std::uint8_t>(kWeights), kWeights, std::uint8_t{0x5a}) - kWeights;
  a.workspace = scratch.take<std::uint8_t>(needed);
  using Clock = std::chrono::steady_clock;
  const auto elapsed = [](Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); };
  const auto begin = Clock::now();
  double best = 0.0;
  while (elapsed(begin) < seconds) {
    constexpr int kTimes = 100;
    const auto since = Clock::now();
    for (int i = 0; i < kTimes; ++i) kernels.dot(a);
    best = std::max(best, static_cast<double>(kTimes) * kRows * kNR * kDepth / elapsed(since));
  }
  return best;
}

}  // namespace dsconv
