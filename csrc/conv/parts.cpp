#include "parts.h"

#include "../parallel.h"
#include "../scratch.h"

namespace dsconv {
namespace {

// The taps of a phase, and the number of taps before them in packed weights.
struct PhaseTaps {
  std::vector<std::int64_t> taps;
  std::int64_t before = 0;

  PhaseTaps(const Axis& axis, std::int64_t phase) {
    for (std::int64_t tap = 0; tap < axis.kernel; ++tap) {
      if (axis.key(tap) == axis.key_of(phase)) taps.push_back(tap);
      before += axis.key(tap) < axis.key_of(phase);
    }
  }
  std::int64_t count() const { return std::ssize(taps); }
};

}  // namespace

Part Parts::at(std::int64_t index) const {
  const std::int64_t x = index % w_.phases(), y = index / w_.phases() % h_.phases(), frame = index / w_.phases() / h_.phases();
  const PhaseTaps depth(d_, frame), down(h_, y), across(w_, x);
  Part p{.g = g_, .o = o_, .first_tap = 0, .tap_row = {}, .row = 0, .image_rows = 0, .line_rows = 0, .pixel_rows = 0};
  p.g.out_depth = 1, p.g.out_height = h_.outputs(y), p.g.out_width = w_.outputs(x);

  p.first_tap = depth.before * h_.kernel * w_.kernel + depth.count() * (down.before * w_.kernel + down.count() * across.before);
  for (const std::int64_t kd : depth.taps) {
    const std::int64_t read = d_.place(frame, kd) + (d_.transposed ? 0 : frame * d_.stride);
    if (read < 0 || read >= d_.size) {  // zeros, which contribute nothing; they occur only before and after the frames
      if (p.tap_row.empty()) p.first_tap += down.count() * across.count();
      continue;
    }
    for (const std::int64_t ky : down.taps)
      for (const std::int64_t kx : across.taps)
        p.tap_row.push_back(read * grid_.image() + h_.place(y, ky) * grid_.line() + w_.place(x, kx));
  }
  p.row = grid_.pad_h * grid_.line() + grid_.pad_w;
  p.image_rows = d_.size * grid_.image(), p.line_rows = h_.input_step() * grid_.line(), p.pixel_rows = w_.input_step();

  const auto of_part = [&](Strides& s) {
    const std::int64_t first = (frame * h_.out + y) * s.y + x * s.x;
    s.y *= h_.output_step(), s.x *= w_.output_step();
    return first;
  };
  const std::int64_t first = of_part(p.o.strides), first_residual = of_part(p.o.residual.strides);
  if (p.o.values) p.o.values += first;
  if (p.o.residual.values) p.o.residual.values += first_residual;
  p.o.lattice = {d_.out, frame, y, x, h_.output_step(), w_.output_step()};
  return p;
}

// The frames that a frame of outputs reads are handled as channels of its image.
void convolve_flat_frames(const ConvSizes& g, const Layer& l, const Kernels& kernels, const Input& input, const Output& o) {
  ConvSizes plane = g;
  plane.images = g.out_depth, plane.channels = g.channels * g.kernel_d;
  plane.depth = plane.out_depth = plane.kernel_d = plane.stride_d = plane.dilation_d = 1, plane.pad_d = 0;
  const std::int64_t pixels = g.height * g.width;
  struct User;
  Scratch<User> scratch(plane.images * plane.channels * pixels * 4);
  float* const gathered = scratch.template take<float>(0);
  const Strides& s = input.strides;
  for (std::int64_t image = 0; image < g.images; ++image) {
    parallel(plane.images * plane.channels, [&](std::int64_t task) {
      const std::int64_t kd = task % g.kernel_d, channel = task / g.kernel_d % g.channels, frame = task / plane.channels;
      const std::int64_t read = frame * g.stride_d - g.pad_d + kd * g.dilation_d;
      float* to = gathered + task * pixels;
      if (read < 0 || read >= g.depth) return void(std::fill_n(to, pixels, 0.0f));
      const float* from = input.values + image * s.image + channel * s.channel + read * g.height * s.y;
      for (std::int64_t y = 0; y < g.height; ++y, from += s.y)
        for (std::int64_t x = 0; x < g.width; ++x) *to++ = from[x * s.x];
    });
    Output to = o;
    const auto of_image = [&](Strides& strides) {
      const std::int64_t first = image * strides.image;
      strides.image = g.out_height * strides.y;
      return first;
    };
    const std::int64_t first = of_image(to.strides), first_residual = of_image(to.residual.strides);
    if (to.values) to.values += first;
    if (to.residual.values) to.residual.values += first_residual;
    to.lattice.frame = image * g.out_depth;
    convolve_flat(plane, l, kernels, {gathered, {plane.channels * pixels, pixels, g.width, 1}}, to);
  }
}

}  // namespace dsconv
