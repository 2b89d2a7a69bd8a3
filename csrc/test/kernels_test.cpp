// Compares every instruction set of this processor with exact sums and, bit for bit, with the scalar kernels, on random
// convolutions. It is built with sanitizers, and for other processors, without Python.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string_view>
#include <vector>

#include "../conv/joined.h"
#include "../isa/detect.h"
#include "../isa/list.h"
#include "../rounding/balanced.h"
#include "../rounding/winograd.h"

using namespace dsconv;

namespace {

std::mt19937_64 random_bits(1);

std::int64_t pick(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(random_bits() % static_cast<std::uint64_t>(high - low + 1));
}

float normal() { return std::normal_distribution<float>()(random_bits); }

// Mantissas and 2^e of one block, from the definition.
float quantize_block(const std::vector<float>& values, int bits, int sign, std::vector<int>& mantissa) {
  float largest = 0;
  bool negative = false;
  mantissa.assign(values.size(), 0);
  for (const float v : values) {
    if (!std::isfinite(v)) return NAN;
    largest = std::max(largest, std::fabs(v));
    negative |= v < 0;
  }
  if (largest < std::ldexp(1.0f, -100)) return 1;
  int exponent;
  std::frexp(largest, &exponent);
  const int m = bits == 8 || sign == 2 || (sign == 0 && negative) ? bits - 1 : bits, e = exponent - m;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double q = std::nearbyint(std::ldexp(static_cast<double>(values[i]), -e)), limit = (1 << m) - 1;
    mantissa[i] = static_cast<int>(std::min(std::max(q, sign == 1 ? -limit : -limit - 1), limit));
  }
  return std::ldexp(1.0f, e);
}

struct Case {
  ConvSizes g{};
  int weight_bits, activation_bits, sign, target_bits;
  std::int64_t block_size;  // of its outputs
  bool shift, bias, norm, add, channels_last;
  Activation activation;
  std::vector<float> input, kds, kds_shift, biases, gains, offsets, residual;
  std::vector<std::int8_t> vqk;
};

// Chooses the size of a dimension, up to `more` above the smallest with outputs, and the outputs of a transposed one.
void choose_size(Axis a, std::int64_t more, std::int64_t& size, std::int64_t& out) {
  const auto outputs = [&a](std::int64_t n) {
    const std::int64_t span = a.dilation * (a.kernel - 1) + 1, room = n + 2 * a.pad - span;
    return a.transposed ? (n - 1) * a.stride - 2 * a.pad + span : room < 0 ? 0 : room / a.stride + 1;
  };
  size = 1;
  while (outputs(size) < 1) ++size;
  size += pick(0, more);
  out = outputs(size) + (a.transposed ? pick(0, std::max(a.stride, a.dilation) - 1) : 0);
}

Case random_case() {
  Case c;
  ConvSizes& g = c.g;
  g.transposed = pick(0, 3) == 0, g.volume = pick(0, 4) == 0;
  const bool depthwise = !g.transposed && !g.volume && pick(0, 4) == 0;
  g.groups = depthwise ? pick(2, 40) : pick(0, 3) ? 1 : pick(2, 3);
  g.images = pick(0, 9) ? pick(1, 2) : 0;
  g.channels = depthwise ? g.groups : g.groups * pick(1, pick(0, 3) || g.volume ? 40 : 257);
  g.outputs = g.groups * (depthwise ? pick(0, 3) ? 1 : pick(2, 3) : pick(0, 4) ? pick(1, 70) : 64 * pick(1, 3));
  if (g.volume) g.outputs = g.groups * (pick(0, 1) ? pick(1, 20) : 64);
  g.kernel_h = pick(1, 3), g.kernel_w = pick(1, g.volume ? 3 : 5);
  g.stride_h = pick(1, 3), g.stride_w = pick(1, 3);
  g.dilation_h = pick(1, 2), g.dilation_w = pick(1, 2);
  if (g.volume) g.kernel_d = pick(1, 3), g.stride_d = pick(1, 3), g.dilation_d = pick(1, 2), g.pad_d = pick(0, 2);
  g.winograd = g.groups == 1 && !g.transposed && !g.volume && pick(0, 2) == 0;
  if (g.winograd) g.kernel_h = g.kernel_w = 3, g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  const bool in_float = depthwise && pick(0, 1);
  const bool one_block = !depthwise && pick(0, 5) == 0;  // dot_one_block covers most of these
  if (one_block) g.kernel_d = g.kernel_h = g.kernel_w = 1, g.winograd = false, g.outputs = g.groups * 16 * pick(1, 5);
  g.pad_h = pick(0, 3), g.pad_w = pick(0, 3);
  const bool large = !g.transposed && !g.volume;
  if (g.volume) choose_size(g.axis_d(), 2, g.depth, g.out_depth);
  else g.depth = g.out_depth = 1;
  choose_size(g.axis_h(), large ? 8 : 2, g.height, g.out_height);
  choose_size(g.axis_w(), large ? 19 : 4, g.width, g.out_width);
  g.flat = depthwise || (!g.winograd && !g.transposed && !one_block && pick(0, 3) == 0);
  g.block_size = in_float    ? 32
                 : one_block ? ceil_div(g.channels / g.groups, 8) * 8
                 : depthwise ? pick(1, 20)
                             : 16 * (pick(0, 5) ? pick(1, 8) : pick(15, 32));
  c.weight_bits = g.winograd ? 8 : static_cast<int>(pick(2, 8));
  c.activation_bits = in_float ? kFloatBits : static_cast<int>(pick(2, 8));
  c.sign = static_cast<int>(pick(0, 2));
  c.target_bits = static_cast<int>(pick(2, 8)), c.block_size = pick(0, 2) ? 16 * pick(1, 8) : 64 * pick(1, 2);
  c.shift = g.winograd || (!in_float && pick(0, 1)), c.bias = pick(0, 1), c.norm = pick(0, 1), c.add = pick(0, 1);
  c.channels_last = pick(0, 1) && (!g.depthwise() || g.outputs == g.channels);
  c.activation = static_cast<Activation>(pick(0, pick(0, 1) ? 1 : kActivations - 1));
  if (one_block && pick(0, 3)) c.weight_bits = static_cast<int>(pick(2, 4)), c.add = false, c.channels_last = true;
  // Sometimes exceeds usual exponents.
  const float magnitude = std::exp2(static_cast<float>(pick(0, 9) ? pick(-90, 90) : pick(104, 110)));
  const bool rectified = pick(0, 1);
  for (std::int64_t i = 0; i < g.images * g.channels * g.depth * g.height * g.width; ++i) {
    const float v = normal() * magnitude;
    c.input.push_back(rectified ? std::fmax(v, 0.0f) : v);
  }
  if (!c.input.empty() && pick(0, 4) == 0) c.input[pick(0, c.input.size() - 1)] = pick(0, 1) ? NAN : INFINITY;
  // Winograd weights respect the bound of lanes, which four channels of one sign reach.
  const int least = g.winograd ? -32 : -(1 << (c.weight_bits - 1)), most = g.winograd ? 32 : -least - 1;
  for (std::int64_t i = 0; i < g.outputs * g.taps() * g.layout().depth; ++i)
    c.vqk.push_back(static_cast<std::int8_t>(pick(least, most)));
  for (std::int64_t i = 0; i < g.outputs * g.layout().blocks() * g.taps(); ++i) {
    c.kds.push_back(normal());
    c.kds_shift.push_back(normal());
  }
  for (std::int64_t i = 0; i < g.outputs; ++i)
    c.biases.push_back(normal()), c.gains.push_back(normal()), c.offsets.push_back(normal());
  for (std::int64_t i = 0; i < g.pixels() * g.outputs; ++i) c.residual.push_back(normal() * magnitude);
  return c;
}

Strides strides_of(const Case& c, std::int64_t channels, std::int64_t height, std::int64_t width) {
  const std::int64_t image = channels * height * width;
  return c.channels_last ? Strides{image, 1, width * channels, channels} : Strides{image, height * width, width, 1};
}

constexpr float kSlope = 0.125f, kUpper = 0.75f;

struct Made {
  std::vector<float> output;
  std::vector<std::byte> quantized;
};

// The format in which later layers read the outputs.
ActivationFormat format_of(const Case& c) {
  return {{c.g.outputs, c.block_size}, 1, c.target_bits, static_cast<Sign>(c.sign), c.target_bits % 2 == 0, c.shift};
}
PaddedGrid grid_of(const Case& c) { return {c.g.images * c.g.out_depth, c.g.out_height, c.g.out_width, c.g.pad_h, c.g.pad_w}; }

std::byte* aligned(std::vector<std::byte>& memory) {
  return memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
}

// The rows of a quantized tensor as consecutive bytes, for comparison.
std::vector<std::byte> rows_of(const QuantizedTensor& q) {
  const QuantizedRows r = q.of_group(0);
  const std::size_t rows = q.grid().rows(), blocks = rows * r.blocks;
  std::vector<std::byte> all;
  const auto add = [&](const void* from, std::size_t bytes) {
    all.insert(all.end(), static_cast<const std::byte*>(from), static_cast<const std::byte*>(from) + bytes);
  };
  add(r.mantissa, rows * r.row_bytes);
  for (std::size_t i = 0; i < blocks; ++i) {  // a NaN is a NaN
    add(&r.scale[i].acc_init, 4);
    const float both[2] = {r.scale[i].scale, r.shift_term ? r.shift_term[i] : 0.0f};
    for (const float v : both) std::isnan(v) ? add("NaN", 3) : add(&v, 4);
  }
  return all;
}

Made run(const Case& c, const Kernels& kernels) {
  const ConvSizes& g = c.g;
  const bool wide = c.weight_bits > 4;
  std::vector<std::uint8_t> weight(g.packed_bytes(wide));
  std::vector<float> kds(g.kds_count()), shift(g.kds_count());
  pack_weight(g, c.vqk.data(), c.weight_bits, weight.data());
  pack_kds(g, c.kds.data(), kds.data());
  pack_kds(g, c.kds_shift.data(), shift.data());
  std::vector<float> output(c.residual.size(), 7.0f);
  const Layer layer{weight.data(),
                    kds.data(),
                    c.shift ? shift.data() : nullptr,
                    {c.bias ? c.biases.data() : nullptr,
                     c.norm ? c.gains.data() : nullptr,
                     c.norm ? c.offsets.data() : nullptr,
                     {c.activation, kSlope, kUpper}},
                    wide,
                    c.activation_bits,
                    static_cast<Sign>(c.sign)};
  const Strides to = strides_of(c, g.outputs, g.out_depth * g.out_height, g.out_width);
  const Input input{c.input.data(), strides_of(c, g.channels, g.depth * g.height, g.width)},
      residual{c.add ? c.residual.data() : nullptr, to};
  convolve(g, layer, kernels, input, {output.data(), to, residual, {}});
  if (!c.channels_last || (g.groups > 1 && !g.depthwise())) return {output, {}};
  // The epilogue, with and without float outputs, quantizes to the same values as quantizing the floats.
  std::vector<std::byte> memory(QuantizedTensor::bytes(format_of(c), grid_of(c)) + 64);
  const QuantizedTensor q(format_of(c), grid_of(c), aligned(memory));
  quantize(q, kernels, output.data(), to, g.out_depth);
  const std::vector<std::byte> expected = rows_of(q);
  for (const bool floats : {true, false}) {
    std::fill(memory.begin(), memory.end(), std::byte{0x55});
    q.begin(0, g.outputs);
    const QuantizedTarget target{q, 0};
    std::vector<float> again(output.size(), 7.0f);
    convolve(g, layer, kernels, input, {floats ? again.data() : nullptr, to, residual, {&target, 1}});
    if (rows_of(q) != expected) return {};
  }
  return {output, expected};
}

// Pooling and other operations on pixels, compared with the reference.
bool pixels_alike(const Kernels& kernels) {
  const std::int64_t channels = pick(1, 150), pixels = pick(1, 5), taps = pick(1, 9);
  std::vector<float> input(channels * taps * pixels), scale(channels), shift(channels), made[2];
  for (float& v : input) v = pick(0, 60) ? normal() : NAN;
  for (float& v : scale) v = normal();
  for (float& v : shift) v = normal();
  std::vector<const float*> tap;
  for (int k = 0; k < taps; ++k) tap.push_back(input.data() + k * channels);
  const bool average = pick(0, 1), in_place = pick(0, 1), one_operand = pick(0, 1);
  const auto operation = static_cast<Operation>(pick(0, kOperations - 1));
  const auto activation = static_cast<Activation>(pick(0, kActivations - 1));
  const std::int64_t stride = pick(0, 1) * channels;
  const std::int64_t apart = pick(0, 1) ? channels : 1, averaged = (taps * pixels - 1) * channels / apart + 1;
  const int lanes = 1 << pick(0, 4);
  const auto order = [] { return static_cast<Interpolation>(pick(0, kInterpolations - 1)); };
  InterpolateArgs between{{}, {normal(), normal()}, {normal(), normal()}, channels, pick(0, channels), order(), order(), nullptr};
  for (const float*& corner : between.tap) corner = tap[pick(0, taps - 1)];
  const bool divided_twice = pick(0, 1);
  std::int64_t group = pick(1, channels);
  while (channels % group) --group;
  for (int i = 0; i < 2; ++i) {
    const Kernels& used = i ? kernels : scalar::kernels;
    made[i].assign(channels * (pixels + 5), 7.0f);
    float* const mapped = made[i].data();
    if (in_place) std::copy_n(input.data(), channels * pixels, mapped);
    used.vector.map({operation,
                     in_place ? mapped : input.data(),
                     channels,
                     operation == Operation::normalize ? scale.data() : input.data(),
                     shift.data(),
                     stride,
                     one_operand,
                     mapped,
                     channels,
                     pixels,
                     channels,
                     {activation, kSlope, kUpper}});
    float* const moments = mapped + (pixels + 3) * channels;
    used.vector.moments(
        {input.data(), apart, averaged, channels, group, stride ? scale.data() : nullptr, kSlope, moments, moments + channels});
    used.vector.pool({tap.data(), static_cast<int>(taps), channels, average ? static_cast<float>(taps) : 0.0f,
                      made[i].data() + pixels * channels, divided_twice ? 3.0f : 1.0f});
    used.vector.average({input.data(), apart, averaged, channels, lanes, made[i].data() + (pixels + 1) * channels});
    between.output = made[i].data() + (pixels + 2) * channels;
    used.vector.interpolate(between);
  }
  for (std::size_t k = 0; k < made[0].size(); ++k)
    if (std::memcmp(&made[0][k], &made[1][k], 4) && !(std::isnan(made[0][k]) && std::isnan(made[1][k]))) return false;
  return true;
}

// A convolution and the depthwise layer that reads it: fused by an instruction set, and separate by the reference.
bool joined_alike(const Kernels& kernels) {
  ConvSizes first{}, g{};
  first.images = g.images = pick(1, 2), first.groups = 1, first.block_size = 32;
  first.channels = pick(1, 70), first.outputs = g.channels = g.outputs = g.groups = pick(2, 150);
  first.flat = pick(0, 2) == 0;
  first.kernel_h = first.kernel_w = pick(0, 1) ? 1 : 3, first.pad_h = first.pad_w = pick(0, 1);
  first.stride_h = first.stride_w = pick(1, 2), first.dilation_h = first.dilation_w = 1;
  g.flat = true, g.block_size = 32;
  g.kernel_h = pick(1, 5), g.kernel_w = pick(1, 5), g.pad_h = pick(0, 4), g.pad_w = pick(0, 4);
  g.stride_h = pick(1, 3), g.stride_w = pick(1, 2), g.dilation_h = pick(1, 2), g.dilation_w = pick(1, 2);
  do choose_size(first.axis_h(), 50, first.height, first.out_height);
  while (first.out_height + 2 * g.pad_h < g.dilation_h * (g.kernel_h - 1) + 1);
  do choose_size(first.axis_w(), 70, first.width, first.out_width);
  while (first.out_width + 2 * g.pad_w < g.dilation_w * (g.kernel_w - 1) + 1);
  g.height = first.out_height, g.width = first.out_width;
  g.out_height = (g.height + 2 * g.pad_h - g.dilation_h * (g.kernel_h - 1) - 1) / g.stride_h + 1;
  g.out_width = (g.width + 2 * g.pad_w - g.dilation_w * (g.kernel_w - 1) - 1) / g.stride_w + 1;
  std::vector<std::int8_t> vqk[2];
  std::vector<std::uint8_t> weight[2];
  std::vector<float> kds[2], given, post(g.channels);
  for (float& v : post) v = normal();
  const bool wide = pick(0, 1);
  const ConvSizes* const both[] = {&first, &g};
  for (int i = 0; i < 2; ++i) {
    const ConvSizes& of = *both[i];
    std::vector<float> scales(of.outputs * of.layout().blocks() * of.taps());
    for (float& v : scales) v = normal();
    vqk[i].resize(of.outputs * of.layout().depth * of.taps());
    for (std::int8_t& q : vqk[i]) q = static_cast<std::int8_t>(pick(-8, 7));
    weight[i].resize(of.packed_bytes(wide || i)), kds[i].resize(of.kds_count());
    pack_weight(of, vqk[i].data(), wide || i ? 8 : 4, weight[i].data());
    pack_kds(of, scales.data(), kds[i].data());
  }
  const auto layer = [&](int i, Activation activation) {
    return Layer{weight[i].data(), kds[i].data(),      nullptr,       {post.data(), nullptr, nullptr, {activation, kSlope, kUpper}},
                 wide || i,        i ? kFloatBits : 8, Sign::adaptive};
  };
  const Layer of_first = layer(0, static_cast<Activation>(pick(0, kActivations - 1)));
  const Layer l = layer(1, static_cast<Activation>(pick(0, kActivations - 1)));
  for (std::int64_t i = 0; i < first.images * first.channels * first.height * first.width; ++i)
    given.push_back(pick(0, 2000) ? normal() : NAN);
  const auto strides = [](std::int64_t channels, std::int64_t height, std::int64_t width) {
    return Strides{channels * height * width, 1, width * channels, channels};
  };
  const auto input_of = [&](const Kernels& used, std::vector<std::byte>& memory) {
    memory.resize(QuantizedTensor::bytes(of_first.format(first), first.grid()) + 64);
    const QuantizedTensor q(of_first.format(first), first.grid(), aligned(memory));
    quantize(q, used, given.data(), strides(first.channels, first.height, first.width));
    return q;
  };
  const Strides between = strides(g.channels, g.height, g.width), to = strides(g.channels, g.out_height, g.out_width);
  const ActivationFormat format{{g.channels, 16 * pick(1, 4)}, 1, 8, Sign::adaptive, false, false};
  const PaddedGrid grid{g.images, g.out_height, g.out_width, pick(0, 1), pick(0, 1)};
  const bool floats = pick(0, 1);
  std::vector<std::byte> made[2], memory, rows;
  std::vector<float> outputs[2];
  for (int i = 0; i < 2; ++i) {
    made[i].resize(QuantizedTensor::bytes(format, grid) + 64);
    const QuantizedTensor q(format, grid, aligned(made[i]));
    q.begin(0, g.channels);
    const QuantizedTarget target{q, 0};
    outputs[i].assign(floats ? g.images * to.image : 0, 7.0f);
    const Output o{floats ? outputs[i].data() : nullptr, to, {}, {&target, 1}};
    if (i) {
      const QuantizedTensor input = first.flat ? QuantizedTensor() : input_of(kernels, rows);
      convolve_joined({first, of_first, input, {given.data(), strides(first.channels, first.height, first.width)}}, g, l, kernels,
                      o);
    } else {
      std::vector<float> all(g.images * between.image);
      convolve(first, of_first, scalar::kernels, Input{given.data(), strides(first.channels, first.height, first.width)},
               {all.data(), between, {}, {}});
      convolve(g, l, scalar::kernels, Input{all.data(), between}, o);
    }
    rows = rows_of(q);
    made[i] = rows;
  }
  for (std::size_t k = 0; k < outputs[0].size(); ++k)
    if (std::memcmp(&outputs[0][k], &outputs[1][k], 4) && !(std::isnan(outputs[0][k]) && std::isnan(outputs[1][k]))) return false;
  return makes_lines(first) && made[0] == made[1];
}

double activated(const Case& c, double v) {
  if (std::isnan(v)) return v;
  switch (c.activation) {
    case Activation::none: return v;
    case Activation::relu: return v < 0 ? 0 : v;
    case Activation::clamp: return v < kSlope ? kSlope : v > kUpper ? kUpper : v;
    case Activation::leaky_relu: return v < 0 ? kSlope * v : v;
    case Activation::hardsigmoid: return std::fmin(std::fmax(v + 3, 0), 6) / 6;
    case Activation::silu: return v / (1 + std::exp(-v));
    case Activation::sigmoid: return 1 / (1 + std::exp(-v));
    case Activation::hardswish: return v * std::fmin(std::fmax(v + 3, 0), 6) / 6;
    case Activation::elu: return v > 0 ? v : kSlope * std::expm1(v);
    case Activation::exp: return std::exp(v);
    case Activation::gelu: return v * std::erfc(-v / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh: return v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::mish: return v * std::tanh(std::log1p(std::exp(v)));
    case Activation::softplus: return v > 20 ? v : std::log1p(std::exp(v));
    case Activation::tanh: return std::tanh(v);
  }
  return v;
}

// First index where `output` deviates from the exact sums by more than float32 allows, or -1. Winograd has another
// definition, and an exponential amplifies errors.
std::int64_t first_wrong(const Case& c, const std::vector<float>& output) {
  const ConvSizes& g = c.g;
  if (g.winograd || c.activation == Activation::exp) return -1;
  const std::int64_t cg = g.channels / g.groups, og = g.outputs / g.groups, taps = g.kernel_size(),
                     down = g.out_depth * g.out_height;
  const Strides in = strides_of(c, g.channels, g.depth * g.height, g.width), out = strides_of(c, g.outputs, down, g.out_width);
  // Returns the index that an output reads at a tap, or -1.
  const auto read = [](const Axis& a, std::int64_t output, std::int64_t tap) {
    const std::int64_t at = a.transposed ? output + a.pad - tap * a.dilation : output * a.stride - a.pad + tap * a.dilation;
    const std::int64_t place = a.transposed ? at / a.stride : at;
    return at < 0 || place >= a.size || (a.transposed && at % a.stride) ? -1 : place;
  };
  for (std::int64_t n = 0; n < g.images; ++n)
    for (std::int64_t o = 0; o < g.outputs; ++o)
      for (std::int64_t y = 0; y < down; ++y)
        for (std::int64_t x = 0; x < g.out_width; ++x) {
          const std::int64_t at = n * out.image + o * out.channel + y * out.y + x * out.x;
          const auto value = [&](std::int64_t channel, std::int64_t tap) {
            const std::int64_t iz = read(g.axis_d(), y / g.out_height, tap / g.kernel_w / g.kernel_h);
            const std::int64_t iy = read(g.axis_h(), y % g.out_height, tap / g.kernel_w % g.kernel_h);
            const std::int64_t ix = read(g.axis_w(), x, tap % g.kernel_w);
            if (iz < 0 || iy < 0 || ix < 0) return 0.0f;
            return c.input[n * in.image + (o / og * cg + channel) * in.channel + (iz * g.height + iy) * in.y + ix * in.x];
          };
          double sum = c.bias ? c.biases[o] : 0.0, size = std::fabs(sum);
          std::int64_t terms = 0;
          for (std::int64_t tap = 0; tap < g.taps(); ++tap)
            for (std::int64_t b = 0; b < g.layout().blocks(); ++b) {
              std::vector<float> values;
              const std::int64_t first = b * g.block_size, end = std::min(g.layout().depth, first + g.block_size);
              for (std::int64_t k = first; k < end; ++k) values.push_back(g.flat ? value(k / taps, k % taps) : value(k, tap));
              if (c.activation_bits == kFloatBits) {
                for (std::int64_t k = 0; k < taps; ++k) {
                  const double term = 1.0 * c.kds[o] * c.vqk[o * taps + k] * values[k];
                  sum += term, size += std::fabs(term), ++terms;
                }
                continue;
              }
              std::vector<int> mantissa;
              const double scale = quantize_block(values, c.activation_bits, c.sign, mantissa);
              std::int64_t s = 0, plain = 0;
              for (std::int64_t k = first; k < end; ++k) {
                s += mantissa[k - first] * c.vqk[(o * g.layout().depth + k) * g.taps() + tap];
                plain += mantissa[k - first];
              }
              const std::int64_t where = (o * g.layout().blocks() + b) * g.taps() + tap;
              const double term = c.kds[where] * scale * static_cast<double>(s);
              const double more = c.shift ? c.kds_shift[where] * scale * static_cast<double>(plain) : 0.0;
              sum += term + more;
              size += std::fabs(term) + std::fabs(more);
              terms += c.shift ? 2 : 1;
            }
          if (c.norm) sum = sum * c.gains[o] + c.offsets[o], size = size * std::fabs(c.gains[o]) + std::fabs(c.offsets[o]), ++terms;
          if (c.add) sum += c.residual[at], size += std::fabs(c.residual[at]), ++terms;
          sum = activated(c, sum);
          // The activation is applied again, and an exponential adds a few roundings.
          const double bound = 1.5 * (static_cast<double>(terms + 1) * std::ldexp(size, -24) + std::ldexp(std::fabs(sum), -22));
          const bool same = output[at] == sum;  // also for infinity
          if (std::isnan(sum) ? !std::isnan(output[at]) : !same && !(std::fabs(output[at] - sum) <= bound)) return at;
        }
  return -1;
}

// Integers, scales and shifts of random weights, as bytes.
struct BalancedCase {
  WeightRows rows{};
  BalancedRule rule{};
  std::vector<float> w;
  std::vector<double> own, shared, mean, held;

  BalancedCase() {
    rows.taps = pick(0, 2) ? pick(1, 9) : 1, rows.n = pick(1, 70), rows.kinds = pick(1, 3), rows.rows = rows.kinds * pick(1, 20);
    rule = {static_cast<int>(pick(2, 8)), pick(0, 1) != 0, 1e-4};
    const float size = std::exp2(static_cast<float>(pick(-126, 125)));
    for (std::int64_t i = 0; i < rows.taps * rows.n * rows.rows; ++i) w.push_back(pick(0, 9) ? normal() * size : 0.0f);
    for (std::int64_t i = 0; i < rows.n * rows.kinds; ++i) {
      const double variance = std::fabs(normal());
      own.push_back(0.3 * variance), shared.push_back(rows.taps > 1 ? 0.7 * variance : 0.0), mean.push_back(normal());
      held.push_back(own.back() + 0.1);
    }
    rows.w = w.data();
  }

  std::vector<std::byte> rounded(const Kernels& kernels) const {
    const std::int64_t scales = rows.taps * rows.rows;
    std::vector<float> found(2 * scales);
    std::vector<std::int8_t> q(w.size());
    const InputModel model{own.data(), shared.data(), mean.data()}, regularized{held.data(), shared.data(), mean.data()};
    round_balanced(kernels, rows, model, regularized, rule, {q.data(), found.data(), found.data() + scales});
    const int half = 1 << (rule.bits - 1);
    for (const std::int8_t level : q)
      if (level < -half || level >= half) return {};
    for (const float v : found)
      if (!std::isfinite(v)) return {};
    const auto bytes = [](const auto& of) {
      return std::pair(reinterpret_cast<const std::byte*>(of.data()), of.size() * sizeof of[0]);
    };
    std::vector<std::byte> all;
    for (const auto& [from, count] : {bytes(q), bytes(found)}) all.insert(all.end(), from, from + count);
    return all;
  }
};

// Random weights of Winograd, some of them not finite, as bytes: integers and scales.
struct WinogradCase {
  WinogradWeights weights{};
  std::vector<float> w;

  WinogradCase() {
    weights.outputs = pick(1, 20), weights.channels = pick(1, 150), weights.block_size = pick(1, weights.channels);
    const float size = std::exp2(static_cast<float>(pick(-149, 126))), special[] = {0.0f, NAN, INFINITY, -3e38f, 1e-45f};
    for (std::int64_t i = 0; i < weights.outputs * weights.channels * 9; ++i)
      w.push_back(pick(0, 999) ? normal() * size : special[pick(0, 4)]);
    weights.w = w.data();
  }

  std::vector<std::byte> rounded(const Kernels& kernels) const {
    const std::int64_t rows = kWinogradProducts * weights.outputs, integers = rows * weights.channels;
    std::vector<std::byte> all(integers + rows * weights.blocks() * sizeof(float));
    std::vector<float> scales(rows * weights.blocks());
    round_winograd(kernels, weights, {reinterpret_cast<std::int8_t*>(all.data()), scales.data()});
    std::memcpy(all.data() + integers, scales.data(), scales.size() * sizeof(float));
    return all;
  }
};

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 300;
  if (count > 2) random_bits.seed(std::atoi(arguments[2]));
  std::vector<const Kernels*> tested;
  // AMX tiles are emulated here; the rest needs the vectors of AVX-512.
  for (const Kernels* const kernels : kBuiltKernels)
    for (const std::string_view found : isa_found())
      if (found == (std::string_view(kernels->isa) == "amx" ? "avx512vnni" : kernels->isa)) tested.push_back(kernels);
  for (int i = 0; i < cases; ++i) {
    const Case c = random_case();
    if (!c.g.valid()) return std::printf("case %d: a valid geometry is refused\n", i), 1;
    const auto [reference, quantized] = run(c, scalar::kernels);
    if (reference.size() != c.residual.size()) return std::printf("case %d: scalar quantizes in another way\n", i), 1;
    if (const std::int64_t at = first_wrong(c, reference); at >= 0) {
      std::printf("case %d: scalar is beyond the bound at %lld\n", i, static_cast<long long>(at));
      return 1;
    }
    for (const Kernels* kernels : tested) {
      const auto [output, again] = run(c, *kernels);
      if (output.size() != reference.size() || again != quantized || !pixels_alike(*kernels))
        return std::printf("case %d: %s quantizes, pools or maps in another way\n", i, kernels->isa), 1;
      for (std::size_t k = 0; k < output.size(); ++k)
        if (std::memcmp(&output[k], &reference[k], 4) && !(std::isnan(output[k]) && std::isnan(reference[k]))) {
          std::printf("case %d: %s differs from scalar first at %zu: %a, %a\n", i, kernels->isa, k, output[k], reference[k]);
          return 1;
        }
    }
  }
  for (int i = 0; i < cases; ++i)
    for (const Kernels* kernels : tested)
      if (!joined_alike(*kernels)) return std::printf("case %d: %s joins layers to something else\n", i, kernels->isa), 1;
  for (int i = 0; i < cases; ++i) {
    const BalancedCase c;
    const std::vector<std::byte> reference = c.rounded(scalar::kernels);
    if (reference.empty()) return std::printf("case %d: rounded to what is out of range\n", i), 1;
    for (const Kernels* kernels : tested)
      if (c.rounded(*kernels) != reference) return std::printf("case %d: %s rounds in another way\n", i, kernels->isa), 1;
  }
  for (int i = 0; i < cases; ++i) {
    const WinogradCase c;
    const std::vector<std::byte> reference = c.rounded(scalar::kernels);
    for (const Kernels* kernels : tested)
      if (c.rounded(*kernels) != reference)
        return std::printf("case %d: %s rounds for Winograd in another way\n", i, kernels->isa), 1;
  }
  std::printf("%d convolutions, and roundings, alike on", cases);
  for (const Kernels* kernels : tested) std::printf(" %s", kernels->isa);
  std::printf("\n");
}
