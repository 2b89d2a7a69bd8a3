#include <arm_neon.h>

#include <bit>

#include "kernels.h"

namespace dsconv::neondotprod {

#define DSCONV_LANES 4
#include "lanes.inc"

static inline Int narrowed(Int a, Int b, Int c, Int d) {
  const auto words = [](Int a, Int b) {
    return vcombine_s16(vqmovn_s32(reinterpret_cast<int32x4_t>(a)), vqmovn_s32(reinterpret_cast<int32x4_t>(b)));
  };
  return reinterpret_cast<Int>(vcombine_s8(vqmovn_s16(words(a, b)), vqmovn_s16(words(c, d))));
}
static inline Float fused(Float a, Float b, Float c) {
  return reinterpret_cast<Float>(
      vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
}

#include "vector.inc"

// Eight outputs at a time. The dot products are of signed bytes: a nibble is one as it stands, a wide weight becomes one
// when its highest bit is flipped, and then stands for itself.
template <int M, bool Wide, bool Shift>
static void eight(const Sums& t, const std::int64_t* pixel, const std::uint8_t* w, const float* kds, const float* shift,
                  float* output) {
  const uint8x16_t low = vdupq_n_u8(15), flip = vdupq_n_u8(128);
  const Rows& rows = t.rows;
  float32x4_t y[M][2];
  for (int m = 0; m < M; ++m) y[m][0] = y[m][1] = vdupq_n_f32(0.0f);
  for (int k = 0; k < t.taps; ++k) {
    const std::int8_t* x[M];
    std::int64_t block[M];
    for (int m = 0; m < M; ++m) {
      const std::int64_t at = pixel[m] + t.tap[k];
      x[m] = rows.mantissa + at * rows.row_bytes;
      block[m] = at * rows.blocks;
    }
    for (int b = 0; b < rows.blocks; ++b) {
      int32x4_t s[M][2];
      for (int m = 0; m < M; ++m) {
        const Ends& ends = rows.ends[block[m] + b];
        const std::int32_t start = Wide ? rows.factors ? 0 : std::bit_cast<std::int32_t>(ends.end) : ends.start;
        s[m][0] = s[m][1] = vdupq_n_s32(start);
      }
      const int octets = b + 1 < rows.blocks ? t.octets : t.last_octets;
      for (int o = 0; o < octets; ++o, w += Wide ? 128 : 64) {
        int8x16_t first[2], second[2];
        for (int v = 0; v < 2; ++v) {
          const uint8x16_t row = vld1q_u8(w + 16 * v);
          if constexpr (Wide) {
            first[v] = vreinterpretq_s8_u8(veorq_u8(row, flip));
            second[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 64 + 16 * v), flip));
          } else {
            first[v] = vreinterpretq_s8_u8(vandq_u8(row, low));
            second[v] = vreinterpretq_s8_u8(vshrq_n_u8(row, 4));
          }
        }
        for (int m = 0; m < M; ++m) {
          const int8x8_t q = vld1_s8(x[m] + 8 * o);
          for (int v = 0; v < 2; ++v) {
            s[m][v] = vdotq_lane_s32(s[m][v], first[v], q, 0);
            s[m][v] = vdotq_lane_s32(s[m][v], second[v], q, 1);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        x[m] += 8 * octets;
        const float e = rows.ends[block[m] + b].end;
        for (int v = 0; v < 2; ++v) {
          const float32x4_t term = Wide && rows.factors ? vmulq_n_f32(vcvtq_f32_s32(s[m][v]), e)
                                                        : vsubq_f32(vreinterpretq_f32_s32(s[m][v]), vdupq_n_f32(e));
          y[m][v] = vfmaq_f32(y[m][v], vld1q_f32(kds + 4 * v), term);
          if constexpr (Shift) {
            const float32x4_t shifted = vdupq_n_f32(rows.shifted[block[m] + b]);
            y[m][v] = vfmaq_f32(y[m][v], vld1q_f32(shift + 4 * v), shifted);
          }
        }
      }
      kds += kPair;
      if constexpr (Shift) shift += kPair;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) vst1q_f32(output + m * kPair + 4 * v, y[m][v]);
}

template <int M, int P, bool Wide, bool Shift>
static void tile(const Sums& t, const std::int64_t* pixel, float* output) {
  for (int n = 0; n < P * kPanel; n += 8)
    eight<M, Wide, Shift>(t, pixel, t.weight + (n / kPanel) * t.panel_bytes + 4 * (n % kPanel), t.kds + n,
                          Shift ? t.kds_shift + n : nullptr, output + n);
}

template <int P>
constexpr int kHeight = 6;
#include "sum_by_height.inc"

extern const Kernels kernels;
const Kernels kernels{
    "neondotprod", kLanes,         6,   96,   nullptr, quantize_pixels, quantize_channels, sum, store, store_block,
    depthwise,     depthwise_line, map, pool, average};

}  // namespace dsconv::neondotprod
