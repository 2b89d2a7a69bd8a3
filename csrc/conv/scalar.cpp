// The reference that every other instruction set equals bit for bit.
#include "kernels.h"

namespace dsconv::scalar {

#include "quantize.inc"

static void tile(const Tile& t, int pixels) {
  for (int m = 0; m < pixels; ++m)
    for (int n = 0; n < 2 * kPanel; ++n) {
      const std::uint8_t* w = t.weight + (n / kPanel) * t.panel_bytes + 4 * (n % kPanel);
      const float* kds = t.kds + n;
      const float* shift = t.kds_shift ? t.kds_shift + n : nullptr;
      float y = 0.0f;
      for (int k = 0; k < t.taps; ++k) {
        const std::int64_t at = t.pixel[m] + t.tap[k];
        const std::int8_t* x = t.mantissa + at * t.row_bytes;
        for (int b = 0; b < t.blocks; ++b) {
          const int octets = b + 1 < t.blocks ? t.octets : t.last_octets;
          std::int32_t s = -t.zero * t.sum[at * t.blocks + b];
          for (int o = 0; o < octets; ++o, x += 8)
            if (t.wide) {
              for (int i = 0; i < 8; ++i) s += w[(i / 4) * 64 + i % 4] * x[i];
              w += 128;
            } else {
              for (int i = 0; i < 4; ++i) s += (w[i] & 15) * x[i] + (w[i] >> 4) * x[i + 4];
              w += 64;
            }
          const float scale = t.scale[at * t.blocks + b];
          y = __builtin_fmaf(*kds, static_cast<float>(s) * scale, y);
          kds += t.kds_stride;
          if (shift) {
            y = __builtin_fmaf(*shift, static_cast<float>(t.sum[at * t.blocks + b]) * scale, y);
            shift += t.kds_stride;
          }
        }
      }
      t.output[m * 2 * kPanel + n] = y;
    }
}

extern const Kernels kernels;
const Kernels kernels{"scalar", tile, quantize};

}  // namespace dsconv::scalar
