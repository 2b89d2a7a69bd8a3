#include <immintrin.h>

#include "x86_vectors.h"

namespace dsconv::avxvnni {

using namespace x86_256;

static constexpr bool kPairs = false;
static constexpr int kVectors = 2;

static inline __m256i dot(__m256i s, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(s, w, x); }

#include "x86_256.inc"

template <int P>
constexpr int kHeight = 3;
#include "sum_by_height.inc"

extern const Kernels kernels;
const Kernels kernels{"avxvnni", kWidth,         3,   96,   nullptr, quantize_pixels, quantize_channels, sum, store, store_block,
                      depthwise, depthwise_line, map, pool, average};

}  // namespace dsconv::avxvnni
