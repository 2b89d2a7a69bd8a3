#include "geometry.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>
#include <string>

#include "tables.h"

namespace dsconv {
namespace {

constexpr std::int64_t kMaxSide = std::int64_t{1} << 31;
constexpr std::int64_t kMaxListed = std::int64_t{1} << 22;  // limit of rows and columns over all steps that list them
constexpr std::int64_t kMaxValues = std::int64_t{1} << 40;
constexpr std::size_t kMaxTensors = 1 << 15, kMaxSteps = 1 << 15;  // of a program, which takes the square of them to place

// Reports errors that the size of an input can cause, not only a file.
void fits(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// Checks and returns the number of rows or columns of a step's result.
std::int64_t side(std::int64_t size) {
  fits(size > 0 && size < kMaxSide, "a step would make an image without pixels, or one that is too large");
  return size;
}

// Checks and returns a parameter of a window, small enough that no product of two overflows.
std::int64_t small(std::int64_t number) {
  require(number >= 0 && number < kMaxSide, "a window is too large");
  return number;
}

struct Window {
  std::int64_t kernel, stride, pad, dilation;

  Window(std::int64_t k, std::int64_t s, std::int64_t p, std::int64_t d)
      : kernel(small(k)), stride(small(s)), pad(small(p)), dilation(small(d)) {
    require(kernel > 0 && stride > 0 && dilation > 0, "a window without pixels");
    require(static_cast<double>(kernel) * static_cast<double>(dilation) < static_cast<double>(kMaxSide), "a window is too large");
  }
  std::int64_t reach() const { return dilation * (kernel - 1) + 1; }
};

std::int64_t convolved(std::int64_t in, const Window& w) {
  const std::int64_t room = in + 2 * w.pad - w.reach();
  fits(room >= 0, "an image is smaller than the kernel of a convolution");
  constexpr std::int64_t kMostBeyond = 64;  // layers split lines into one part per pixel of the stride
  fits(w.stride <= in + 2 * w.pad + kMostBeyond, "the stride of a convolution is too large for its input");
  return side(room / w.stride + 1);
}

std::int64_t transposed(std::int64_t in, const Window& w, std::int64_t more) {
  fits(in < kMaxSide, "an image is too large");  // before a product of two sizes
  return side((in - 1) * w.stride - 2 * w.pad + w.reach() + small(more));
}

std::int64_t pooled_size(std::int64_t in, const Window& w, bool ceil) {
  const std::int64_t room = in + 2 * w.pad - w.reach() + (ceil ? w.stride - 1 : 0);
  fits(room >= 0, "an image is smaller than the window of a pooling");
  std::int64_t out = room / w.stride + 1;
  if (ceil && (out - 1) * w.stride >= in + w.pad) --out;  // a window that begins beyond the image and its padding
  return side(out);
}

// Returns the number of iterations of a loop over rows or columns.
std::int64_t turns(std::int64_t size, std::int64_t rows, std::int64_t columns, const file::Loop& loop) {
  if (size >= 0) return size;
  require(size >= -2, "a loop over something unknown");
  const std::int64_t each = size == -1 ? loop.read_rows() : loop.read_columns(), all = size == -1 ? rows : columns;
  require(each > 0, "a loop that goes nowhere");
  fits(all % each == 0, "the size of an image is no multiple of what a step takes together");
  return all / each;
}

std::vector<Loop> loops_of(const file::Rearrange& r, const Grid& in) {
  std::vector<Loop> loops;
  for (const file::Loop* l : items(r.loops()))
    loops.push_back({turns(l->size(), in.rows(), in.width, *l),
                     {l->read_channels(), l->read_rows(), l->read_columns()},
                     {l->written_channels(), l->written_rows(), l->written_columns()}});
  return loops;
}

// Returns the end of the coordinates that loops write.
std::int64_t written(const std::vector<Loop>& loops, std::size_t dimension) {
  double end = 1;
  for (const Loop& loop : loops) end += static_cast<double>(loop.size - 1) * static_cast<double>(loop.written[dimension]);
  fits(end >= 1 && end < static_cast<double>(kMaxSide), "a step would make an image without pixels, or one that is too large");
  return static_cast<std::int64_t>(end);
}

// Returns the number of elements of a range from `begin` to before `end` with a step.
std::int64_t range_size(std::int64_t begin, std::int64_t end, std::int64_t step) {
  return step && end > begin ? ceil_div(end - begin, step) : 0;
}

std::int64_t places_size(const file::Places* of, std::int64_t in) {
  const file::Places& p = *needed(of);
  require(p.begin() >= 0 && p.step() >= 0 && p.repeat() > 0 && p.repeat() <= kMaxListed && p.end() >= 0, "no such places");
  const std::int64_t listed = (p.before() ? p.before()->size() : 0) + (p.after() ? p.after()->size() : 0);
  const std::int64_t size = listed + range_size(p.begin(), in - p.end(), p.step()) * p.repeat();
  fits(size > 0 && size <= kMaxListed, "a step would make an image without pixels, or one that is too large");
  return size;
}

std::vector<std::int64_t> places(const file::Places* of, std::int64_t in) {
  std::vector<std::int64_t> all;
  all.reserve(places_size(of, in));
  if (of->before())
    for (const std::int32_t place : items(of->before())) all.push_back(place);
  const std::int64_t count = range_size(of->begin(), in - of->end(), of->step());
  for (std::int64_t i = 0; i < count; ++i) all.insert(all.end(), of->repeat(), of->begin() + i * of->step());
  if (of->after())
    for (const std::int32_t place : items(of->after())) {
      fits(place <= in, "an image is smaller than what a step reads of its end");
      all.push_back(place > 0 ? in - place : -1);
    }
  return all;
}

std::int64_t stretched(const file::Stretch* of, std::int64_t in) {
  const file::Stretch& s = *needed(of);
  require(s.out() >= 0 && s.times() >= 0 && std::isfinite(s.scale()) && s.scale() >= 0, "no such size");
  const double size = s.out()     ? s.out()
                      : s.times() ? 1.0 * s.times() * static_cast<double>(in)
                                  : std::floor(s.scale() * static_cast<double>(in));
  fits(size >= 1 && size <= static_cast<double>(kMaxListed), "a step would make an image without pixels, or one that is too large");
  return static_cast<std::int64_t>(size);
}

// The same computation as in dsconv/compilation/operators/bilinear.py.
std::vector<Between> betweens(const file::Stretch* of, std::int64_t in) {
  const std::int64_t out = stretched(of, in);
  std::vector<Between> all(out);
  for (std::int64_t i = 0; i < out; ++i) {
    if (out == in) {
      all[i] = {i, i, 1.0f, 0.0f};
      continue;
    }
    const auto index = static_cast<float>(i);
    float at = 0;
    if (of->corners()) {
      if (out > 1) at = index * (static_cast<float>(in - 1) / static_cast<float>(out - 1));
    } else {
      const float step = of->scale() > 0 ? static_cast<float>(1 / of->scale()) : static_cast<float>(in) / static_cast<float>(out);
      at = std::max(static_cast<float>(static_cast<double>(step) * static_cast<double>(index + 0.5f) - 0.5), 0.0f);
    }
    const std::int64_t one = std::min(static_cast<std::int64_t>(at), in - 1);
    const float weight = std::clamp(at - static_cast<float>(one), 0.0f, 1.0f);
    all[i] = {one, std::min(one + 1, in - 1), 1.0f - weight, weight};
  }
  return all;
}

std::int64_t windows(int out) {
  require(out > 0 && out <= kMaxListed, "no such number of windows");
  return out;
}

std::vector<Span> spans(int count, std::int64_t in) {
  const std::int64_t out = windows(count);
  std::vector<Span> all(out);
  for (std::int64_t i = 0; i < out; ++i) all[i] = {i * in / out, ceil_div((i + 1) * in, out)};
  return all;
}

// The two kinds of tensors; each kind has numbers of its own.
enum class Tensors { floats, quantized };

// Calls functions with the tensors that a step reads, and with those that it writes; number -1 means none.
template <class Reads, class Writes>
void visit(const file::Step& step, Reads reads, Writes writes) {
  if (const file::Uses* uses = step.uses()) {
    reads(Tensors::floats, uses->residual()), writes(Tensors::floats, uses->values());
    if (uses->targets())
      for (const file::Target* target : items(uses->targets())) writes(Tensors::quantized, target->tensor());
  }
  needed(step.operation());
  switch (step.operation_type()) {
    case file::Operation::Convolve:
      reads(Tensors::floats, step.operation_as_Convolve()->source());
      reads(Tensors::quantized, step.operation_as_Convolve()->quantized());
      break;
    case file::Operation::Map:
      reads(Tensors::floats, step.operation_as_Map()->source());
      if (step.operation_as_Map()->operations())
        for (const file::MapOperation* o : items(step.operation_as_Map()->operations())) reads(Tensors::floats, o->tensor());
      break;
    case file::Operation::Average:
      reads(Tensors::floats, step.operation_as_Average()->source()), writes(Tensors::floats, step.operation_as_Average()->result());
      break;
    case file::Operation::Moments:
      reads(Tensors::floats, step.operation_as_Moments()->source());
      writes(Tensors::floats, step.operation_as_Moments()->mean()), writes(Tensors::floats, step.operation_as_Moments()->scale());
      break;
    case file::Operation::Flatten:
      reads(Tensors::floats, step.operation_as_Flatten()->source()), writes(Tensors::floats, step.operation_as_Flatten()->result());
      break;
    case file::Operation::Rearrange:
      reads(Tensors::floats, step.operation_as_Rearrange()->source());
      writes(Tensors::floats, step.operation_as_Rearrange()->result());
      break;
    case file::Operation::Pick: reads(Tensors::floats, step.operation_as_Pick()->source()); break;
    case file::Operation::Pool: reads(Tensors::floats, step.operation_as_Pool()->source()); break;
    case file::Operation::Interpolate: reads(Tensors::floats, step.operation_as_Interpolate()->source()); break;
    case file::Operation::AverageWindows: reads(Tensors::floats, step.operation_as_AverageWindows()->source()); break;
    default: throw FileError("a step is not known: install a newer dsconv runtime", true);
  }
}

}  // namespace

Geometry::Geometry(const file::Program& of, std::span<const Grid> inputs) : of_(of) {
  memory_.resize(items(of.memory()).size());
  quantized_.resize(of.quantized_tensors() ? items(of.quantized_tensors()).size() : 0);
  const std::size_t floats = of.float_tensors() ? items(of.float_tensors()).size() : 0;
  require(memory_.size() + quantized_.size() + floats <= kMaxTensors && items(of.steps()).size() <= kMaxSteps,
          "a program has too many steps or tensors");
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const int tensor = items(of.inputs()).Get(i)->tensor();
    if (tensor != -1) set(tensor, inputs[i]);
  }
  const auto made = [this](Tensors kind, int tensor) {
    if (tensor >= 0)
      require(kind == Tensors::floats ? is_made(tensor) : is_made_quantized(tensor), "a tensor is read before a step makes it");
  };
  for (const file::Step* step : items(of.steps())) {
    visit(*step, made, [](Tensors, int) {});
    derive(*step);
  }
  for (const file::Port* port : items(of.outputs())) made(Tensors::floats, port->tensor());
  lifetimes();
  place();
}

void Geometry::Channels::add(std::int64_t first, std::int64_t count) {
  std::int64_t end = first + count;
  auto next = ends_.lower_bound(first);
  if (next != ends_.begin() && std::prev(next)->second >= first) first = (--next)->first;
  while (next != ends_.end() && next->first <= end) end = std::max(end, next->second), next = ends_.erase(next);
  ends_[first] = end;
}

bool Geometry::Channels::has(std::int64_t first, std::int64_t count) const {
  const auto next = ends_.upper_bound(first);
  return next != ends_.begin() && std::prev(next)->second >= first + count;
}

// Returns the table of a tensor, whose numbers are such that it lies within its memory.
const file::FloatTensor& Geometry::table(int tensor) const {
  require(tensor >= 0 && of_.float_tensors() && tensor < static_cast<int>(of_.float_tensors()->size()), "no such tensor");
  const file::FloatTensor& t = *of_.float_tensors()->Get(tensor);
  require(t.memory() >= 0 && t.memory() < static_cast<int>(memory_.size()), "no such memory");
  const file::Memory& m = *of_.memory()->Get(t.memory());
  require(m.base() >= 0 && m.pixel() > 0 && m.pixel() < kMaxSide && t.channels() > 0 && t.first() >= 0 && t.first() < kMaxSide &&
              t.channels() <= m.pixel() - t.first(),
          "a tensor goes beyond its memory");
  return t;
}

const file::QuantizedTensor& Geometry::quantized_table(int tensor) const {
  require(tensor >= 0 && tensor < static_cast<int>(quantized_.size()), "no such quantized tensor");
  const file::QuantizedTensor& t = *of_.quantized_tensors()->Get(tensor);
  require(t.depth() > 0 && t.depth() < kMaxSide && t.groups() > 0 && t.groups() < kMaxSide, "a quantized tensor without channels");
  return t;
}

// Says that a step or the user makes a tensor.
void Geometry::set(int tensor, const Grid& grid) {
  const file::FloatTensor& t = table(tensor);
  Place& there = memory_[t.memory()];
  fits(static_cast<double>(grid.rows()) * static_cast<double>(grid.width) < static_cast<double>(kMaxValues),
       "an image is too large");
  fits(!there.grid.frames || there.grid == grid, "the sizes of tensors that are added or lie side by side do not agree");
  there.grid = grid;
  there.made.add(t.first(), t.channels());
}

// Says that a step makes some channels of a quantized tensor.
void Geometry::set_quantized(const file::Target& target, std::int64_t channels, const Grid& grid) {
  const file::QuantizedTensor& t = quantized_table(target.tensor());
  Place& there = quantized_[target.tensor()];
  fits(!there.grid.frames || there.grid == grid, "the sizes of tensors that lie side by side do not agree");
  require(target.first_channel() >= 0 && target.first_channel() <= t.depth() * t.groups() - channels,
          "a target without room for all channels");
  there.grid = grid;
  there.made.add(target.first_channel(), channels);
}

bool Geometry::is_made(int tensor) const {
  const file::FloatTensor& t = table(tensor);
  return memory_[t.memory()].made.has(t.first(), t.channels());
}

bool Geometry::is_made_quantized(int tensor) const {
  const file::QuantizedTensor& t = quantized_table(tensor);
  return quantized_[tensor].made.has(0, t.depth() * t.groups());
}

Grid Geometry::grid(int tensor) const {
  const Grid& found = memory_[table(tensor).memory()].grid;
  require(found.frames, "a tensor is read that nothing makes");
  return found;
}

// Determines the sizes of a step's results.
void Geometry::derive(const file::Step& step) {
  needed(step.operation());
  const auto listed = [&](std::int64_t rows, std::int64_t columns) {
    listed_ += rows + columns;
    fits(listed_ <= kMaxListed, "steps would make images that are too large");
    return Grid{1, rows, columns};
  };
  const auto made = [&](std::int64_t channels, const Grid& grid) {
    const file::Uses& uses = *needed(step.uses());
    if (uses.values() != -1) set(uses.values(), grid);
    if (uses.targets())
      for (const file::Target* target : items(uses.targets())) set_quantized(*target, channels, grid);
  };
  const auto made_of = [&](int source, const Grid& grid) { made(table(source).channels(), grid); };
  switch (step.operation_type()) {
    case file::Operation::Convolve: {
      const ConvSizes g = conv_sizes(*step.operation_as_Convolve());
      made(g.outputs, {g.out_depth, g.out_height, g.out_width});
      break;
    }
    case file::Operation::Map: {
      const int source = step.operation_as_Map()->source();
      made_of(source, grid(source));
      break;
    }
    case file::Operation::Average: set(step.operation_as_Average()->result(), {1, 1, 1}); break;
    case file::Operation::Moments:
      set(step.operation_as_Moments()->mean(), {1, 1, 1}), set(step.operation_as_Moments()->scale(), {1, 1, 1});
      break;
    case file::Operation::Flatten: set(step.operation_as_Flatten()->result(), {1, 1, 1}); break;
    case file::Operation::Rearrange: {
      const std::vector<Loop> all = loops(*step.operation_as_Rearrange());
      set(step.operation_as_Rearrange()->result(), {1, written(all, 1), written(all, 2)});
      break;
    }
    case file::Operation::Pick: {
      const file::Pick& p = *step.operation_as_Pick();
      const Grid in = grid(p.source());
      made_of(p.source(), listed(places_size(p.rows(), in.rows()), places_size(p.columns(), in.width)));
      break;
    }
    case file::Operation::Pool: {
      const file::Pool& p = *step.operation_as_Pool();
      made_of(p.source(), pooled(p));
      break;
    }
    case file::Operation::Interpolate: {
      const file::Interpolate& i = *step.operation_as_Interpolate();
      const Grid in = grid(i.source());
      made_of(i.source(), listed(stretched(i.rows(), in.rows()), stretched(i.columns(), in.width)));
      break;
    }
    case file::Operation::AverageWindows: {
      const file::AverageWindows& a = *step.operation_as_AverageWindows();
      made_of(a.source(), listed(windows(a.rows()), windows(a.columns())));
      break;
    }
    default: throw FileError("a step is not known: install a newer dsconv runtime", true);
  }
}

void Geometry::Buffer::use(int step) {
  first = first < 0 ? step : std::min(first, step);
  last = std::max(last, step);
}

void Geometry::lifetimes() {
  int number = 0;
  const auto use = [&](Tensors kind, int tensor) {
    if (tensor >= 0) (kind == Tensors::floats ? memory_[table(tensor).memory()] : quantized_[tensor]).place.use(number);
  };
  const file::Step* before = nullptr;
  for (const file::Step* step : *of_.steps()) {
    visit(*step, use, use);
    if (step->joined() && before) visit(*before, use, use);
    before = step;
    ++number;
  }
  for (const file::Port* port : *of_.outputs()) use(Tensors::floats, port->tensor());
}

// Places the largest buffers first, each at the lowest offset where it overlaps no buffer that is live at the same time, as
// in dsconv/compilation/memory.py.
void Geometry::place() {
  constexpr std::int64_t kAlignment = 64;
  std::vector<Buffer*> all;
  for (std::size_t i = 0; i < memory_.size(); ++i) {
    const file::Memory& of = *of_.memory()->Get(i);
    Buffer& b = memory_[i].place;
    if (of.base() || b.first < 0) continue;
    const Grid& g = memory_[i].grid;
    const double bytes = 4.0 * static_cast<double>(of.pixel()) * static_cast<double>(g.rows()) * static_cast<double>(g.width);
    fits(of.pixel() > 0 && bytes < static_cast<double>(kMaxValues), "a tensor is too large");
    b.size = ceil_div(static_cast<std::int64_t>(bytes), kAlignment) * kAlignment;
    all.push_back(&b);
  }
  for (std::size_t i = 0; i < quantized_.size(); ++i) {
    Buffer& b = quantized_[i].place;
    if (b.first < 0) continue;
    b.size = ceil_div(Program::quantized_bytes(format(static_cast<int>(i)), quantized_grid(static_cast<int>(i))), kAlignment) *
             kAlignment;
    all.push_back(&b);
  }
  std::stable_sort(all.begin(), all.end(), [](const Buffer* a, const Buffer* b) { return a->size > b->size; });
  std::vector<const Buffer*> placed;  // by offset
  for (Buffer* const b : all) {
    std::int64_t offset = 0;
    for (const Buffer* other : placed) {
      if (!other->meets(*b)) continue;
      if (offset + b->size <= other->offset) break;
      offset = std::max(offset, other->offset + other->size);
    }
    b->offset = offset;
    fits(offset < kMaxValues, "a tensor is too large");
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), b, [](const Buffer* x, const Buffer* y) { return x->offset < y->offset; }),
        b);
  }
}

FloatTensor Geometry::float_tensor(int tensor) const {
  const Grid g = grid(tensor);
  const file::FloatTensor& t = table(tensor);
  const file::Memory& m = *of_.memory()->Get(t.memory());
  fits(static_cast<double>(m.pixel()) * static_cast<double>(g.rows()) * static_cast<double>(g.width) <
           static_cast<double>(kMaxValues) / 4,
       "a tensor is too large");
  const std::int64_t pixels = g.rows() * g.width, image = m.pixel() * pixels;
  const std::int64_t offset = m.base() ? 0 : memory_[t.memory()].place.offset;
  if (m.lines()) return {m.base(), offset, t.first() * pixels, t.channels(), g.rows(), g.width, {image, pixels, g.width, 1}};
  return {m.base(), offset, t.first(), t.channels(), g.rows(), g.width, {image, 1, g.width * m.pixel(), m.pixel()}};
}

ActivationFormat Geometry::format(int tensor) const {
  const file::QuantizedTensor& t = *of_.quantized_tensors()->Get(tensor);
  const auto bits = [](int number) {
    require(number >= 2 && number <= 8, "bits are 2 to 8");
    return number;
  };
  return {{t.depth(), t.block_size()}, t.groups(), bits(t.bits()), one_of<Sign>("no such sign", t.sign(), kSigns),
          bits(t.weight_bits()) > 4,   t.shift()};
}

PaddedGrid Geometry::quantized_grid(int tensor) const {
  const file::QuantizedTensor& t = *of_.quantized_tensors()->Get(tensor);
  const Grid& g = quantized_[tensor].grid;
  require(g.frames, "a quantized tensor that nothing makes");
  return {g.frames, g.height, g.width, t.pad_h(), t.pad_w()};
}

std::vector<std::int64_t> Geometry::bases() const {
  std::vector<std::int64_t> values(1, 0);
  const std::size_t most = items(of_.inputs()).size() + items(of_.outputs()).size();
  for (std::size_t i = 0; i < memory_.size(); ++i) {
    const file::Memory& m = *of_.memory()->Get(i);
    require(m.base() >= 0 && static_cast<std::size_t>(m.base()) <= most, "an input or output is too many");
    if (!m.base()) continue;
    if (static_cast<std::size_t>(m.base()) >= values.size()) values.resize(m.base() + 1, 0);
    require(!values[m.base()], "two memories at one address");
    const Grid& g = memory_[i].grid;
    fits(m.pixel() > 0 && 1.0 * static_cast<double>(m.pixel()) * static_cast<double>(g.rows()) * static_cast<double>(g.width) <
                              static_cast<double>(kMaxValues) / 4,
         "a tensor is too large");
    values[m.base()] = m.pixel() * g.rows() * g.width;
  }
  return values;
}

ConvSizes Geometry::conv_sizes(const file::Convolve& of) const {
  const file::ConvSizes& s = *needed(of.sizes());
  const Grid& in = source_of(of);
  ConvSizes g{};
  g.images = 1, g.channels = s.channels(), g.outputs = s.outputs(), g.groups = s.groups(), g.block_size = s.block_size();
  g.flat = s.flat(), g.winograd = s.winograd(), g.transposed = s.transposed(), g.volume = s.volume();
  g.depth = g.volume ? in.frames : 1, g.height = g.volume ? in.height : in.rows(), g.width = in.width;
  g.kernel_d = s.kernel_d(), g.stride_d = s.stride_d(), g.pad_d = s.pad_d(), g.dilation_d = s.dilation_d();
  g.kernel_h = s.kernel_h(), g.stride_h = s.stride_h(), g.pad_h = s.pad_h(), g.dilation_h = s.dilation_h();
  g.kernel_w = s.kernel_w(), g.stride_w = s.stride_w(), g.pad_w = s.pad_w(), g.dilation_w = s.dilation_w();
  const auto out = [&](std::int64_t size, const Window& w, std::int64_t more) {
    return g.transposed ? transposed(size, w, more) : convolved(size, w);
  };
  g.out_depth = out(g.depth, {g.kernel_d, g.stride_d, g.pad_d, g.dilation_d}, s.more_d());
  g.out_height = out(g.height, {g.kernel_h, g.stride_h, g.pad_h, g.dilation_h}, s.more_h());
  g.out_width = out(g.width, {g.kernel_w, g.stride_w, g.pad_w, g.dilation_w}, s.more_w());
  fits(g.valid(), "the sizes of a convolution do not agree");
  // Layers copy lines with their padding to scratch memory.
  constexpr double kSmall = 1 << 24, kMostTimes = 64;
  const auto values = [&](std::int64_t d, std::int64_t h, std::int64_t w) {
    return static_cast<double>(g.channels) * static_cast<double>(d) * static_cast<double>(h) * static_cast<double>(w);
  };
  const double padded = values(g.depth + 2 * g.pad_d, g.height + 2 * g.pad_h, g.width + 2 * g.pad_w);
  const double most = kSmall + kMostTimes * values(g.depth, g.height, g.width);
  fits(g.transposed || padded <= most, "the padding of a convolution is too large for its input");
  // So are frames, once for each that reads them.
  fits(!g.volume || !g.flat || values(g.out_depth, g.height, g.width) * static_cast<double>(g.kernel_d) <= most,
       "the kernel of a convolution has too many frames");
  return g;
}

// Returns the pixels that a layer reads, quantized or not.
const Grid& Geometry::source_of(const file::Convolve& of) const {
  if (of.source() >= 0) {
    grid(of.source());  // checks it
    return memory_[table(of.source()).memory()].grid;
  }
  const int tensor = of.quantized();
  require(tensor >= 0 && tensor < static_cast<int>(quantized_.size()) && quantized_[tensor].grid.frames,
          "a quantized tensor is read that nothing makes");
  return quantized_[tensor].grid;
}

Grid Geometry::pooled(const file::Pool& of) const {
  const file::PoolWindow& w = *needed(of.window());
  const Grid in = grid(of.source());
  const Window rows{w.kernel_h(), w.stride_h(), w.pad_h(), w.dilation_h()},
      columns{w.kernel_w(), w.stride_w(), w.pad_w(), w.dilation_w()};
  return {1, pooled_size(in.rows(), rows, of.ceil()), pooled_size(in.width, columns, of.ceil())};
}

std::vector<Loop> Geometry::loops(const file::Rearrange& of) const { return loops_of(of, grid(of.source())); }
std::vector<std::int64_t> Geometry::rows(const file::Pick& of) const { return places(of.rows(), grid(of.source()).rows()); }
std::vector<std::int64_t> Geometry::columns(const file::Pick& of) const { return places(of.columns(), grid(of.source()).width); }
std::vector<Between> Geometry::rows(const file::Interpolate& of) const { return betweens(of.rows(), grid(of.source()).rows()); }
std::vector<Between> Geometry::columns(const file::Interpolate& of) const {
  return betweens(of.columns(), grid(of.source()).width);
}
const file::Order& Geometry::order(const file::Interpolate& of) const {
  constexpr std::int64_t kMostOfSmall = 128;
  const Grid in = grid(of.source());
  const bool small = stretched(of.rows(), in.rows()) + stretched(of.columns(), in.width) <= kMostOfSmall;
  const file::Order& found = *needed(small ? of.small() : of.large());
  fits(found.split() >= 0, "an interpolation of images of this size is not known");
  return found;
}
std::vector<Span> Geometry::rows(const file::AverageWindows& of) const { return spans(of.rows(), grid(of.source()).rows()); }
std::vector<Span> Geometry::columns(const file::AverageWindows& of) const { return spans(of.columns(), grid(of.source()).width); }

bool Geometry::joined(const file::Step& before) const {
  const int between = before.uses() ? before.uses()->values() : -1;
  if (between < 0) return false;
  const FloatTensor t = float_tensor(between);
  if (4 * t.channels * t.pixels() < of_.joined_bytes()) return false;
  const Buffer& place = memory_[table(between).memory()].place;
  require(place.first + 1 == place.last, "other steps use what lies between two that are joined");
  return true;
}

}  // namespace dsconv
