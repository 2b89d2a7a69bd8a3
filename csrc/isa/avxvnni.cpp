#include "../kernels/dot_256.h"
#include "list.h"

namespace dsconv::avxvnni {
namespace {

struct DotProduct {
  static constexpr bool kNibblePairs = false;

  static __m256i add(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
  static __m256i add_octet(__m256i acc, __m256i w0, __m256i w1, __m256i x0, __m256i x1) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, x0, w0), x1, w1);
  }
};

using Tile = DotTile<Dot256<DotProduct>>;

}  // namespace

constinit const Kernels kernels{.isa = "avxvnni",
                                .mr = Tile::kMR<2>,
                                .task_pixels = 96,
                                .dot = dot<Tile>,
                                .dot_one_block = dot_one_block<OneBlock256<DotProduct>>,
                                .flip_winograd = true,
                                .vector = x86_256::kernels};

}  // namespace dsconv::avxvnni
