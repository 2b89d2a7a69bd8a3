#include <bit>

#include "../kernels/dot.h"
#include "../kernels/vector_kernels.h"
#include "../simd/neon.h"
#include "list.h"

namespace dsconv::neondotprod {
namespace {

// Signed weights of an octet of eight outputs, values 0 to 3 and values 4 to 7. The dot products are of signed bytes: a nibble is
// one as it stands; a wide weight becomes one when its highest bit is flipped, and then needs no zero point.
struct OctetWeights {
  int8x16_t first[2], second[2];
};
template <bool Wide>
inline OctetWeights load_octet(const std::uint8_t* w) {
  const uint8x16_t low = vdupq_n_u8(15), flip = vdupq_n_u8(128);
  OctetWeights o;
  for (int v = 0; v < 2; ++v) {
    const uint8x16_t row = vld1q_u8(w + 16 * v);
    if constexpr (Wide) {
      o.first[v] = vreinterpretq_s8_u8(veorq_u8(row, flip));
      o.second[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 64 + 16 * v), flip));
    } else {
      o.first[v] = vreinterpretq_s8_u8(vandq_u8(row, low));
      o.second[v] = vreinterpretq_s8_u8(vshrq_n_u8(row, 4));
    }
  }
  return o;
}

// A tile of M x 8 outputs.
template <int M, bool Wide, bool Shift>
void tile(const DotArgs& a, const std::int64_t* row, const std::uint8_t* w, const float* kds, const float* shift, float* sums) {
  const QuantizedRows& rows = a.rows;
  float32x4_t y[M][2];
  for (int m = 0; m < M; ++m) y[m][0] = y[m][1] = vdupq_n_f32(0.0f);
  for (int k = 0; k < a.taps; ++k) {
    const std::int8_t* x[M];
    std::int64_t block[M];
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = row[m] + a.tap_row[k];
      x[m] = rows.mantissa + at * rows.row_bytes;
      block[m] = at * rows.blocks;
    }
    for (int b = 0; b < rows.blocks; ++b) {
      int32x4_t acc[M][2];
      for (int m = 0; m < M; ++m) {
        const BlockScale& scale = rows.scale[block[m] + b];
        const std::int32_t wide_init = rows.int_acc ? 0 : std::bit_cast<std::int32_t>(scale.scale);
        acc[m][0] = acc[m][1] = vdupq_n_s32(Wide ? wide_init : scale.acc_init);
      }
      const int octets = b + 1 < rows.blocks ? a.octets : a.last_octets;
      for (int o = 0; o < octets; ++o, w += Wide ? 128 : 64) {
        const OctetWeights weights = load_octet<Wide>(w);
        for (int m = 0; m < M; ++m) {
          const int8x8_t q = vld1_s8(x[m] + 8 * o);
          for (int v = 0; v < 2; ++v) {
            acc[m][v] = vdotq_lane_s32(acc[m][v], weights.first[v], q, 0);
            acc[m][v] = vdotq_lane_s32(acc[m][v], weights.second[v], q, 1);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        x[m] += 8 * octets;
        const float scale = rows.scale[block[m] + b].scale;
        for (int v = 0; v < 2; ++v) {
          const float32x4_t term = Wide && rows.int_acc ? vmulq_n_f32(vcvtq_f32_s32(acc[m][v]), scale)
                                                        : vsubq_f32(vreinterpretq_f32_s32(acc[m][v]), vdupq_n_f32(scale));
          y[m][v] = vfmaq_f32(y[m][v], vld1q_f32(kds + 4 * v), term);
          if constexpr (Shift) {
            const float32x4_t shift_term = vdupq_n_f32(rows.shift_term[block[m] + b]);
            y[m][v] = vfmaq_f32(y[m][v], vld1q_f32(shift + 4 * v), shift_term);
          }
        }
      }
      kds += kNR;
      if constexpr (Shift) shift += kNR;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) vst1q_f32(sums + m * kNR + 4 * v, y[m][v]);
}

struct Tile {
  template <int Panels>
  static constexpr int kMR = 6;

  template <int M, int Panels, bool Wide, bool Shift>
  static void run(const DotArgs& a, const std::int64_t* row, float* sums) {
    for (int n = 0; n < Panels * kPanel; n += 8)
      tile<M, Wide, Shift>(a, row, a.weight + (n / kPanel) * a.panel_bytes + 4 * (n % kPanel), a.kds + n,
                           Shift ? a.kds_shift + n : nullptr, sums + n);
  }
};

constexpr VectorKernels vector = vector_kernels<simd::Neon>();

}  // namespace

constinit const Kernels kernels{.isa = "neondotprod", .mr = Tile::kMR<2>, .task_pixels = 96, .dot = dot<Tile>, .vector = vector};

}  // namespace dsconv::neondotprod
