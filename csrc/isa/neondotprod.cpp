#include <bit>

#include "../kernels/dot_tile.h"
#include "../kernels/vector_kernels.h"
#include "../simd/neon.h"
#include "list.h"

namespace dsconv::neondotprod {
namespace {

// The dot products take signed bytes: a nibble is one already; a wide weight becomes one when its highest bit is
// flipped, and then needs no zero point.
struct Dot {
  using Vector = simd::Neon;
  static constexpr int kMR = 6, kMantissaBytes = 1;
  template <Weights W>
  static constexpr int kOctetBytes = W == Weights::nibbles ? 64 : 128;

  template <Weights W>
  static Vector::Int acc_init(const DotArgs& a, const BlockScale& scale, std::int64_t) {
    return Vector::broadcast(W == Weights::nibbles ? scale.acc_init
                             : a.rows.int_acc      ? 0
                                                   : std::bit_cast<std::int32_t>(scale.scale));
  }
  template <Weights W, int M>
  static void add_octets(const DotArgs&, const std::uint8_t* w, const std::int8_t* const (&x)[M], int octets,
                         Vector::Int (&acc)[M][kTileVectors]) {
    constexpr bool kWide = W != Weights::nibbles;
    const uint8x16_t low = vdupq_n_u8(15), flip = vdupq_n_u8(W == Weights::bytes ? 128 : 0);
    for (int o = 0; o < octets; ++o, w += kWide ? 128 : 64) {
      int8x16_t first[kTileVectors], second[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) {
        const uint8x16_t row = vld1q_u8(w + 16 * v);
        first[v] = vreinterpretq_s8_u8(kWide ? veorq_u8(row, flip) : vandq_u8(row, low));
        second[v] = vreinterpretq_s8_u8(kWide ? veorq_u8(vld1q_u8(w + 64 + 16 * v), flip) : vshrq_n_u8(row, 4));
      }
      for (int m = 0; m < M; ++m) {
        const int8x8_t q = vld1_s8(x[m] + 8 * o);
        for (int v = 0; v < kTileVectors; ++v) {
          const int32x4_t sum = vdotq_lane_s32(reinterpret_cast<int32x4_t>(acc[m][v]), first[v], q, 0);
          acc[m][v] = reinterpret_cast<Vector::Int>(vdotq_lane_s32(sum, second[v], q, 1));
        }
      }
    }
  }
};

using Tile = DotTile<Dot>;

constexpr VectorKernels vector = vector_kernels<simd::Neon>();

}  // namespace

constinit const Kernels kernels{.isa = "neondotprod", .mr = Tile::kMR<2>, .task_pixels = 96, .dot = dot<Tile>, .vector = vector};

}  // namespace dsconv::neondotprod
