// The reference that every other instruction set equals bit for bit. It sums blocks of any exponent.
#include <algorithm>
#include <bit>

#include "kernels.h"
#include "quantized.h"

namespace dsconv::scalar {

#define DSCONV_LANES 4
#include "lanes.inc"

static Int narrowed(Int a, Int b, Int c, Int d) {
  const Int from[] = {a, b, c, d};
  Bytes to;
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int8_t>(std::clamp(from[i / 4][i % 4], -128, 127));
  return reinterpret_cast<Int>(to);
}
static Float fused(Float a, Float b, Float c) {
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}

#include "vector.inc"

static void sum(const Sums& t) {
  const Rows& rows = t.rows;
  for (int m = 0; m < t.pixels; ++m)
    for (int n = 0; n < t.panels * kPanel; ++n) {
      const std::uint8_t* w = t.weight + (n / kPanel) * t.panel_bytes + 4 * (n % kPanel);
      const float* kds = t.kds + n;
      const float* shift = t.kds_shift ? t.kds_shift + n : nullptr;
      float y = 0.0f;
      for (int k = 0; k < t.taps; ++k) {
        const std::int64_t at = t.pixel[m] + t.tap[k];
        const std::int8_t* x = rows.mantissa + at * rows.row_bytes;
        for (int b = 0; b < rows.blocks; ++b) {
          const int octets = b + 1 < rows.blocks ? t.octets : t.last_octets;
          const Ends& ends = rows.ends[at * rows.blocks + b];
          const float scale = scale_of(ends, rows.factors);
          std::int32_t s = rows.factors ? ends.start : ends.start - std::bit_cast<std::int32_t>(ends.end);
          for (int o = 0; o < octets; ++o, x += 8)
            if (rows.wide) {
              for (int i = 0; i < 8; ++i) s += w[(i / 4) * 64 + i % 4] * x[i];
              w += 128;
            } else {
              for (int i = 0; i < 4; ++i) s += (w[i] & 15) * x[i] + (w[i] >> 4) * x[i + 4];
              w += 64;
            }
          y = __builtin_fmaf(*kds, static_cast<float>(s) * scale, y);
          kds += kPair;
          if (shift) {
            y = __builtin_fmaf(*shift, rows.shifted[at * rows.blocks + b], y);
            shift += kPair;
          }
        }
      }
      t.output[m * kPair + n] = y;
    }
}

extern const Kernels kernels;
const Kernels kernels{"scalar",  kLanes,         6,   96,   nullptr, quantize_pixels, quantize_channels, sum, store, store_block,
                      depthwise, depthwise_line, map, pool, average};

}  // namespace dsconv::scalar
