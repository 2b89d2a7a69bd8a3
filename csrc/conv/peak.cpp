#include <algorithm>
#include <bit>
#include <chrono>
#include <numeric>
#include <vector>

#include "../scratch.h"
#include "conv.h"

namespace dsconv {

double peak_rate(const Kernels& kernels, double seconds) {
  constexpr int kDepth = 512, kRows = 24;  // weights and mantissas fit the first cache, and there is one block
  std::vector<float> kds(kPair, 1.0f), output(kRows * kPair);
  std::vector<Ends> ends(kRows, Ends{kOneAndHalf, std::bit_cast<float>(kOneAndHalf)});
  std::vector<std::int64_t> pixel(kRows);
  std::iota(pixel.begin(), pixel.end(), 0);
  const std::int64_t tap = 0;
  Sums t{};
  t.rows = {nullptr, ends.data(), nullptr, nullptr, kDepth, 1, false, false};
  t.octets = t.last_octets = kDepth / 8;
  t.panel_bytes = kDepth / 8 * 64;
  t.panels = 2;
  t.largest = 15;
  t.kds = kds.data();
  t.pixel = pixel.data();
  t.pixels = kRows;
  t.tap = &tap;
  t.taps = 1;
  t.output = output.data();
  // Where those of a layer lie: at multiples of 64.
  constexpr std::int64_t kMantissas = kRows * kDepth + kSlack, kWeights = 2 * kDepth / 8 * 64;
  const std::int64_t needed = kernels.workspace ? kernels.workspace(t) : 0;
  struct User;
  using Mine = Scratch<User>;
  Mine scratch(Mine::size<std::int8_t>(kMantissas) + Mine::size<std::uint8_t>(kWeights) + Mine::size<std::uint8_t>(needed));
  t.rows.mantissa = std::fill_n(scratch.take<std::int8_t>(kMantissas), kMantissas, std::int8_t{3}) - kMantissas;
  t.weight = std::fill_n(scratch.take<std::uint8_t>(kWeights), kWeights, std::uint8_t{0x5a}) - kWeights;
  t.workspace = scratch.take<std::uint8_t>(needed);
  using Clock = std::chrono::steady_clock;
  const auto elapsed = [](Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); };
  const auto begin = Clock::now();
  double best = 0.0;
  while (elapsed(begin) < seconds) {
    constexpr int kTimes = 100;
    const auto since = Clock::now();
    for (int i = 0; i < kTimes; ++i) kernels.sum(t);
    best = std::max(best, static_cast<double>(kTimes) * kRows * kPair * kDepth / elapsed(since));
  }
  return best;
}

}  // namespace dsconv
