// Weights and KDS in the order in which kernels read them.
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "../parallel.h"
#include "conv.h"

namespace dsconv {
namespace {

// Returns the taps in packing order: phase by phase.
std::vector<std::int64_t> tap_order(const ConvSizes& g) {
  std::vector<std::int64_t> order(g.taps());
  std::iota(order.begin(), order.end(), 0);
  if (!g.transposed) return order;
  const auto keys = [&](std::int64_t tap) {
    return std::array{g.axis_d().key(tap / g.kernel_w / g.kernel_h), g.axis_h().key(tap / g.kernel_w % g.kernel_h),
                      g.axis_w().key(tap % g.kernel_w)};
  };
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return keys(a) < keys(b); });
  return order;
}

// An octet of 16 outputs takes 64 bytes, or 128 if wide.
void pack_panel(const ConvSizes& g, const std::vector<std::int64_t>& order, const std::int8_t* vqk, bool wide, std::int64_t group,
                std::int64_t panel, std::int64_t tap_bytes, std::uint8_t* packed) {
  const int zero = g.winograd ? 0 : wide ? kWideZeroPoint : kZeroPoint;
  const std::int64_t taps = g.taps(), depth = g.layout().depth, outputs = g.group_outputs();
  for (std::int64_t t = 0; t < taps; ++t, packed += tap_bytes)
    for (std::int64_t octet = 0; octet < g.layout().row_octets(); ++octet) {
      std::uint8_t* const to = packed + octet * (wide ? 128 : 64);
      for (int n = 0; n < kPanel; ++n) {
        const std::int64_t output = panel * kPanel + n;
        std::uint8_t eight[8];
        for (int i = 0; i < 8; ++i) {
          const std::int64_t k = octet * 8 + i;
          const bool inside = output < outputs && k < depth;
          eight[i] =
              static_cast<std::uint8_t>(zero + (inside ? vqk[((group * outputs + output) * depth + k) * taps + order[t]] : 0));
        }
        if (wide) {
          std::memcpy(to + 4 * n, eight, 4);
          std::memcpy(to + 64 + 4 * n, eight + 4, 4);
        } else {
          for (int i = 0; i < 4; ++i) to[4 * n + i] = eight[i] | eight[i + 4] << 4;
        }
      }
    }
}

// Corrections for flipped mantissas, which are larger by 128, in the order of KDS.
void pack_flip_sums(const ConvSizes& g, const std::int8_t* q, std::int32_t* packed) {
  const BlockLayout layout = g.layout();
  const std::int64_t taps = g.taps(), blocks = layout.blocks();
  parallel(g.panel_pairs() * kNR, [&](std::int64_t n) {
    for (std::int64_t tap = 0; tap < taps; ++tap)
      for (std::int64_t b = 0; b < blocks; ++b) {
        std::int32_t sum = 0;
        for (std::int64_t c = b * layout.block_size; n < g.outputs && c < b * layout.block_size + layout.size(b); ++c)
          sum += q[(n * layout.depth + c) * taps + tap];
        packed[((n / kNR * taps + tap) * blocks + b) * kNR + n % kNR] = -kWinogradShift * sum;
      }
  });
}

}  // namespace

void pack_weight(const ConvSizes& g, const std::int8_t* vqk, int bits, std::uint8_t* packed) {
  const bool wide = bits > 4;
  const std::int64_t depth = g.layout().depth, panels = 2 * g.panel_pairs();
  if (g.depthwise()) {
    std::memset(packed, 0, g.packed_bytes(wide));
    for (std::int64_t n = 0; n < g.outputs; ++n)
      for (std::int64_t k = 0; k < depth; ++k) {
        const std::int32_t q = vqk[n * depth + k];
        std::memcpy(packed + (k * g.outputs + n) * sizeof q, &q, sizeof q);
      }
    return;
  }
  const std::vector<std::int64_t> order = tap_order(g);
  parallel(g.groups * panels, [&](std::int64_t i) {
    // Winograd reads all outputs of a pair of panels product by product.
    const std::int64_t tap_bytes = g.panel_bytes(wide) / g.taps();
    const std::int64_t first = g.winograd ? i / 2 * 2 * g.panel_bytes(wide) + i % 2 * tap_bytes : i * g.panel_bytes(wide);
    pack_panel(g, order, vqk, wide, i / panels, i % panels, g.winograd ? 2 * tap_bytes : tap_bytes, packed + first);
  });
  if (g.winograd) pack_flip_sums(g, vqk, reinterpret_cast<std::int32_t*>(packed + g.panels_bytes(wide)));
}

void pack_kds(const ConvSizes& g, const float* kds, float* packed) {
  const std::int64_t taps = g.taps(), blocks = g.layout().blocks(), outputs = g.group_outputs();
  if (g.depthwise()) {
    std::fill_n(packed, g.kds_count(), 0.0f);
    for (std::int64_t n = 0; n < g.outputs; ++n)
      for (std::int64_t b = 0; b < blocks; ++b) packed[b * g.outputs + n] = kds[n * blocks + b];
    return;
  }
  const std::vector<std::int64_t> order = tap_order(g);
  for (std::int64_t group = 0; group < g.groups; ++group)
    for (std::int64_t pair = 0; pair < g.panel_pairs(); ++pair)
      for (const std::int64_t tap : order)
        for (std::int64_t b = 0; b < blocks; ++b)
          for (std::int64_t n = pair * kNR; n < (pair + 1) * kNR; ++n)
            *packed++ = n < outputs ? kds[((group * outputs + n) * blocks + b) * taps + tap] : 0.0f;
}

}  // namespace dsconv
