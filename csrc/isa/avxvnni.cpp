#include "../kernels/dot_256.h"
#include "list.h"

namespace dsconv::avxvnni {
namespace {

struct DotProduct {
  static constexpr bool kNibblePairs = false;

  static __m256i add(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
};

using Tile = DotTile<Dot256<DotProduct>>;

}  // namespace

constinit const Kernels kernels{
    .isa = "avxvnni", .mr = Tile::kMR<2>, .task_pixels = 96, .dot = dot<Tile>, .vector = x86_256::kernels};

}  // namespace dsconv::avxvnni
