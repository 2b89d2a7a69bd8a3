// The pieces of work that an instruction set does its own way. All are stateless: they allocate nothing, start no thread
// and know no image. Where a pixel lies is given by offsets, so that padding, stride, dilation and groups are the
// caller's business.
#pragma once

#include <cstdint>

namespace dsconv {

inline constexpr int kPanel = 16;  // outputs that a packed row of weights holds
inline constexpr int kPair = 2 * kPanel;
inline constexpr int kSlack = 64;  // bytes behind the last mantissa that may be read
inline constexpr int kMaxLanes = 16;
inline constexpr int kMaxTask = 384;
inline constexpr int kMaxBlock = 512;

enum class Sign : int { adaptive, extra, included };  // the order of ACTIVATION_SIGNS in Python
enum class Activation : int { none, relu, relu6, leaky_relu, hardswish, hardsigmoid, silu, sigmoid };
inline constexpr int kActivations = static_cast<int>(Activation::sigmoid) + 1;

inline constexpr int kZero = 8, kWideZero = 128;  // what stands for 0 in weights, which are stored as unsigned numbers

// The largest magnitude that a mantissa of so many bits can have: only of 8 the sign is always one.
constexpr int largest_mantissa(int bits) { return bits == 8 ? 128 : (1 << bits) - 1; }

// What the sums over a block start at, less the weights' zero times the sum of the mantissas, and what then makes S * 2^e of
// them; a NaN where the block is not finite.
// - Where |S| < 2^22, `end` is 1.5 * 2^(23 + e), and sums start at its bits. They come to the bits of the float end + S * 2^e. That
//   less `end` is exact: no conversion is needed, and no product.
// - With wide weights and large blocks, `end` is a factor, 2^e, and sums start at 0.
struct Ends {
  std::int32_t start;
  float end;
};
// Bits of `end` where e is 0, and of the NaN, which are those of no 1.5 * 2^(23 + e) even where that is too large for a float.
inline constexpr std::uint32_t kOne = 0x3f800000, kOneAndHalf = 0x4b400000, kNaN = 0x7fffffff;
inline constexpr int kLargestExponent = 104;  // beyond which it is

// The quantized input: one row of mantissas for each pixel of the bordered image, and what belongs to each of its blocks.
struct Rows {
  std::int8_t* mantissa;  // [rows][row_bytes]
  Ends* ends;             // [rows][blocks]
  std::uint8_t* beyond;   // [blocks], not 0 where an exponent is beyond kLargestExponent, and ends are no factors
  float* shifted;         // [rows][blocks], 2^e * sum; null where there is no shift
  std::int64_t row_bytes;
  int blocks;
  bool wide;     // the weights
  bool factors;  // the ends
};

// One block of some pixels, to be quantized into rows.
struct Block {
  int channels;
  int bits;
  Sign sign;
  const std::int64_t* row;  // of each pixel
  int pixels;
  Rows rows;
  int index;           // of the block
  std::int64_t first;  // where in a row its mantissas begin
};

// The sums of a run of output pixels times up to two panels of outputs, over all taps and blocks.
struct Sums {
  Rows rows;
  int octets, last_octets;     // groups of eight values in a block, and in the last one
  const std::uint8_t* weight;  // of the first panel: a nibble each in narrow weights, a byte in wide ones
  std::int64_t panel_bytes;    // from there to the second
  int panels;                  // 1 or 2
  int largest;                 // magnitude of a mantissa
  const float* kds;            // [taps * blocks][kPair]
  const float* kds_shift;      // the same, or null
  const std::int64_t* pixel;   // where each output pixel reads its first tap, in rows
  int pixels;
  const std::int64_t* tap;  // how much further each tap is, in rows
  int taps;
  float* output;      // [pixels][kPair]
  const float* next;  // what is then read or written: kPair floats of each pixel, so far behind; or null
  const std::int64_t* next_place;
  std::uint8_t* workspace;  // as many bytes as Kernels::workspace says, aligned to 64
};

// What every output does to its sum: (sum + bias) * gain + offset, the product and the offset rounded once. Each may be null;
// gain and offset, of a BatchNorm, come together.
struct Terms {
  const float* bias;
  const float* gain;
  const float* offset;

  Terms from(std::int64_t output) const {
    const auto at = [&](const float* p) { return p ? p + output : nullptr; };
    return {at(bias), at(gain), at(offset)};
  }
};

// Sums to outputs: applies the terms, adds the residual, applies the activation.
struct Store {
  const float* sums;  // [pixels][kPair]
  int pixels, outputs;
  const std::int64_t* place;  // of each pixel in the output
  const std::int64_t* residual_place;
  std::int64_t channel;  // how far apart the outputs of a pixel are, in both
  Terms terms;
  const float* residual;  // or null
  float* output;
  Activation activation;
  float slope;
};

// Values of pixels whose channels lie side by side: x * scale + shift, rounded once or twice, times a gate, plus another,
// activated.
struct Map {
  const float* input;
  std::int64_t input_stride;  // from pixel to pixel, in values
  const float* scale;         // of each channel, or null with shift
  const float* shift;
  bool once;
  const float* gate;         // or null
  std::int64_t gate_stride;  // 0: one pixel for all
  const float* other;        // or null
  std::int64_t other_stride;
  float* output;
  std::int64_t output_stride;
  std::int64_t pixels, channels;
  Activation activation;
  float slope;
};

// One output pixel of a pooling: the largest of what lies under its taps, where a NaN is larger than all, or their average.
struct Pool {
  const float* const* tap;
  int taps;
  std::int64_t channels;
  float divisor;  // of an average; 0 is the maximum
  float* output;
};

// The average of each channel over all pixels, summed up as PyTorch sums up values that lie side by side on vectors of `lanes`:
// value i goes to one of 4 * lanes sums, these are added up in the end, and long sums are sums of shorter ones. What it makes
// depends on `lanes`, and not on the instruction set.
struct Average {
  const float* input;
  std::int64_t stride;  // from pixel to pixel, in values
  std::int64_t pixels, channels;
  int lanes;  // 1 to kMaxLanes
  float* output;
};

// Depthwise: every lane is a filter of its own (by_lane), or a pixel of one filter. Weights, KDS and terms of filters lie
// side by side, so they are read up to kMaxLanes behind the last one.
struct Depthwise {
  const float* const* tap;  // what each reads: that of lane i is at tap[k][at + i]
  std::int64_t at;
  int lanes;  // of which only so many are stored; kMaxLanes can be read
  bool by_lane;
  int taps, block_size, bits;
  Sign sign;
  const std::int32_t* weight;  // [taps][filters]
  const float* kds;            // [blocks][filters]
  const float* kds_shift;      // or null
  std::int64_t filters;
  Store store;  // lane i goes to output + i
};

// Depthwise, a line of outputs whose channels lie side by side: square filters of 3 or 5 that are one block, stride 1 or 2.
struct DepthwiseLine {
  int size, stride;
  const float* const* line;  // what each line of taps reads: pixel x at line[k] + x * step[k]
  const std::int64_t* step;
  std::int64_t first, width;       // the first output reads from pixel `first` on; pixels but 0 to `width` are zeros
  std::int64_t outputs, channels;  // no fewer than kMaxLanes channels
  int bits;
  Sign sign;
  const std::int32_t* weight;  // [taps][channels]
  const float* kds;
  const float* kds_shift;  // or null
  Terms terms;
  const float* residual;  // or null; pixels are residual_step apart
  std::int64_t residual_step;
  float* output;
  std::int64_t output_step;
  Activation activation;
  float slope;
};

struct Kernels {
  const char* isa;
  int lanes;                               // pixels that quantize_pixels takes together
  int tile;                                // pixels that sum takes together
  int task;                                // pixels that sum is best given at once, a multiple of that
  std::int64_t (*workspace)(const Sums&);  // or null: none is needed
  // Neighbouring pixels lie side by side: channel c of pixel i at channel[c][at + i]. As many as `lanes` can be read.
  void (*quantize_pixels)(const Block&, const float* const* channel, std::int64_t at);
  // The channels of a pixel lie side by side: channel c of pixel i at values[i * stride + c].
  void (*quantize_channels)(const Block&, const float* values, std::int64_t stride);
  void (*sum)(const Sums&);
  void (*store)(const Store&);
  // The same of a whole block, which is quantized in one go: outputs of pixels lie `stride` apart, sums of pairs of panels
  // `apart`. False, with nothing done, where the one has to be done after the other.
  bool (*store_block)(const Store&, std::int64_t apart, const Block&, std::int64_t stride);
  void (*depthwise)(const Depthwise&);
  void (*depthwise_line)(const DepthwiseLine&);
  void (*map)(const Map&);
  void (*pool)(const Pool&);
  void (*average)(const Average&);
};

}  // namespace dsconv
