// Arguments and tables of the kernels. Kernels are stateless: they allocate no memory, start no threads and do not depend on
// image sizes. Offsets locate pixels, so that the caller handles padding, stride, dilation and groups.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace dsconv {

inline constexpr int kPanel = 16;        // outputs in a packed row of weights
inline constexpr int kNR = 2 * kPanel;   // outputs per call of dot, and the row length of KDS and sums
inline constexpr int kReadPastEnd = 64;  // bytes after the last mantissa that kernels may read
inline constexpr int kMaxLanes = 16;
inline constexpr int kMaxTaskPixels = 384;
inline constexpr int kMaxBlockSize = 512;

enum class Sign : int { adaptive, extra, included };  // the order of ACTIVATION_SIGNS in Python
inline constexpr int kSigns = static_cast<int>(Sign::included) + 1;
// In the order of ACTIVATIONS in Python. Those from kRareActivation on are called as functions, not inlined in epilogues.
enum class Activation : int {
  none,
  relu,
  clamp,
  leaky_relu,
  hardswish,
  silu,
  hardsigmoid,
  sigmoid,
  elu,
  exp,
  gelu,
  gelu_tanh,
  mish,
  softplus,
  tanh
};
inline constexpr Activation kRareActivation = Activation::hardsigmoid;
inline constexpr int kActivations = static_cast<int>(Activation::tanh) + 1;
struct ActivationSettings {
  Activation kind;
  float alpha, beta;  // the bounds of a clamp; alpha is the slope of a leaky ReLU, and that of an ELU
};

// Weights are stored as unsigned numbers, q + zero point: as nibbles up to 4 bits, otherwise ("wide") as bytes; Winograd
// weights as signed bytes.
enum class Weights : int { nibbles, bytes, signed_bytes };
inline constexpr int kZeroPoint = 8, kWideZeroPoint = 128;

// Stands for the bits of activations that stay float32.
inline constexpr int kFloatBits = 32;
// The largest magnitude of a mantissa. 8 bits always include the sign.
constexpr int max_mantissa(int bits) { return bits == 8 ? 128 : (1 << bits) - 1; }
constexpr int octets_together(int bits) { return 32767 / (4 * 15 * max_mantissa(bits)); }

// The scale 2^e of a block of a pixel, and the initial value of the accumulators. `acc_init` contains the zero-point correction,
// -zero_point times the sum of the mantissas, and is not used with signed weights. `scale` is a NaN for a block that is not finite.
// Accumulators have one of two forms:
// - magic, where |S| < 2^22: `scale` is 1.5 * 2^(23 + e), and acc_init contains its bits too. The accumulator ends as
//   the bits of the float scale + S * 2^e. Subtracting `scale`, which is exact, replaces a conversion and a product.
// - integer, for wide weights and large blocks: `scale` is 2^e, a factor of the converted accumulator.
struct BlockScale {
  std::int32_t acc_init;
  float scale;
};
// Bits of 1.0f, of the magic number for e = 0, and of the NaN, which differs from every magic number, even an
// overflowing one.
inline constexpr std::uint32_t kOneBits = 0x3f800000, kMagicBits = 0x4b400000, kNanBits = 0x7fffffff;
inline constexpr int kMaxMagicExponent = 104;  // a larger e overflows the magic number

// The quantized input: a row of mantissas for each pixel of the zero-bordered image, and the scales of its blocks.
struct QuantizedRows {
  std::int8_t* mantissa;   // [rows][row_bytes]
  BlockScale* scale;       // [rows][blocks]
  std::uint8_t* overflow;  // [blocks], not 0 if a magic number overflows: the reference kernel computes such layers
  float* shift_term;       // [rows][blocks], 2^e * sum of the mantissas; null without a shift
  std::int64_t row_bytes;
  int blocks;
  bool wide;     // weights
  bool int_acc;  // integer accumulators
  bool flipped;  // mantissas are stored with the highest bit flipped: as unsigned bytes, larger by 128
};

// One block of some pixels to quantize into rows.
struct QuantizeArgs {
  int channels, bits;
  Sign sign;
  const std::int64_t* row;  // of each pixel
  int pixels;
  QuantizedRows rows;
  int block;
  std::int64_t first_byte;  // of the block in a row of mantissas
};

// Dot products of consecutive output pixels with one or two panels of weights, over all taps and blocks.
struct DotArgs {
  QuantizedRows rows;
  int octets, last_octets;     // groups of eight values in a block, and in the last one
  const std::uint8_t* weight;  // the first panel
  std::int64_t panel_bytes;    // offset of the second panel
  int panels;                  // 1 or 2
  int octets_together;         // of nibbles, whose pairwise 16-bit products can be added before they are widened
  // For signed weights, otherwise null: [taps * blocks][kNR], the correction for flipped mantissas, which are larger by 128.
  const std::int32_t* flip_sums;
  const float* kds;             // [taps * blocks][kNR]
  const float* kds_shift;       // the same, or null
  const std::int64_t* row;      // of each output pixel: the row of its first tap
  int pixels;                   // output pixels
  const std::int64_t* tap_row;  // of each tap: the distance in rows from the first
  int taps;
  float* sums;            // [pixels][kNR]
  const float* prefetch;  // kNR floats of each pixel that the epilogue accesses next, at offset prefetch_place; or null
  const std::int64_t* prefetch_place;
  std::uint8_t* workspace;  // of workspace_bytes, aligned to 64

  Weights weights() const { return flip_sums ? Weights::signed_bytes : rows.wide ? Weights::bytes : Weights::nibbles; }
};

// Turns a sum into an output: activation((sum + bias) * gain + offset + residual), with one rounding of product and
// offset. Pointers may be null; gain and offset, from a BatchNorm, are both given or both null.
struct PostOps {
  const float *bias, *gain, *offset;
  ActivationSettings activation;

  PostOps from(std::int64_t output) const {
    const auto at = [output](const float* p) { return p ? p + output : nullptr; };
    return {at(bias), at(gain), at(offset), activation};
  }
};

// The bounds of an activation that only clamps; NaN stays NaN.
struct Bounds {
  float low, high;
};
constexpr bool has_bounds(Activation a) { return a == Activation::none || a == Activation::relu || a == Activation::clamp; }
constexpr Bounds bounds_of(const ActivationSettings& a) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (a.kind == Activation::clamp) return {a.alpha, a.beta};
  return {a.kind == Activation::none ? -kInfinity : 0.0f, kInfinity};
}

struct EpilogueArgs {
  const float* sums;  // [pixels][kNR]
  int pixels, outputs;
  const std::int64_t* place;  // of each pixel in the output
  const std::int64_t* residual_place;
  std::int64_t channel_stride;  // between the outputs of a pixel, and between its residuals
  PostOps post;
  const float* residual;  // or null
  float* output;
};

// An operation on values x and an operand b: x + b, x - b, b - x, x * b, x / b, b / x, x * b + offset rounded once, x if
// it is positive and otherwise x * b; or on all channels of a pixel: layer norm with weights b and the offset, and softmax.
// In the order of OPERATIONS in Python.
enum class Operation : int {
  activate,
  add,
  subtract,
  subtract_from,
  multiply,
  divide,
  divide_by,
  scale,
  slope,
  normalize,
  softmax
};
inline constexpr int kOperations = static_cast<int>(Operation::softmax) + 1;

// Pixels in NHWC. The output may be the input.
struct MapArgs {
  Operation operation;
  const float* input;
  std::int64_t input_stride;      // between pixels, in values, as all pixel strides
  const float *operand, *offset;  // null if the operation has none; the offset is per channel
  std::int64_t operand_stride;    // 0: all pixels share one
  bool one_operand;               // shared by all channels of a pixel
  float* output;
  std::int64_t output_stride;
  std::int64_t pixels, channels;
  ActivationSettings activation;  // for layer norm, alpha is added to the variance
};

// For an image, the mean of each group of neighbouring channels over all pixels, and the reciprocal of its standard deviation
// times the weight of the channel.
struct MomentsArgs {
  const float* input;
  std::int64_t stride, pixels, channels, group;  // channels per group, a divisor of all channels
  const float* weight;                           // of each channel, or null
  float epsilon;                                 // added to the variance
  float *mean, *scale;                           // of each channel
};

// One output pixel of a pooling: the maximum of its taps, where NaN is greater than all numbers, or their average.
struct PoolArgs {
  const float* const* tap;
  int taps;
  std::int64_t channels;
  float divisor;  // of an average; 0 for the maximum
  float* output;
  float second_divisor = 1.0f;  // of the first quotient
};

// The order of the four products of an interpolation: within lines and then between them, or sequentially.
enum class Interpolation : int { lines, above_first, below_first };
inline constexpr int kInterpolations = static_cast<int>(Interpolation::below_first) + 1;

// One pixel between four others, in NHWC.
struct InterpolateArgs {
  const float* tap[4];  // left and right above, and below
  float weight_y[2], weight_x[2];
  std::int64_t channels, split;
  Interpolation first, rest;  // of the channels before `split`, and of those from `split` on
  float* output;
};

// The average of each channel over all pixels, in the order in which PyTorch sums contiguous values with vectors of
// `lanes`: value i is added to one of 4 * lanes partial sums, and long sums are sums of shorter ones. Results depend on
// `lanes`, not on the instruction set.
struct AverageArgs {
  const float* input;
  std::int64_t stride, pixels, channels;
  int lanes;  // 1 to kMaxLanes
  float* output;
};

// Winograd's F(2x2, 3x3): a tile of 4x4 pixels of the input, and the positions of its transform.
inline constexpr int kWinogradPositions = 16, kWinogradProducts = kWinogradPositions + 1;
// The position that sums four pixels: if none of its values is negative, mantissas have 8 bits without a sign. They are
// stored minus kWinogradShift, which a KDS shift compensates.
// The last product is a second one of this position, with the rounding residuals of the first weights.
inline constexpr int kWinogradCentre = 5, kWinogradShift = 128;

// One block of a tile to transform and quantize.
struct WinogradInputArgs {
  const float* const* pixel;  // [16], from the block's first channel on
  int channels;
  QuantizedRows rows;  // the row of the centre gets a term of the shift
  std::int64_t row;    // of the first position
  std::int64_t apart;  // distance in rows between positions
  int block;
  std::int64_t first_byte;  // of the block in a row of mantissas
  float* values;            // [16][channels], scratch memory
};

struct WinogradOutputArgs {
  const float* sums;  // [17][tiles][kNR]
  int tiles;
  const int* pixel;  // [tiles][4]: the rows of `outputs` of a tile's pixels; -1: none
  float* outputs;    // [pixels][kNR]
};

// Depthwise convolution of up to `lanes` neighbouring outputs: of that many filters (by_channel), or of neighbouring
// pixels of one filter. Weights, KDS and post-ops of filters are contiguous, and are read up to kMaxLanes beyond the
// last one.
struct DepthwiseArgs {
  const float* const* tap;  // lane i reads tap[k][first + i]
  std::int64_t first;
  int lanes;  // number of stored lanes; kMaxLanes are read
  bool by_channel;
  int taps, block_size;
  int bits;  // or kFloatBits, for pixels of one filter with one block and no shift
  Sign sign;
  const std::int32_t* weight;    // [taps][filters]
  const float *kds, *kds_shift;  // [blocks][filters]; the shift may be null
  std::int64_t filters;
  PostOps post;
  const float* residual;  // or null
  float* output;          // of lane 0; the other lanes are contiguous
};

// Depthwise convolution of float activations: a line of outputs in NHWC, with filters of one block.
struct DepthwiseLineArgs {
  std::int64_t kernel_h, kernel_w, stride, dilation;  // stride and dilation along the line
  const float* const* line;                           // pixel 0 of each row of taps; null in the padding
  std::int64_t pixel_stride;
  std::int64_t first, width;       // the first output reads from pixel `first` on; pixels outside 0 to `width` are zeros
  std::int64_t outputs, channels;  // any number
  const float* weight;             // [taps][channels], integers
  const float* kds;
  PostOps post;
  const float* residual;  // or null
  std::int64_t residual_stride;
  float* output;
  std::int64_t output_stride;
  const float* zeros;   // of `channels`
  const float** pixel;  // of window_size() pointers

  static constexpr int kOutputs = 7;  // that are computed together: a divisor of the widths of most networks
  std::int64_t columns() const { return (kOutputs - 1) * stride + (kernel_w - 1) * dilation + 1; }  // that they read
  std::int64_t window_size() const { return kernel_h * columns(); }
};

struct BalancedArgs;
struct BalancedRule;
struct WeightRows;
struct WinogradWeightArgs;
struct WinogradWeights;

// Operators that differ between instruction sets only by the vector width (kernels/*.h).
struct VectorKernels {
  int lanes;
  // NCHW: neighbouring pixels are contiguous, channel c of pixel i is at channel[c][first + i]. Reads `lanes` pixels.
  void (*quantize_nchw)(const QuantizeArgs&, const float* const* channel, std::int64_t first);
  // NHWC: the channels of a pixel are contiguous, channel c of pixel i is at values[i * stride + c].
  void (*quantize_nhwc)(const QuantizeArgs&, const float* values, std::int64_t stride);
  void (*epilogue)(const EpilogueArgs&);
  // Applies the epilogue to the outputs of a whole block and quantizes them. `stride` is that of output pixels, and
  // `sums_stride` that of sums of kNR outputs. Returns false and does nothing for unsupported settings.
  bool (*epilogue_quantize)(const EpilogueArgs&, std::int64_t sums_stride, const QuantizeArgs&, std::int64_t stride);
  void (*depthwise)(const DepthwiseArgs&);
  void (*depthwise_line)(const DepthwiseLineArgs&);
  void (*map)(const MapArgs&);
  void (*pool)(const PoolArgs&);
  void (*average)(const AverageArgs&);
  void (*interpolate)(const InterpolateArgs&);
  void (*moments)(const MomentsArgs&);
  void (*winograd_input)(const WinogradInputArgs&);
  void (*winograd_output)(const WinogradOutputArgs&);
  int balanced_rows;  // that round_balanced processes together
  std::int64_t (*balanced_bytes)(const WeightRows&, const BalancedRule&);
  void (*round_balanced)(const BalancedArgs&);
  std::int64_t (*winograd_weight_bytes)(const WinogradWeights&);
  void (*round_winograd)(const WinogradWeightArgs&);
};

// Kernels of an instruction set.
struct Kernels {
  const char* isa;
  int mr;                                                     // pixels of a tile of dot
  int task_pixels;                                            // best number of pixels per call of dot, a multiple of mr
  std::int64_t (*workspace_bytes)(const DotArgs&) = nullptr;  // null: none
  void (*dot)(const DotArgs&);
  // Fused dot products and epilogue in registers, for layers of one tap and one block, whole panels; null if unsupported.
  // Accumulators are magic, the outputs of a pixel are contiguous, the activation has bounds, and there is no residual.
  void (*dot_one_block)(const DotArgs&, const EpilogueArgs&) = nullptr;
  bool flip_winograd = false;  // whether Winograd mantissas are flipped, for products of unsigned and signed bytes
  const VectorKernels& vector;
};

}  // namespace dsconv
