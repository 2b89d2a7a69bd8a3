// The reference, whose results all other instruction sets reproduce bit for bit. It supports blocks of any exponent.
#include "../simd/scalar.h"

#include <bit>

#include "../conv/quantized.h"
#include "../kernels/vector_kernels.h"
#include "list.h"

namespace dsconv::scalar {
namespace {

// The sum of one output.
float dot_one(const DotArgs& a, const std::int64_t row, const std::uint8_t* w, const float* kds, const float* shift) {
  const QuantizedRows& rows = a.rows;
  const int flip = rows.flipped ? -128 : 0;
  float y = 0.0f;
  for (int k = 0; k < a.taps; ++k) {
    const std::int64_t at = row + a.tap_row[k];
    const std::int8_t* x = rows.mantissa + at * rows.row_bytes;
    for (int b = 0; b < rows.blocks; ++b) {
      const int octets = b + 1 < rows.blocks ? a.octets : a.last_octets;
      const BlockScale& scale = rows.scale[at * rows.blocks + b];
      std::int32_t s = a.flip_sums ? 0 : rows.int_acc ? scale.acc_init : scale.acc_init - std::bit_cast<std::int32_t>(scale.scale);
      for (int o = 0; o < octets; ++o, x += 8)
        if (rows.wide) {
          for (int i = 0; i < 8; ++i) {
            const int q = a.flip_sums ? static_cast<std::int8_t>(w[(i / 4) * 64 + i % 4]) : w[(i / 4) * 64 + i % 4];
            s += q * (x[i] ^ flip);
          }
          w += 128;
        } else {
          for (int i = 0; i < 4; ++i) s += (w[i] & 15) * x[i] + (w[i] >> 4) * x[i + 4];
          w += 64;
        }
      y = __builtin_fmaf(*kds, static_cast<float>(s) * exact_scale(scale, rows.int_acc), y);
      kds += kNR;
      if (shift) {
        y = __builtin_fmaf(*shift, rows.shift_term[at * rows.blocks + b], y);
        shift += kNR;
      }
    }
  }
  return y;
}

void dot(const DotArgs& a) {
  for (int m = 0; m < a.pixels; ++m)
    for (int n = 0; n < a.panels * kPanel; ++n)
      a.sums[m * kNR + n] = dot_one(a, a.row[m], a.weight + (n / kPanel) * a.panel_bytes + 4 * (n % kPanel), a.kds + n,
                                    a.kds_shift ? a.kds_shift + n : nullptr);
}

constexpr VectorKernels vector = vector_kernels<simd::Scalar>();

}  // namespace

constinit const Kernels kernels{.isa = "scalar", .mr = 6, .task_pixels = 96, .dot = dot, .vector = vector};

}  // namespace dsconv::scalar
