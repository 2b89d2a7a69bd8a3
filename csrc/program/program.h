// A network as a list of steps over tensors in one piece of memory.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "../conv/joined.h"

namespace dsconv {

// A float tensor: of images that lie `strides.image` apart, from base address number `base` plus `offset` bytes an
// image plus `first` values on. The frames of a 3-D one lie one below the other.
struct FloatTensor {
  int base;
  std::int64_t offset, first;
  std::int64_t channels, height, width;
  Strides strides;

  std::int64_t pixels() const { return height * width; }
  bool dense() const {  // the channels of a pixel are contiguous, and so are pixels
    return strides.channel == 1 && strides.y == width * strides.x && strides.image == height * strides.y;
  }
};

// The destinations of a step's outputs, and its last operations; -1 is no tensor.
struct StepOutputs {
  int values;
  int residual;                                       // added before the activation
  std::vector<std::pair<int, std::int64_t>> targets;  // quantized tensors, and where the first channel goes there
  ActivationSettings activation;
};

// An operation of a map. Its operand is a tensor of all channels or of one, for all pixels or for the image; or constants
// of each channel; or the alpha of `activation`, which also is the epsilon of layer norm.
struct MapOperation {
  Operation operation;
  ActivationSettings activation;
  int tensor;  // or -1
  const float *constants, *offset;
};

// Windows of a pooling.
struct PoolWindow {
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool average, count_padding;
  std::int64_t divisor;  // of an average; 0: the number of values, with those of the padding if they count
};

// A loop over values of an image that go to another place: its size, and how far a turn goes in the tensor that is read
// and the one that is written, in channels, rows and columns each.
struct Loop {
  std::int64_t size;
  std::array<std::int64_t, 3> read, written;
};

// Rows or columns from `begin` to before `end`.
struct Span {
  std::int64_t begin, end;
};

// A place between two rows or columns, and their weights.
struct Between {
  std::int64_t one, other;
  float weight, other_weight;
};

// Tensors are named by numbers. Base 0 is memory of bytes(images) bytes, aligned to 64, that nobody else uses during a
// run; steps are fixed before the first run, and runs may overlap.
class Program {
  struct Run {
    std::int64_t images;
    std::span<const std::uintptr_t> bases;
  };
  using Step = std::function<void(const Run&)>;

 public:
  explicit Program(const Kernels& kernels) : kernels_(kernels) {}

  int add_float(const FloatTensor&);
  int add_quantized(const ActivationFormat&, const PaddedGrid&, std::int64_t offset);  // in base 0
  static std::int64_t quantized_bytes(const ActivationFormat&, const PaddedGrid&);
  std::int64_t bytes(std::int64_t images) const;
  const Kernels& kernels() const { return kernels_; }

  // Reads quantized tensor `input`, or with flattened blocks float tensor `from`.
  void convolve(const ConvSizes&, const Layer&, int from, int input, const StepOutputs&);
  // Computes the last step, a depthwise layer of float activations or a pooling, together with the layer before it, whose
  // outputs nobody else reads: these are not written.
  void join();
  // Applies operations one after another.
  void map(int from, const std::vector<MapOperation>&, const StepOutputs&);
  // Averages every channel of an image, in the order of PyTorch's vectors of `lanes`.
  void average(int from, int lanes, int to);
  // Finds the means and scales of group norm (MomentsArgs), each a tensor of one pixel.
  void moments(int from, std::int64_t groups, const float* weight, float epsilon, int mean, int scale);
  // Turns all values of an image into channels of one pixel, those of a channel one after another.
  void flatten(int from, int to);
  // Copies every value of an image to its place in the result, in nested loops, the outermost first.
  void rearrange(int from, const std::vector<Loop>&, int to);
  // Copies pixels: one of the result is that of this row and column of the input, or `fill` where either is -1.
  void pick(int from, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& columns, float fill,
            const StepOutputs&);
  // Computes pixels between rows and columns of the input: channels before `split` in one order of sums, others in another.
  void interpolate(int from, const std::vector<Between>& rows, const std::vector<Between>& columns, std::int64_t split,
                   Interpolation first, Interpolation rest, const StepOutputs&);
  // Averages windows of rows and columns. A sum is divided by the number of pixels `at_once`, or by that of rows and then
  // by that of columns.
  void average_windows(int from, const std::vector<Span>& rows, const std::vector<Span>& columns, bool at_once, const StepOutputs&);
  void pool(int from, const PoolWindow&, std::int64_t out_height, std::int64_t out_width, const StepOutputs&);
  // Adds a step that the caller takes.
  void skip() {
    steps_.push_back([](const Run&) {});
  }

  // Adds the time of each step to seconds[step], unless that is null.
  void run(std::int64_t images, std::span<const std::uintptr_t> bases, int first, int last, double* seconds) const;

 private:
  struct QuantizedSlot {
    ActivationFormat format;
    PaddedGrid grid;  // of the frames of one image
    std::int64_t offset;
  };

  struct LayerStep {
    ConvSizes g;  // of one image
    Layer l;
    int from, input;
    StepOutputs to;
    std::size_t step;
  };
  // A step that can be computed together with the layer that makes what it reads.
  struct Joinable {
    int from;
    std::size_t step;
    std::function<void(const Run&, const FirstLayer&)> together;
  };

  // Writes the pixels of one line of outputs, `stride` apart, from the image at `values`.
  using Line = std::function<void(const float* values, std::int64_t y, float* to, std::int64_t stride)>;
  void add_lines(const FloatTensor&, std::int64_t out_height, std::int64_t out_width, const StepOutputs&, Line);
  const FloatTensor& float_tensor(int id) const;
  const QuantizedSlot& quantized_slot(int id) const;
  std::uintptr_t base(const Run&, int number) const;
  float* address(const Run&, const FloatTensor&) const;
  Input input(const Run&, int id) const;
  Output output(const Run&, const StepOutputs&, std::span<const QuantizedTarget>) const;
  QuantizedTensor quantized(const Run&, int id) const;
  std::vector<QuantizedTarget> targets(const Run&, const StepOutputs&, std::int64_t channels) const;
  void check(const StepOutputs&, std::int64_t channels, std::int64_t height, std::int64_t width, bool whole) const;
  void quantize_whole(const FloatTensor&, const StepOutputs&);

  const Kernels& kernels_;
  std::vector<FloatTensor> floats_;
  std::vector<QuantizedSlot> quantized_;
  std::vector<Step> steps_;
  std::vector<LayerStep> layers_;
  std::vector<Joinable> joinable_;
  std::int64_t bytes_ = 0;
  std::int64_t largest_ = 1;  // bytes an image of the largest of all memories
  int bases_ = 1;
};

}  // namespace dsconv
