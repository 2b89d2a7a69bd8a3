// Python bindings. This is the only file that includes Python: everything else under csrc/ is plain C++20.
//
// Tensors are passed as addresses, after Python has validated shape, dtype, layout and device. Sizes are checked here again.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "conv/conv.h"
#include "isa/choice.h"
#include "isa/detect.h"
#include "isa/list.h"
#include "parallel.h"
#include "program/program.h"
#include "rounding/balanced.h"
#include "rounding/winograd.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace dsconv;
using Address = std::uintptr_t;
// Number of runs of the kernels of each instruction set: tests verify that no set replaced another.
std::atomic<std::int64_t> run_counts[std::size(kBuiltKernels)];

void count_run(const Kernels& kernels) {
  for (std::size_t i = 0; i < std::size(kBuiltKernels); ++i)
    if (kBuiltKernels[i] == &kernels) run_counts[i].fetch_add(1, std::memory_order_relaxed);
}

const Kernels& kernels_of(std::string_view isa) {
  for (const Kernels* const kernels : usable_kernels())
    if (kernels->isa == isa) return *kernels;
  for (const Kernels* const kernels : kBuiltKernels)
    if (kernels->isa == isa) throw std::invalid_argument("isa: this processor has no " + std::string(isa));
  throw std::invalid_argument("isa: there are no kernels for " + std::string(isa));
}

std::vector<std::string_view> isa_with_kernels() {
  std::vector<std::string_view> both;
  for (const Kernels* const kernels : usable_kernels()) both.push_back(kernels->isa);
  return both;
}

std::map<std::string_view, std::int64_t> runs() {
  std::map<std::string_view, std::int64_t> counted;
  for (std::size_t i = 0; i < std::size(kBuiltKernels); ++i) counted[kBuiltKernels[i]->isa] = run_counts[i];
  return counted;
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Checks and returns the address of a tensor that is read or written.
template <class T>
T* needed(const char* what, Address address, bool used = true) {
  if (used && !address) throw std::invalid_argument(std::string(what) + ": expected the address of a tensor, got 0");
  return at<T>(address);
}

Strides strides(const std::array<std::int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

// Checks and returns the strides of a tensor of these sizes.
Strides strides(std::array<std::int64_t, 4> s, std::int64_t images, std::int64_t channels, std::int64_t height,
                std::int64_t width) {
  double last = 0.0;
  const std::int64_t sizes[] = {images, channels, height, width};
  for (int i = 0; i < 4; ++i) {
    if (s[i] < 0) throw std::invalid_argument("strides: expected none below 0");
    if (sizes[i] <= 1) s[i] = std::min(s[i], std::int64_t{1} << 31);  // the stride of a dimension of size 1 is arbitrary
    last += static_cast<double>(std::max<std::int64_t>(sizes[i], 1) - 1) * static_cast<double>(s[i]);
  }
  if (last > 1e15) throw std::invalid_argument("strides: expected a tensor that fits into memory");
  return strides(s);
}

int checked_bits(int bits) {
  if (bits < 2 || bits > 8) throw std::invalid_argument("bits are 2 to 8");
  return bits;
}

// Activation bits of a layer; kFloatBits if its activations stay float.
int activation_bits_of(const ConvSizes& g, int bits) {
  if (bits == kFloatBits && g.takes_floats()) return bits;
  return checked_bits(bits);
}

bool is_wide(int weight_bits) { return checked_bits(weight_bits) > 4; }
bool is_wide(const ConvSizes& sizes, int weight_bits) { return is_wide(weight_bits) || sizes.winograd; }

// Winograd layers always have a shift, even if the original weights have none.
const float* shift_of(const ConvSizes& sizes, Address kds_shift) {
  return sizes.winograd ? needed<const float>("kds_shift", kds_shift) : at<const float>(kds_shift);
}

PostOps post_ops(Address bias, Address gain, Address offset) {
  if (!gain != !offset) throw std::invalid_argument("gain and offset come together");
  return {at<const float>(bias), at<const float>(gain), at<const float>(offset), {Activation::none, 0.0f, 0.0f}};
}

template <class Enum>
Enum one_of(const char* what, int value, int count) {
  if (value < 0 || value >= count) throw std::invalid_argument(std::string(what) + " is out of range");
  return static_cast<Enum>(value);
}

ActivationFormat format(std::int64_t depth, std::int64_t block_size, std::int64_t groups, int weight_bits, int bits, int sign,
                        bool shift) {
  return {{depth, block_size}, groups, checked_bits(bits), one_of<Sign>("sign", sign, kSigns), is_wide(weight_bits), shift};
}

// A convolution with fixed sizes and layouts, for any tensors.
struct Convolution {
  const Kernels& kernels;
  ConvSizes sizes;
  Strides from, to;
  Layer layer;  // without its weights
};

using BetweenTuple = std::tuple<std::int64_t, std::int64_t, float, float>;

// (float tensor, residual, [(quantized tensor, first channel)], activation, alpha, beta): Uses of dsconv/backends/base.py.
using OutputsTuple = std::tuple<int, int, std::vector<std::pair<int, std::int64_t>>, int, float, float>;
StepOutputs outputs(const OutputsTuple& to) {
  const auto& [values, residual, targets, activation, alpha, beta] = to;
  return {values, residual, targets, {one_of<Activation>("activation", activation, kActivations), alpha, beta}};
}

// The sizes of a convolution, by name. They are checked once and are constant afterwards.
void bind_sizes(nb::module_& m) {
  using Size = std::int64_t;
  static constexpr std::pair<const char*, Size ConvSizes::*> kSizes[] = {
      {"images", &ConvSizes::images},       {"channels", &ConvSizes::channels},     {"height", &ConvSizes::height},
      {"width", &ConvSizes::width},         {"outputs", &ConvSizes::outputs},       {"out_height", &ConvSizes::out_height},
      {"out_width", &ConvSizes::out_width}, {"kernel_h", &ConvSizes::kernel_h},     {"kernel_w", &ConvSizes::kernel_w},
      {"stride_h", &ConvSizes::stride_h},   {"stride_w", &ConvSizes::stride_w},     {"pad_h", &ConvSizes::pad_h},
      {"pad_w", &ConvSizes::pad_w},         {"dilation_h", &ConvSizes::dilation_h}, {"dilation_w", &ConvSizes::dilation_w},
      {"groups", &ConvSizes::groups},       {"block_size", &ConvSizes::block_size}, {"depth", &ConvSizes::depth},
      {"out_depth", &ConvSizes::out_depth}, {"kernel_d", &ConvSizes::kernel_d},     {"stride_d", &ConvSizes::stride_d},
      {"pad_d", &ConvSizes::pad_d},         {"dilation_d", &ConvSizes::dilation_d}};
  auto sizes =
      nb::class_<ConvSizes>(m, "ConvSizes", "Sizes of a convolution that agree. All are keyword arguments, and attributes.");
  sizes.def(
      "__init__",
      [](ConvSizes* self, Size images, Size channels, Size height, Size width, Size outputs, Size out_height, Size out_width,
         Size kernel_h, Size kernel_w, Size stride_h, Size stride_w, Size pad_h, Size pad_w, Size dilation_h, Size dilation_w,
         Size groups, Size block_size, bool flat, bool winograd, bool transposed, bool volume, Size depth, Size out_depth,
         Size kernel_d, Size stride_d, Size pad_d, Size dilation_d) {
        const ConvSizes g{images,   channels,   height, width, outputs,    out_height, out_width, kernel_h,   kernel_w,
                          stride_h, stride_w,   pad_h,  pad_w, dilation_h, dilation_w, groups,    block_size, flat,
                          winograd, transposed, volume, depth, out_depth,  kernel_d,   stride_d,  pad_d,      dilation_d};
        if (!g.valid()) throw std::invalid_argument("the sizes of the convolution do not agree");
        new (self) ConvSizes(g);
      },
      nb::kw_only(), "images"_a, "channels"_a, "height"_a, "width"_a, "outputs"_a, "out_height"_a, "out_width"_a, "kernel_h"_a,
      "kernel_w"_a, "stride_h"_a, "stride_w"_a, "pad_h"_a, "pad_w"_a, "dilation_h"_a, "dilation_w"_a, "groups"_a, "block_size"_a,
      "flat"_a, "winograd"_a = false, "transposed"_a = false, "volume"_a = false, "depth"_a = 1, "out_depth"_a = 1,
      "kernel_d"_a = 1, "stride_d"_a = 1, "pad_d"_a = 0, "dilation_d"_a = 1);
  for (const auto& [name, member] : kSizes) sizes.def_ro(name, member);
  sizes.def_ro("flat", &ConvSizes::flat).def_ro("winograd", &ConvSizes::winograd);
  sizes.def_ro("transposed", &ConvSizes::transposed).def_ro("volume", &ConvSizes::volume);
  sizes.def_prop_ro(
      "border", [](const ConvSizes& self) { return std::pair(self.grid().pad_h, self.grid().pad_w); },
      "Zeros that lie around a quantized input, in height and in width.");
  sizes.def(nb::self == nb::self).def("__hash__", [](const ConvSizes& self) {
    std::size_t hash = 8 * self.flat + 4 * self.winograd + 2 * self.transposed + self.volume;
    for (const auto& [name, member] : kSizes) hash = hash * 1000003 + static_cast<std::size_t>(self.*member);
    return hash;
  });
}

void bind_machine(nb::module_& m) {
  m.def("isa_found", &isa_found,
        "Instruction sets that this processor has and the operating system lets this process use, weakest first.");
  m.def("isa_with_kernels", &isa_with_kernels, "Those of isa_found that convolutions have kernels for.");
  m.def("runs", &runs, "How often the kernels of each instruction set were run.");
  m.def(
      "use_parallel_for", [](Address function) { parallel_for = reinterpret_cast<ParallelFor>(function); },
      "Run tasks through the function at this address, of the signature of libtorch's torch_parallel_for; 0: serially.");
  m.def(
      "use_pool",
      [](int threads) {
        if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
        pool_threads(threads);
        parallel_for = parallel_for_of_pool;
      },
      "Run tasks on so many threads of our own.");
  m.def(
      "expect_threads", [](int threads) { expected_threads = std::clamp(threads, 1, 1 << 16); },
      "Cut work that costs more the finer it is cut for so many threads.");
  m.def(
      "peak_rate",
      [](std::string_view isa, double seconds) {
        const Kernels& kernels = kernels_of(isa);
        if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds: expected more than 0 and at most 60");
        nb::gil_scoped_release released;
        return peak_rate(kernels, seconds);
      },
      "Multiply-adds in a second that one thread reaches with everything in the first cache.");
}

void bind_layers(nb::module_& m) {
  m.def(
      "packed_sizes",
      [](const ConvSizes& sizes, int weight_bits) {
        return std::pair(sizes.packed_bytes(is_wide(sizes, weight_bits)), sizes.kds_count());
      },
      "Bytes of the packed weight, and number of packed KDS.");
  m.def("pack_weight", [](const ConvSizes& sizes, Address vqk, int weight_bits, Address packed) {
    const int bits = is_wide(sizes, weight_bits) ? 8 : weight_bits;
    pack_weight(sizes, needed<const std::int8_t>("vqk", vqk), bits, needed<std::uint8_t>("packed", packed));
  });
  m.def("pack_kds", [](const ConvSizes& sizes, Address kds, Address packed) {
    pack_kds(sizes, needed<const float>("kds", kds), needed<float>("packed", packed));
  });
  m.def("round_balanced", [](std::string_view isa, const std::array<std::int64_t, 4>& sizes, int bits, bool shift, double held,
                             const std::array<Address, 1>& weight, const std::array<Address, 3>& model,
                             const std::array<Address, 3>& regularized, const std::array<Address, 3>& results) {
    const auto [taps, n, rows, kinds] = sizes;
    if (taps < 1 || n < 1 || rows < 1 || kinds < 1 || rows % kinds) throw std::invalid_argument("sizes do not agree");
    if (taps > kMostTaps || n > 1 << 20) throw std::invalid_argument("sizes: expected at most 128 taps, 2^20 channels");
    const auto moments = [](const std::array<Address, 3>& of) {
      return InputModel{needed<const double>("own", of[0]), needed<const double>("shared", of[1]),
                        needed<const double>("mean", of[2])};
    };
    const WeightRows of{needed<const float>("w", weight[0]), taps, n, rows, kinds};
    const BalancedResults to{needed<std::int8_t>("q", results[0]), needed<float>("scale", results[1]),
                             needed<float>("shift", results[2])};
    const InputModel counts = moments(model), solved = moments(regularized);
    const Kernels& kernels = kernels_of(isa);
    count_run(kernels);
    nb::gil_scoped_release released;
    round_balanced(kernels, of, counts, solved, {checked_bits(bits), shift, held}, to);
  });
  m.def("round_winograd",
        [](std::string_view isa, const std::array<std::int64_t, 3>& sizes, Address weight, Address q, Address scale) {
          const auto [outputs, channels, block_size] = sizes;
          if (outputs < 1 || block_size < 1 || block_size > channels) throw std::invalid_argument("sizes do not agree");
          if (std::max(outputs, channels) > 1 << 30) throw std::invalid_argument("sizes: expected at most 2^30");
          const WinogradWeights of{needed<const float>("w", weight), outputs, channels, block_size};
          const WinogradIntegers to{needed<std::int8_t>("q", q), needed<float>("scale", scale)};
          const Kernels& kernels = kernels_of(isa);
          count_run(kernels);
          nb::gil_scoped_release released;
          round_winograd(kernels, of, to);
        });
  m.def("quantize_activation", [](std::string_view isa, const ConvSizes& g, Address input,
                                  const std::array<std::int64_t, 4>& input_strides, int bits, int sign, Address mantissa,
                                  Address exponent) {
    if (g.kernel_size() != 1 || g.pad_h || g.pad_w || g.flat || g.transposed || g.volume)
      throw std::invalid_argument("expected a 1x1 convolution");
    const Kernels& kernels = kernels_of(isa);
    Layer layer{};
    layer.activation_bits = checked_bits(bits);
    layer.sign = one_of<Sign>("sign", sign, kSigns);
    const bool used = g.pixels() > 0;
    const Input from{needed<const float>("input", input, used), strides(input_strides, g.images, g.channels, g.height, g.width)};
    std::int8_t* const mantissas = needed<std::int8_t>("mantissa", mantissa, used);
    std::int8_t* const exponents = needed<std::int8_t>("exponent", exponent, used);
    count_run(kernels);
    nb::gil_scoped_release released;
    quantize_activation(g, layer, kernels, from, mantissas, exponents);
  });
}

void bind_convolution(nb::module_& m) {
  nb::class_<Convolution>(m, "Convolution")
      .def("__init__",
           [](Convolution* self, std::string_view isa, const ConvSizes& g, const std::array<std::int64_t, 4>& input_strides,
              const std::array<std::int64_t, 4>& output_strides, int weight_bits, int activation_bits, int sign, int activation,
              float alpha, float beta) {
             Layer layer{};
             layer.wide = is_wide(g, weight_bits), layer.activation_bits = activation_bits_of(g, activation_bits);
             layer.sign = one_of<Sign>("sign", sign, kSigns);
             layer.post.activation = {one_of<Activation>("activation", activation, kActivations), alpha, beta};
             const Strides from = strides(input_strides, g.images, g.channels, g.depth * g.height, g.width);
             Strides to = strides(output_strides, g.images, g.outputs, g.out_depth * g.out_height, g.out_width);
             if (g.out_width <= 1) to.x = 1;
             if (to.channel != 1 && to.x != 1)
               throw std::invalid_argument("output_strides: expected channels or lines that are dense");
             new (self) Convolution{kernels_of(isa), g, from, to, layer};
           })
      .def("__call__", [](const Convolution& self, Address input, Address weight, Address kds, Address kds_shift, Address bias,
                          Address gain, Address offset, Address residual, Address output) {
        const ConvSizes& g = self.sizes;
        Layer layer = self.layer;
        const PostOps post = post_ops(bias, gain, offset);
        layer.weight = needed<const std::uint8_t>("weight", weight), layer.kds = needed<const float>("kds", kds);
        layer.kds_shift = shift_of(g, kds_shift);
        layer.post.bias = post.bias, layer.post.gain = post.gain, layer.post.offset = post.offset;
        const Output out{needed<float>("output", output, g.pixels() > 0), self.to, {at<const float>(residual), self.to}, {}};
        const Input in{needed<const float>("input", input, g.images && g.depth && g.height && g.width), self.from};
        count_run(self.kernels);
        nb::gil_scoped_release released;
        convolve(g, layer, self.kernels, in, out);
      });
}

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program", "A network as a list of steps over tensors that lie in one piece of memory.")
      .def("__init__", [](Program* self, std::string_view isa) { new (self) Program(kernels_of(isa)); })
      .def(
          "values",
          [](Program& self, int base, std::int64_t offset, std::int64_t first, const std::array<std::int64_t, 3>& size,
             const std::array<std::int64_t, 4>& s) {
            return self.add_float({base, offset, first, size[0], size[1], size[2], strides(s)});
          },
          "Number of a float tensor of an image: where it begins, (channels, height, width), and strides.")
      .def(
          "quantized",
          [](Program& self, std::int64_t offset, std::int64_t depth, std::int64_t block_size, std::int64_t groups,
             const std::array<std::int64_t, 4>& grid, int weight_bits, int bits, int sign, bool shift, std::int64_t frames) {
            return self.add_quantized(format(depth, block_size, groups, weight_bits, bits, sign, shift),
                                      {frames, grid[0], grid[1], grid[2], grid[3]}, offset);
          },
          "offset"_a, "depth"_a, "block_size"_a, "groups"_a, "grid"_a, "weight_bits"_a, "bits"_a, "sign"_a, "shift"_a,
          "frames"_a = 1, "Number of a quantized tensor of an image of so many frames of (height, width) and padding.")
      .def_static(
          "quantized_bytes",
          [](std::int64_t depth, std::int64_t block_size, std::int64_t groups, const std::array<std::int64_t, 4>& grid, bool shift,
             std::int64_t frames) {
            return Program::quantized_bytes(format(depth, block_size, groups, 4, 4, 0, shift),
                                            {frames, grid[0], grid[1], grid[2], grid[3]});
          },
          "depth"_a, "block_size"_a, "groups"_a, "grid"_a, "shift"_a, "frames"_a = 1,
          "Bytes that a quantized tensor of an image takes.")
      .def("convolve",
           [](Program& self, const ConvSizes& sizes, int from, int input, Address weight, Address kds, Address kds_shift,
              Address bias, Address gain, Address offset, int weight_bits, int activation_bits, int sign, const OutputsTuple& to) {
             self.convolve(sizes,
                           {needed<const std::uint8_t>("weight", weight), needed<const float>("kds", kds),
                            shift_of(sizes, kds_shift), post_ops(bias, gain, offset), is_wide(sizes, weight_bits),
                            activation_bits_of(sizes, activation_bits), one_of<Sign>("sign", sign, kSigns)},
                           from, input, outputs(to));
           })
      .def("join", &Program::join)
      .def("map",
           [](Program& self, int from, const std::vector<std::tuple<int, int, float, float, int, Address, Address>>& given,
              const OutputsTuple& to) {
             std::vector<MapOperation> operations;
             for (const auto& [operation, activation, alpha, beta, tensor, constants, offset] : given)
               operations.push_back({one_of<Operation>("operation", operation, kOperations),
                                     {one_of<Activation>("activation", activation, kActivations), alpha, beta},
                                     tensor,
                                     at<const float>(constants),
                                     at<const float>(offset)});
             self.map(from, operations, outputs(to));
           })
      .def("average", &Program::average)
      .def("moments", [](Program& self, int from, std::int64_t groups, Address weight, float epsilon, int mean,
                         int scale) { self.moments(from, groups, at<const float>(weight), epsilon, mean, scale); })
      .def("flatten", &Program::flatten)
      .def("rearrange",
           [](Program& self, int from, const std::vector<std::array<std::int64_t, 7>>& given, int to) {
             std::vector<Loop> loops;
             for (const auto& l : given) loops.push_back({l[0], {l[1], l[2], l[3]}, {l[4], l[5], l[6]}});
             self.rearrange(from, loops, to);
           })
      .def("pick", [](Program& self, int from, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& columns,
                      float fill, const OutputsTuple& to) { self.pick(from, rows, columns, fill, outputs(to)); })
      .def("pool",
           [](Program& self, int from, const std::array<std::int64_t, 8>& w, bool average, bool count_padding, std::int64_t divisor,
              const std::array<std::int64_t, 2>& out, const OutputsTuple& to) {
             self.pool(from, {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], average, count_padding, divisor}, out[0], out[1],
                       outputs(to));
           })
      .def("interpolate",
           [](Program& self, int from, const std::vector<BetweenTuple>& rows, const std::vector<BetweenTuple>& columns,
              std::int64_t split, int first, int rest, const OutputsTuple& to) {
             const auto all = [](const std::vector<BetweenTuple>& given) {
               std::vector<Between> made;
               for (const auto& [one, other, weight, other_weight] : given) made.push_back({one, other, weight, other_weight});
               return made;
             };
             self.interpolate(from, all(rows), all(columns), split, one_of<Interpolation>("first", first, kInterpolations),
                              one_of<Interpolation>("rest", rest, kInterpolations), outputs(to));
           })
      .def("average_windows",
           [](Program& self, int from, const std::vector<std::array<std::int64_t, 2>>& rows,
              const std::vector<std::array<std::int64_t, 2>>& columns, bool at_once, const OutputsTuple& to) {
             const auto all = [](const std::vector<std::array<std::int64_t, 2>>& given) {
               std::vector<Span> made;
               for (const auto& [begin, end] : given) made.push_back({begin, end});
               return made;
             };
             self.average_windows(from, all(rows), all(columns), at_once, outputs(to));
           })
      .def("skip", &Program::skip, "A step that the caller takes.")
      .def("bytes", &Program::bytes, "Of memory that a run over so many images needs, aligned to 64.")
      .def(
          "run",
          [](const Program& self, std::int64_t images, const std::vector<Address>& bases, int first, int last, Address seconds) {
            count_run(self.kernels());
            nb::gil_scoped_release released;
            self.run(images, bases, first, last, at<double>(seconds));
          },
          "Run steps on tensors at these addresses; adds what each took, unless that address is 0.");
}

}  // namespace

NB_MODULE(_C, m) {
  nb::set_leak_warnings(false);  // networks that exist until the interpreter exits are not leaks
  m.doc() = "Compiled part of dsconv";
  bind_sizes(m);
  bind_machine(m);
  bind_layers(m);
  bind_convolution(m);
  bind_program(m);
}
