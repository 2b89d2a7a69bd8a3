#include "conv.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

namespace dsconv {

namespace {

// So many bytes from an address on that is a multiple of 64, as those of a layer are.
class Aligned {
 public:
  Aligned(std::size_t bytes, std::uint8_t value) : memory_(bytes + 64, value) {}
  std::uint8_t* data() { return memory_.data() + (64 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 64) % 64; }

 private:
  std::vector<std::uint8_t> memory_;
};

}  // namespace

double peak_rate(const Kernels& kernels, double seconds) {
  constexpr int kDepth = 512, kRows = 24;  // weights and mantissas fit the first cache, and there is one block
  Aligned mantissa(kRows * kDepth + kSlack, 3), weight(2 * kDepth / 8 * 64, 0x5a);
  std::vector<float> scale(kRows, 1.0f), kds(kPair, 1.0f), output(kRows * kPair);
  std::vector<std::int32_t> start(kRows, 0);
  std::vector<std::int64_t> pixel(kRows);
  std::iota(pixel.begin(), pixel.end(), 0);
  const std::int64_t tap = 0;
  Sums t{};
  t.rows = {reinterpret_cast<std::int8_t*>(mantissa.data()), scale.data(), start.data(), nullptr, kDepth, 1, 8};
  t.octets = t.last_octets = kDepth / 8;
  t.weight = weight.data();
  t.panel_bytes = kDepth / 8 * 64;
  t.panels = 2;
  t.largest = 15;
  t.kds = kds.data();
  t.pixel = pixel.data();
  t.pixels = kRows;
  t.tap = &tap;
  t.taps = 1;
  t.output = output.data();
  Aligned workspace(kernels.workspace ? kernels.workspace(t) : 0, 0);
  t.workspace = workspace.data();
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
