// All operators over one vector type. Their instantiation takes long to compile, so instruction sets with the same
// vectors share it.
#pragma once

#include "balanced.h"
#include "depthwise.h"
#include "epilogue.h"
#include "interpolate.h"
#include "map.h"
#include "moments.h"
#include "pool.h"
#include "quantize.h"
#include "winograd.h"
#include "winograd_weight.h"

namespace dsconv {

template <class V>
constexpr VectorKernels vector_kernels() {
  return {
      .lanes = V::kLanes,
      .quantize_nchw = quantize_nchw<V>,
      .quantize_nhwc = quantize_nhwc<V>,
      .epilogue = epilogue<V>,
      .epilogue_quantize = epilogue_quantize<V>,
      .depthwise = depthwise<V>,
      .depthwise_line = depthwise_line<V>,
      .map = map<V>,
      .pool = pool<V>,
      .average = average<V>,
      .interpolate = interpolate<V>,
      .moments = moments<V>,
      .winograd_input = winograd_input<V>,
      .winograd_output = winograd_output<V>,
      .balanced_rows = V::kDoubles,
      .balanced_bytes = balanced_bytes<V>,
      .round_balanced = round_balanced_rows<V>,
      .winograd_weight_bytes = winograd_weight_bytes<V>,
      .round_winograd = round_winograd_output<V>,
  };
}

}  // namespace dsconv
