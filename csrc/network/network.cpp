#include "network.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "../parallel.h"
#include "../rounding/winograd.h"
#include "../scratch.h"
#include "geometry.h"
#include "tables.h"

namespace dsconv {
namespace {

constexpr std::size_t kMaxRank = 8;
constexpr std::size_t kSpare = 4;  // workspaces that are cached for the next runs
constexpr std::size_t kSizesKept = 16;
constexpr std::int64_t kMaxValues = std::int64_t{1} << 40, kMaxSide = std::int64_t{1} << 31;
// Limits over all programs for all sizes of a file, which are made when it is opened.
constexpr std::size_t kMaxSizes = 1 << 12;
constexpr std::int64_t kMaxSteps = 1 << 18, kMaxListed = 1 << 23;
constexpr flatbuffers::uoffset_t kMaxTables = 1 << 22;

// Reports errors that an input can cause, not only a file.
void fits(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

int checked_bits(int bits) {
  require(bits >= 2 && bits <= 8, "bits are 2 to 8");
  return bits;
}

std::vector<std::string> texts(const flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>* from) {
  std::vector<std::string> all;
  for (const flatbuffers::String* text : items(from)) all.push_back(text->str());
  return all;
}

// Returns names of inputs or outputs.
std::vector<std::string> names(const flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>* from) {
  std::vector<std::string> all = texts(from);
  require(!all.empty(), "expected inputs and outputs");
  require(std::set(all.begin(), all.end()).size() == all.size(), "two inputs or two outputs have one name");
  return all;
}

// Returns the sizes of the terms of a Winograd layer's KDS shift.
ConvSizes centre_of(const ConvSizes& winograd) {
  ConvSizes g = winograd;
  g.winograd = false, g.kernel_h = g.kernel_w = 1;
  return g;
}

ActivationSettings activation(int kind, float alpha, float beta) {
  return {one_of<Activation>("no such activation", kind, kActivations), alpha, beta};
}

StepOutputs outputs_of(const file::Uses* uses) {
  needed(uses);
  StepOutputs to{uses->values(), uses->residual(), {}, activation(uses->activation(), uses->alpha(), uses->beta())};
  if (uses->targets())
    for (const file::Target* target : items(uses->targets())) to.targets.emplace_back(target->tensor(), target->first_channel());
  return to;
}

// Converts the bits of a float16 to float32.
float of_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity and NaN
  // The exponent bias of float16 is smaller by 112. A product with 2^112, which is exact, also converts subnormal
  // numbers.
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}

// Unpacks integers from index `first` on from a dense bit stream, lowest bits first, and subtracts the zero point.
std::vector<std::int8_t> integers_of(const std::byte* stored, std::int64_t first, std::int64_t count, int width) {
  constexpr std::int64_t kTogether = 8192;
  std::vector<std::int8_t> all(count);
  parallel(ceil_div(count, kTogether), [&](std::int64_t task) {
    for (std::int64_t i = task * kTogether; i < std::min(count, (task + 1) * kTogether); ++i) {
      const std::int64_t bit = (first + i) * width;
      unsigned two = std::to_integer<unsigned>(stored[bit / 8]);
      if (bit % 8 + width > 8) two |= std::to_integer<unsigned>(stored[bit / 8 + 1]) << 8;
      all[i] = static_cast<std::int8_t>(static_cast<int>(two >> bit % 8 & ((1u << width) - 1)) - (1 << (width - 1)));
    }
  });
  return all;
}

// The transformed weights of some outputs, as dsconv/numerics/winograd.py defines them.
struct WinogradPart {
  std::vector<std::int8_t> q;  // (outputs, channels, products)
  std::vector<float> scale;    // (outputs, blocks, products)
  std::vector<float> shift;    // (outputs, blocks), of the centre
};

// Takes vqk (outputs, channels, 9), kds and an optional shift (outputs, blocks, 9).
WinogradPart winograd_part(const ConvSizes& g, const std::vector<std::int8_t>& vqk, const float* kds, const float* shift,
                           std::int64_t block_size, const Kernels& kernels) {
  constexpr std::int64_t kTaps = 9, kProducts = kWinogradProducts;
  const std::int64_t depth = g.channels, blocks = ceil_div(depth, block_size), outputs = g.outputs;
  std::vector<float> w(vqk.size()), scale(kProducts * outputs * blocks);
  std::vector<std::int8_t> q(kProducts * outputs * depth);
  parallel(outputs, [&](std::int64_t output) {
    for (std::int64_t c = 0; c < depth; ++c)
      for (std::int64_t tap = 0; tap < kTaps; ++tap) {
        const std::int64_t i = (output * depth + c) * kTaps + tap, s = (output * blocks + c / block_size) * kTaps + tap;
        w[i] = static_cast<float>(vqk[i]) * kds[s];
        if (shift) w[i] += shift[s];
      }
  });
  round_winograd(kernels, {w.data(), outputs, depth, block_size}, {q.data(), scale.data()});
  WinogradPart made{std::vector<std::int8_t>(q.size()), std::vector<float>(scale.size()), std::vector<float>(outputs * blocks)};
  parallel(outputs, [&](std::int64_t output) {
    const auto at_q = [&](std::int64_t product, std::int64_t c) { return q[(product * outputs + output) * depth + c]; };
    const auto at_scale = [&](std::int64_t product, std::int64_t b) { return scale[(product * outputs + output) * blocks + b]; };
    for (std::int64_t c = 0; c < depth; ++c)
      for (std::int64_t p = 0; p < kProducts; ++p) made.q[(output * depth + c) * kProducts + p] = at_q(p, c);
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (std::int64_t p = 0; p < kProducts; ++p) made.scale[(output * blocks + b) * kProducts + p] = at_scale(p, b);
      const auto term = [&](std::int64_t product) {
        std::int32_t sum = 0;
        for (std::int64_t c = b * block_size; c < std::min(depth, (b + 1) * block_size); ++c) sum += at_q(product, c);
        return static_cast<float>(sum * kWinogradShift) * at_scale(product, b);
      };
      made.shift[output * blocks + b] = term(kWinogradCentre) + term(kWinogradPositions);
    }
  });
  return made;
}

// Copies values of tensors of one shape.
void copy_values(std::span<const std::int64_t> shape, const float* from, const std::int64_t* from_strides, float* to,
                 const std::int64_t* to_strides) {
  if (shape.empty()) return void(*to = *from);
  const std::int64_t read = from_strides[0], written = to_strides[0];
  if (shape.size() == 1) {
    if (read == 1 && written == 1) std::copy_n(from, shape[0], to);
    else
      for (std::int64_t i = 0; i < shape[0]; ++i) to[i * written] = from[i * read];
    return;
  }
  for (std::int64_t i = 0; i < shape[0]; ++i)
    copy_values(shape.subspan(1), from + i * read, from_strides + 1, to + i * written, to_strides + 1);
}

void copy_samples(std::int64_t samples, const Shape& shape, const float* from, const Shape& from_strides, float* to,
                  const Shape& to_strides) {
  parallel(samples, [&](std::int64_t sample) {
    copy_values(shape, from + sample * from_strides[0], from_strides.data() + 1, to + sample * to_strides[0],
                to_strides.data() + 1);
  });
}

// Whether tensors of one shape have the same memory layout.
bool alike(std::int64_t samples, const Shape& shape, const Shape& strides, const Shape& other) {
  if (samples > 1 && strides[0] != other[0]) return false;
  for (std::size_t i = 0; i < shape.size(); ++i)
    if (shape[i] > 1 && strides[i + 1] != other[i + 1]) return false;
  return true;
}

}  // namespace

std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + (shape[i] < 0 ? std::string("N") : std::to_string(shape[i]));
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::byte* Memory::of(std::int64_t bytes) {
  if (bytes > bytes_) {
    data_.reset(), bytes_ = 0;
    data_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}, std::nothrow)));
    if (!data_) throw NoMemory(bytes);
    bytes_ = bytes;
  }
  return data_.get();
}

Network::Network(std::shared_ptr<const File> file, const Kernels& kernels) : file_(std::move(file)), kernels_(kernels) {
  const std::span<const std::byte> header = file_->header();
  const auto* const bytes = reinterpret_cast<const std::uint8_t*>(header.data());
  flatbuffers::Verifier::Options options;
  options.max_depth = 16, options.max_tables = kMaxTables;
  flatbuffers::Verifier verifier(bytes, header.size(), options);
  require(file::VerifyNetworkBuffer(verifier), "its tables do not hold together");
  tables_ = file::GetNetwork(bytes);
  inputs_ = names(tables_->inputs()), outputs_ = names(tables_->outputs());
  if (tables_->classes()) classes_ = texts(tables_->classes());
  if (tables_->preprocess()) preprocess_ = tables_->preprocess()->str();
  weights_.resize(items(tables_->weights()).size());
  for (const file::Program* of : items(tables_->programs())) {
    require(of->size_step() >= 0 && items(of->sizes()).size() > 0, "a program without sizes");
    for (const file::Size* size : *of->sizes()) add(*of, shapes_of(*size), kernels);
    const file::Program** const free[] = {of->one_sample() ? &free_one_ : nullptr,
                                          of->several_samples() ? &free_several_ : nullptr};
    for (const file::Program** of_free : free)
      if (of_free && of->size_step()) require(!*of_free, "two programs for any size"), *of_free = of;
  }
  require(
      !programs_.empty() && std::all_of(programs_.begin(), programs_.end(), [](const Programs& p) { return p.one && p.several; }),
      "expected programs for one sample and for several");
  require(!free_one_ == !free_several_, "expected programs for one sample and for several");
}

// Returns the shapes of all inputs that a program was recorded for.
std::vector<Shape> Network::shapes_of(const file::Size& size) const {
  std::vector<Shape> shapes;
  for (const file::Shape* shape : items(size.inputs())) {
    require(items(shape->sizes()).size() < kMaxRank, "a tensor has more than 8 dimensions");
    shapes.emplace_back(shape->sizes()->begin(), shape->sizes()->end());
    for (const std::int64_t n : shapes.back()) require(n > 0, "an input has a size below 1");
  }
  require(shapes.size() == inputs_.size(), "expected a shape of every input");
  return shapes;
}

// Adds a size for which a program was recorded.
void Network::add(const file::Program& of, const std::vector<Shape>& shapes, const Kernels& kernels) {
  std::shared_ptr<const Compiled> made;
  try {
    made = compiled(of, shapes, kernels);
  } catch (const std::invalid_argument& error) {
    throw FileError(std::string("the file is damaged: ") + error.what());
  }
  steps_ += made->steps, listed_ += made->listed;
  require(sizes_.size() < kMaxSizes && steps_ <= kMaxSteps && listed_ <= kMaxListed, "it has programs for too many sizes");
  Size size{shapes, {}};
  for (const Port& p : made->outputs) size.outputs.push_back(p.shape);
  std::size_t at = 0;
  while (at < sizes_.size() && sizes_[at].inputs != size.inputs) ++at;
  if (at == sizes_.size()) sizes_.push_back(size), programs_.emplace_back();
  require(sizes_[at].outputs == size.outputs, "two programs of one size have other outputs");
  if (of.one_sample()) programs_[at].one = made;
  if (of.several_samples()) programs_[at].several = made;
}

const std::byte* Network::bytes(std::uint64_t begin, std::uint64_t size) const {
  const std::uint64_t end = file_->data().size() - File::kReadPastEnd;
  require(begin % File::kAlignment == 0 && begin <= end && size <= end - begin, "data lie outside of it");
  return file_->data().data() + begin;
}

const float* Network::constant(int number, std::int64_t count) const {
  if (number == -1) return nullptr;
  require(number >= 0 && static_cast<flatbuffers::uoffset_t>(number) < items(tables_->constants()).size(), "no such constant");
  const file::Bytes* const place = tables_->constants()->Get(number);
  require(place->size() == static_cast<std::uint64_t>(count) * 4, "a constant has another size than expected");
  return reinterpret_cast<const float*>(bytes(place->begin(), place->size()));
}

const Network::PackedWeights& Network::weights(int number, const ConvSizes& g, int bits, const Kernels& kernels) const {
  require(number >= 0 && number < static_cast<int>(weights_.size()), "no such weights");
  const bool wide = bits > 4 || g.winograd;
  const std::int64_t weight_bytes = g.packed_bytes(wide), kds_count = g.kds_count();
  const std::int64_t shift_count = g.winograd ? centre_of(g).kds_count() : kds_count;
  const auto fits = [&](const PackedWeights& w) {
    return w.weight_bytes == weight_bytes && w.kds_count == kds_count && (!w.shift || w.shift_count == shift_count);
  };
  if (!weights_[number]) {
    auto made = std::make_unique<PackedWeights>();
    const file::Weights& of = *tables_->weights()->Get(number);
    needed(of.weight()), needed(of.kds());
    made->weight_bytes = weight_bytes, made->kds_count = kds_count, made->shift_count = shift_count;
    pack(of, g, bits, kernels, *made);
    weight_bytes_ += made->memory.bytes();
    weights_[number] = std::move(made);
  }
  require(fits(*weights_[number]), "weights have another size than expected");
  require(!g.winograd || weights_[number]->shift, "a Winograd layer has no shift");
  return *weights_[number];
}

std::vector<float> Network::scales(const file::Bytes* place, std::int64_t count, bool half) const {
  if (!place) return {};
  require(place->size() == static_cast<std::uint64_t>(count) * (half ? 2 : 4), "scales have another size than expected");
  const std::byte* const from = bytes(place->begin(), place->size());
  std::vector<float> all(count);
  if (!half) std::memcpy(all.data(), from, place->size());
  else
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint16_t value;
      std::memcpy(&value, from + 2 * i, sizeof value);
      all[i] = of_half(value);
    }
  return all;
}

// Packs a layer like dsconv/ops/packing.py.
void Network::pack(const file::Weights& of, const ConvSizes& g, int bits, const Kernels& kernels, PackedWeights& to) const {
  const int width = checked_bits(of.bits());
  require(of.winograd() == g.winograd && of.block_size() > 0 && (g.winograd || width == bits), "weights of another layer");
  const bool packed = of.form() == file::Form::packed, wide = bits > 4 || g.winograd;
  const std::int64_t taps = g.winograd && !packed ? 9 : g.taps(), depth = g.layout().depth;
  const std::int64_t block_size = std::min<std::int64_t>(depth, of.block_size()), blocks = ceil_div(depth, block_size);
  const std::int64_t count = g.outputs * depth * taps, scale_count = g.outputs * blocks * taps;
  require(packed || of.form() == file::Form::integers, "no such form of weights");
  require(blocks == g.layout().blocks() && count < kMaxValues &&
              of.weight()->size() == static_cast<std::uint64_t>(packed ? to.weight_bytes : ceil_div(count * width, 8)),
          "weights have another size than expected");
  const std::byte* const stored = bytes(of.weight()->begin(), of.weight()->size());
  const std::int64_t shifts = g.winograd && packed ? g.outputs * blocks : scale_count;
  const std::vector<float> kds = scales(of.kds(), scale_count, of.half()), shift = scales(of.kds_shift(), shifts, of.half());
  require(!g.winograd || !packed || !shift.empty(), "a Winograd layer has no shift");
  const bool has_shift = g.winograd || !shift.empty();
  const auto rounded = [](std::int64_t n) { return ceil_div(n, 64) * 64; };
  const std::int64_t at_kds = packed ? 0 : rounded(to.weight_bytes), at_shift = at_kds + rounded(4 * to.kds_count);
  std::byte* const memory = to.memory.of(at_shift + (has_shift ? rounded(4 * to.shift_count) : 0) + 64);
  auto *const packed_kds = reinterpret_cast<float*>(memory + at_kds), *const packed_shift =
                                                                          reinterpret_cast<float*>(memory + at_shift);
  auto* const weight = reinterpret_cast<std::uint8_t*>(memory);
  to.weight = packed ? reinterpret_cast<const std::uint8_t*>(stored) : weight;
  to.kds = packed_kds, to.shift = has_shift ? packed_shift : nullptr;
  if (!g.winograd || packed) {
    pack_kds(g, kds.data(), packed_kds);
    if (has_shift) pack_kds(g.winograd ? centre_of(g) : g, shift.data(), packed_shift);
    if (!packed) pack_weight(g, integers_of(stored, 0, count, width).data(), wide ? 8 : bits, weight);
    return;
  }
  // Packs one pair of panels at a time: for all at once, the floats would need more memory than the whole network.
  const std::int64_t pair_scales = g.taps() * blocks * kNR;
  for (std::int64_t pair = 0; pair < g.panel_pairs(); ++pair) {
    ConvSizes part = g;
    part.outputs = std::min<std::int64_t>(kNR, g.outputs - pair * kNR);
    const std::int64_t first = pair * kNR * taps;
    const std::vector<std::int8_t> vqk = integers_of(stored, first * depth, part.outputs * depth * taps, width);
    const float* const part_shift = shift.empty() ? nullptr : shift.data() + first * blocks;
    const WinogradPart made = winograd_part(part, vqk, kds.data() + first * blocks, part_shift, block_size, kernels);
    std::vector<std::uint8_t> panels(part.packed_bytes(true));
    pack_weight(part, made.q.data(), 8, panels.data());
    const auto end_of_panels = panels.begin() + part.panels_bytes(true);
    std::copy(panels.begin(), end_of_panels, weight + pair * part.panels_bytes(true));
    std::copy(end_of_panels, panels.end(), weight + g.panels_bytes(true) + pair * pair_scales * 4);
    pack_kds(part, made.scale.data(), packed_kds + pair * pair_scales);
    pack_kds(centre_of(part), made.shift.data(), packed_shift + pair * blocks * kNR);
  }
}

// Checks the shape of an input, and returns its pixels.
Grid Network::grid_of(const file::Program& of, std::size_t input, const Shape& shape) const {
  const file::Port& port = *needed(items(of.inputs()).Get(static_cast<flatbuffers::uoffset_t>(input)));
  const auto& axes = items(port.axes());
  constexpr const char* kOther = "the number of channels or of dimensions is another one";
  fits(axes.size() == shape.size(), kOther);
  Grid grid{1, 1, 1};
  if (port.tensor() == -1) return grid;
  require(of.float_tensors() && port.tensor() >= 0 &&
              static_cast<flatbuffers::uoffset_t>(port.tensor()) < items(of.float_tensors()).size(),
          "no such tensor");
  std::int64_t channels = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    fits(shape[i] > 0 && shape[i] < kMaxSide, "an input is too large");
    switch (axes.Get(static_cast<flatbuffers::uoffset_t>(i))) {
      case file::Axis::one: fits(shape[i] == 1, kOther); break;
      case file::Axis::channels: channels = shape[i]; break;
      case file::Axis::frames: grid.frames = shape[i]; break;
      case file::Axis::rows: grid.height = shape[i]; break;
      case file::Axis::columns: grid.width = shape[i]; break;
      default: require(false, "an input has an unknown dimension");
    }
  }
  fits(channels == of.float_tensors()->Get(port.tensor())->channels(), kOther);
  return grid;
}

Network::Port Network::port(const file::Port& of, const Geometry& geometry, const Compiled& made) const {
  const auto& axes = items(of.axes());
  require(axes.size() < kMaxRank, "a tensor has more than 8 dimensions");
  if (of.tensor() == -1) return {-1, 0, 0, 0, {}, {}};
  const FloatTensor t = geometry.float_tensor(of.tensor());
  const Grid grid = geometry.grid(of.tensor());
  Port p{t.base, t.offset, t.first, t.strides.image, {}, {}};
  std::int64_t values = 1;
  std::set<file::Axis> run_over;
  for (flatbuffers::uoffset_t i = 0; i < axes.size(); ++i) {
    std::int64_t size = 1, stride = 0;
    const file::Axis axis = axes.Get(i);
    require(axis == file::Axis::one || run_over.insert(axis).second, "an input or output has a dimension twice");
    switch (axis) {
      case file::Axis::one: break;
      case file::Axis::channels: size = t.channels, stride = t.strides.channel; break;
      case file::Axis::frames: size = grid.frames, stride = grid.height * t.strides.y; break;
      case file::Axis::rows: size = grid.height, stride = t.strides.y; break;
      case file::Axis::columns: size = grid.width, stride = t.strides.x; break;
      default: require(false, "an input or output has an unknown dimension");
    }
    p.shape.push_back(size), p.strides.push_back(stride);
    fits(size <= kMaxValues / values, "an input or output is too large");
    values *= size;
  }
  fits(values == t.channels * t.pixels(), "an input or output has other values than its tensor");
  p.whole = p.base > 0 && p.first == 0 && values == made.bases[p.base];
  return p;
}

std::shared_ptr<const Network::Compiled> Network::compiled(const file::Program& of, const std::vector<Shape>& shapes,
                                                           const Kernels& kernels) const {
  require(items(of.inputs()).size() == inputs_.size() && items(of.outputs()).size() == outputs_.size(),
          "expected a place of every input and output");
  std::vector<Grid> grids;
  for (std::size_t i = 0; i < shapes.size(); ++i) grids.push_back(grid_of(of, i, shapes[i]));
  const Geometry geometry(of, grids);
  const auto made = std::make_shared<Compiled>(kernels);
  Program& program = made->program;
  made->bases = geometry.bases(), made->listed = geometry.listed();
  std::vector<std::int64_t> channels;
  const int floats = of.float_tensors() ? static_cast<int>(of.float_tensors()->size()) : 0;
  const int quantized = of.quantized_tensors() ? static_cast<int>(of.quantized_tensors()->size()) : 0;
  for (int id = 0; id < floats; ++id) {
    const FloatTensor t = geometry.float_tensor(id);
    require(t.base < static_cast<int>(made->bases.size()), "no such memory");
    program.add_float(t);
    channels.push_back(t.channels);
  }
  for (int id = 0; id < quantized; ++id)
    program.add_quantized(geometry.format(id), geometry.quantized_grid(id), geometry.quantized_offset(id));
  const auto channels_of = [&](int tensor) {
    require(tensor >= 0 && tensor < static_cast<int>(channels.size()), "no such tensor");
    return channels[tensor];
  };
  std::vector<bool> written(made->bases.size());
  const auto writes = [&](int tensor) {
    if (tensor >= 0) channels_of(tensor), written[of.memory()->Get(of.float_tensors()->Get(tensor)->memory())->base()] = true;
  };
  const file::Step* before = nullptr;
  for (const file::Step* step : items(of.steps())) {
    needed(step->operation());
    if (step->uses()) writes(step->uses()->values());
    switch (step->operation_type()) {
      case file::Operation::Convolve: {
        const file::Convolve& c = *step->operation_as_Convolve();
        const ConvSizes g = geometry.conv_sizes(c);
        const int bits = checked_bits(c.weight_bits());
        const PackedWeights& w = weights(c.weights(), g, bits, kernels);
        const auto term = [&](int number) { return constant(number, g.outputs); };
        const PostOps post{term(c.bias()), term(c.gain()), term(c.offset()), {Activation::none, 0.0f, 0.0f}};
        require(!post.gain == !post.offset, "a gain comes with an offset");
        const bool floats = c.activation_bits() == kFloatBits && g.takes_floats() && !w.shift;
        program.convolve(g,
                         {w.weight, w.kds, w.shift, post, bits > 4 || g.winograd,
                          floats ? kFloatBits : checked_bits(c.activation_bits()), one_of<Sign>("no such sign", c.sign(), kSigns)},
                         c.source(), c.quantized(), outputs_of(step->uses()));
        break;
      }
      case file::Operation::Map: {
        const file::Map& m = *step->operation_as_Map();
        std::vector<MapOperation> operations;
        if (m.operations())
          for (const file::MapOperation* o : items(m.operations()))
            operations.push_back({one_of<Operation>("no such operation", o->operation(), kOperations),
                                  activation(o->activation(), o->alpha(), o->beta()), o->tensor(),
                                  constant(o->constants(), channels_of(m.source())),
                                  constant(o->offset(), channels_of(m.source()))});
        program.map(m.source(), operations, outputs_of(step->uses()));
        break;
      }
      case file::Operation::Average: {
        const file::Average& a = *step->operation_as_Average();
        writes(a.result());
        program.average(a.source(), a.lanes(), a.result());
        break;
      }
      case file::Operation::Moments: {
        const file::Moments& m = *step->operation_as_Moments();
        writes(m.mean()), writes(m.scale());
        program.moments(m.source(), m.groups(), constant(m.weight(), channels_of(m.source())), m.epsilon(), m.mean(), m.scale());
        break;
      }
      case file::Operation::Flatten: {
        const file::Flatten& f = *step->operation_as_Flatten();
        writes(f.result());
        program.flatten(f.source(), f.result());
        break;
      }
      case file::Operation::Rearrange: {
        const file::Rearrange& r = *step->operation_as_Rearrange();
        writes(r.result());
        program.rearrange(r.source(), geometry.loops(r), r.result());
        break;
      }
      case file::Operation::Pick: {
        const file::Pick& p = *step->operation_as_Pick();
        program.pick(p.source(), geometry.rows(p), geometry.columns(p), p.fill(), outputs_of(step->uses()));
        break;
      }
      case file::Operation::Pool: {
        const file::Pool& p = *step->operation_as_Pool();
        const file::PoolWindow& w = *needed(p.window());
        const Grid out = geometry.pooled(p);
        program.pool(p.source(),
                     {w.kernel_h(), w.kernel_w(), w.stride_h(), w.stride_w(), w.pad_h(), w.pad_w(), w.dilation_h(), w.dilation_w(),
                      p.average(), p.count_padding(), p.divisor()},
                     out.height, out.width, outputs_of(step->uses()));
        break;
      }
      case file::Operation::Interpolate: {
        const file::Interpolate& i = *step->operation_as_Interpolate();
        const auto order = [](int value) { return one_of<Interpolation>("no such order of sums", value, kInterpolations); };
        const file::Order& sums = geometry.order(i);
        program.interpolate(i.source(), geometry.rows(i), geometry.columns(i), sums.split(), order(sums.first()),
                            order(sums.rest()), outputs_of(step->uses()));
        break;
      }
      case file::Operation::AverageWindows: {
        const file::AverageWindows& a = *step->operation_as_AverageWindows();
        program.average_windows(a.source(), geometry.rows(a), geometry.columns(a), a.at_once(), outputs_of(step->uses()));
        break;
      }
      default: throw FileError("a step is not known: install a newer dsconv runtime", true);
    }
    if (step->joined() && before && geometry.joined(*before)) program.join();
    before = step;
    ++made->steps;
  }
  require(of.cached_bytes() >= 0, "no such number of bytes");
  if (of.cached_bytes())
    made->samples_at_once = std::max<std::int64_t>(1, of.cached_bytes() / std::max<std::int64_t>(1, program.bytes(1)));
  for (const file::Port* p : *of.inputs()) made->inputs.push_back(port(*p, geometry, *made));
  for (const file::Port* p : *of.outputs()) made->outputs.push_back(port(*p, geometry, *made));
  for (const Port& p : made->outputs) require(p.base >= 0, "an output has no place");
  // Inputs may be the user's memory, so no step writes to them.
  std::vector<bool> taken = written;
  taken.resize(made->bases.size());
  for (const Port& p : made->inputs) {
    require(p.base != 0 && (p.base < 0 || !taken[p.base]), "an input has the memory of another tensor");
    if (p.base > 0) taken[p.base] = true;
  }
  return made;
}

// Returns the shapes of single samples of inputs (samples, ...), and checks that all have the same number of samples.
std::vector<Shape> Network::samples_of(std::span<const Shape> given) const {
  std::vector<Shape> shapes;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const std::string expected = given.size() > 1 ? "expected the same number of samples in all inputs" : "expected (N, ...)";
    if (given[i].empty() || given[i][0] != given[0][0] || given[i][0] < 0)
      throw std::invalid_argument("input '" + inputs_[i] + "': " + expected + ", got " + text_of(given[i]));
    shapes.emplace_back(given[i].begin() + 1, given[i].end());
  }
  return shapes;
}

std::shared_ptr<const Network::Compiled> Network::compiled_for(std::span<const Shape> given) const {
  const std::vector<Shape> shapes = samples_of(given);
  const bool one = given[0][0] == 1;
  for (std::size_t size = 0; size < sizes_.size(); ++size)
    if (sizes_[size].inputs == shapes) return one ? programs_[size].one : programs_[size].several;
  if (!may_be(shapes)) throw std::invalid_argument(expected_for(given));
  const std::lock_guard lock(mutex_);
  for (const Free& kept : free_)
    if (kept.one == one && kept.inputs == shapes) return kept.compiled;
  std::shared_ptr<const Compiled> made;
  try {
    made = compiled(one ? *free_one_ : *free_several_, shapes, kernels_);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(expected_for(given) + ": " + error.what());
  }
  if (free_.size() == kSizesKept) free_.erase(free_.begin());
  free_.push_back({one, shapes, made});
  return made;
}

// Whether inputs of these shapes differ from a listed size only by whole size steps.
bool Network::may_be(const std::vector<Shape>& shapes) const {
  if (!free_one_) return false;
  const std::int64_t step = size_step();
  const auto& recorded = shapes_of(*free_one_->sizes()->Get(0));
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    if (shapes[i].size() != recorded[i].size()) return false;
    for (std::size_t d = 0; d < shapes[i].size(); ++d)
      if (shapes[i][d] < 1 || (shapes[i][d] - recorded[i][d]) % step) return false;
  }
  return true;
}

std::int64_t Network::size_step() const { return free_one_ ? std::max(free_one_->size_step(), free_several_->size_step()) : 0; }

// Returns the message for inputs of a size that the network does not accept.
std::string Network::expected_for(std::span<const Shape> given) const {
  std::string expected, got;
  for (std::size_t i = 0; i < given.size(); ++i) got += (i ? " and " : "") + text_of(given[i]);
  for (std::size_t size = 0; size < sizes_.size(); ++size) {
    if (size == 8) {
      expected += ", or one of " + std::to_string(sizes_.size() - size) + " more";
      break;
    }
    expected += size ? ", or " : "";
    for (std::size_t i = 0; i < given.size(); ++i) {
      Shape shape{-1};
      shape.insert(shape.end(), sizes_[size].inputs[i].begin(), sizes_[size].inputs[i].end());
      expected += (i ? " and " : "") + text_of(shape);
    }
  }
  const std::int64_t step = size_step();
  const std::string others = step > 1 ? ", or heights and widths that differ from the first by multiples of " + std::to_string(step)
                             : step == 1 ? ", or other heights and widths"
                                         : "";
  return "inputs: expected " + expected + others + ", got " + got + (step ? "" : ": the network is compiled for no other size");
}

std::unique_ptr<Network::Workspace> Network::workspace() const {
  const std::lock_guard lock(mutex_);
  if (spare_.empty()) return std::make_unique<Workspace>();
  std::unique_ptr<Workspace> taken = std::move(spare_.back());
  spare_.pop_back();
  return taken;
}

std::int64_t Network::Compiled::at_once(std::int64_t samples) const {
  if (!samples_at_once || samples <= samples_at_once) return samples;
  return std::min<std::int64_t>(samples, std::max<std::int64_t>(samples_at_once, expected_threads));
}

double Network::Compiled::run_bytes(std::int64_t samples) const {
  double of_sample = static_cast<double>(program.bytes(1));
  for (const std::int64_t values : bases) of_sample += 4 * static_cast<double>(values);
  return static_cast<double>(at_once(samples)) * of_sample;
}

void Network::run(const Compiled& compiled, std::span<const UserTensor> inputs, std::span<const UserTensor> outputs) const {
  const std::int64_t samples = inputs[0].shape[0];
  const std::int64_t at_once = compiled.at_once(samples);
  std::unique_ptr<Workspace> memory = workspace();
  for (std::int64_t first = 0; first < samples; first += at_once)
    run_part(compiled, *memory, first, std::min(at_once, samples - first), inputs, outputs);
  const std::lock_guard lock(mutex_);
  if (spare_.size() < kSpare) spare_.push_back(std::move(memory));
}

void Network::run_part(const Compiled& compiled, Workspace& memory, std::int64_t first, std::int64_t count,
                       std::span<const UserTensor> inputs, std::span<const UserTensor> outputs) const {
  const std::int64_t between = compiled.program.bytes(count);  // first of all: no number of bytes below overflows then
  if (memory.size() < compiled.bases.size()) memory.resize(compiled.bases.size());
  std::vector<std::uintptr_t> bases(compiled.bases.size(), 0);
  const auto own = [&](int base) {
    const std::int64_t bytes = base ? 4 * count * compiled.bases[base] : between;
    return reinterpret_cast<std::uintptr_t>(memory[base].of(std::max<std::int64_t>(bytes, 64)));
  };
  const auto strides_of = [](const Port& p) {
    Shape all{p.sample_stride};
    all.insert(all.end(), p.strides.begin(), p.strides.end());
    return all;
  };
  // A tensor of the user is read or written in place if it has the layout that steps expect.
  const auto direct = [&](const Port& p, const UserTensor& of) {
    return p.whole && !bases[p.base] && of.values && alike(count, p.shape, strides_of(p), of.strides);
  };
  const auto values_of = [&](const UserTensor& of) { return of.values + first * of.strides[0]; };
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Port& p = compiled.inputs[i];
    if (p.base < 0) continue;
    if (direct(p, inputs[i])) {
      bases[p.base] = reinterpret_cast<std::uintptr_t>(values_of(inputs[i]));
      continue;
    }
    bases[p.base] = own(p.base);
    float* const to = reinterpret_cast<float*>(bases[p.base] + p.offset * count) + p.first;
    copy_samples(count, p.shape, values_of(inputs[i]), inputs[i].strides, to, strides_of(p));
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const Port& p = compiled.outputs[i];
    if (direct(p, outputs[i])) bases[p.base] = reinterpret_cast<std::uintptr_t>(values_of(outputs[i]));
  }
  for (std::size_t base = 0; base < bases.size(); ++base)
    if (!bases[base]) bases[base] = own(static_cast<int>(base));
  compiled.program.run(count, bases, 0, compiled.steps, nullptr);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const Port& p = compiled.outputs[i];
    const float* const from = reinterpret_cast<const float*>(bases[p.base] + p.offset * count) + p.first;
    if (outputs[i].values && from != values_of(outputs[i]))
      copy_samples(count, p.shape, from, strides_of(p), values_of(outputs[i]), outputs[i].strides);
  }
}

}  // namespace dsconv
