// Rounds weights by rule `balanced`, one row per lane. Lanes are independent, and every operation rounds as written, so
// that results do not depend on the number of lanes. Functions of the standard library are not used here: an inline
// function compiled for one instruction set could be linked into code for another.
#pragma once

#include "../rounding/balanced.h"
#include "../simd/lanes.h"

namespace dsconv {

template <class V>
struct BalancedVectors {
  static constexpr int kLanes = V::kDoubles;
  using Float = typename simd::VectorOf<float, 4 * V::kDoubles>::type;
  using Double = typename simd::VectorOf<double, 8 * V::kDoubles>::type;
  using Mask = typename simd::VectorOf<std::int32_t, 4 * V::kDoubles>::type;
  using WideMask = typename simd::VectorOf<std::int64_t, 8 * V::kDoubles>::type;

  static Float widen(float v) { return Float{} + v; }
  static Double widen(double v) { return Double{} + v; }
  static Float to_float(const Double& v) { return __builtin_convertvector(v, Float); }
  static Double to_double(const Float& v) { return __builtin_convertvector(v, Double); }

  // Integers (taps, n) of one row per lane, and scale and shift (taps) of its blocks.
  struct Rounded {
    Double *q, *scale, *shift;
  };

  // Allocates from a buffer; without a buffer, it counts the bytes.
  struct Memory {
    std::byte* start;
    std::int64_t taken = 0;

    template <class T, class... More>
    void take(std::int64_t count, T*& values, More*&... more) {
      values = start ? reinterpret_cast<T*>(start + taken) : nullptr;
      taken += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
      if constexpr (sizeof...(More) > 0) take(count, more...);
    }
  };

  // Returns the integer nearest to v, ties to even, within [-half, half - 1]. Adding the constant removes the fraction.
  static Float level(Float v, float half) {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23
    v = v < -half ? widen(-half) : v;
    v = v > half - 1 ? widen(half - 1) : v;
    return (v + kWhole) - kWhole;
  }
  static Double level(Double v, double half) {
    constexpr double kWhole = 6755399441055744.0;  // 1.5 * 2^52
    v = v < -half ? widen(-half) : v;
    v = v > half - 1 ? widen(half - 1) : v;
    return (v + kWhole) - kWhole;
  }
};

template <class T>
struct Line {
  T scale, shift;
};

// The computation of dsconv/numerics/scales.py, for n values per lane, with the same names.
template <class V>
class Refined : BalancedVectors<V> {
  using Vectors = BalancedVectors<V>;
  using typename Vectors::Double, typename Vectors::Float, typename Vectors::Mask;
  using Vectors::widen, Vectors::level;

 public:
  explicit Refined(const BalancedRule& rule) : half_(static_cast<float>(1 << (rule.bits - 1))), shift_(rule.shift) {}

  // Writes the integers to q, as floats; ratio has room for n values.
  Line<Double> round(const Float* w, std::int64_t n, Float* ratio, Float* q) const {
    Float low = w[0], high = w[0], largest{}, side{};
    for (std::int64_t i = 0; i < n; ++i) {
      const Float size = w[i] < 0 ? -w[i] : w[i];
      low = w[i] < low ? w[i] : low, high = w[i] > high ? w[i] : high;
      side = size > largest ? w[i] : side, largest = size > largest ? size : largest;
    }
    const Float unit = largest == 0 ? widen(1.0f) : largest;
    for (std::int64_t i = 0; i < n; ++i) ratio[i] = w[i] / unit;
    best_start(ratio, n, low / unit, high / unit, side, q);
    const Line<Float> line = fit<Float>(ratio, q, n);
    for (std::int64_t i = 0; i < n; ++i) q[i] = rounded(ratio[i], line);
    return fit<Double>(w, q, n);
  }

 private:
  static constexpr int kStarts = 3;
  static constexpr float kGrid[kStarts] = {1.0f, 0.9f, 0.8f};

  Float rounded(Float w, const Line<Float>& line) const {
    return line.scale == 0 ? Float{} : level((w - line.shift) / line.scale, half_);
  }

  template <class Sum>
  Line<Sum> fit(const Float* w, const Float* q, std::int64_t n) const {
    const auto of = [](const Float& v) { return __builtin_convertvector(v, Sum); };
    Sum wq{}, qq{}, w_sum{}, q_sum{};
    for (std::int64_t i = 0; i < n; ++i) {
      const Sum value = of(w[i]), integer = of(q[i]);
      wq += value * integer, qq += integer * integer;
      if (shift_) w_sum += value, q_sum += integer;
    }
    if (!shift_) return {wq / (qq == 0 ? Sum{} + 1 : qq), Sum{}};
    const Sum count = __builtin_convertvector(Float{} + static_cast<float>(n), Sum);
    const Sum w_mean = w_sum / count, q_mean = q_sum / count;
    qq -= count * q_mean * q_mean;
    const Sum scale = qq > 0 ? (wq - count * w_mean * q_mean) / (qq > 0 ? qq : Sum{} + 1) : Sum{};
    return {scale, w_mean - scale * q_mean};
  }

  void best_start(const Float* w, std::int64_t n, Float low, Float high, Float side, Float* q) const {
    Line<Float> starts[2 * kStarts];
    int count = 0;
    if (shift_) {
      const Float middle = (low + high) / 2, step = (high - low) / (2 * half_ - 1);
      for (const float g : kGrid) starts[count++] = {step * g, middle + step * (g / 2)};
    } else {
      const Float extreme = side < 0 ? widen(-1.0f) : side > 0 ? widen(1.0f) : Float{};
      for (const float g : kGrid) starts[count++] = {extreme * (-g / half_), Float{}};
      for (const float g : kGrid) starts[count++] = {extreme * (g / (half_ - 1)), Float{}};
    }
    Line<Float> best = starts[0];
    Float least = widen(__builtin_inff());
    for (int s = 0; s < count; ++s) {
      for (std::int64_t i = 0; i < n; ++i) q[i] = rounded(w[i], starts[s]);
      const Line<Float> line = fit<Float>(w, q, n);
      Float error{};
      for (std::int64_t i = 0; i < n; ++i) {
        const Float missed = q[i] * line.scale + line.shift - w[i];
        error += missed * missed;
      }
      const Mask better = error < least;
      best.scale = better ? starts[s].scale : best.scale, best.shift = better ? starts[s].shift : best.shift;
      least = better ? error : least;
    }
    for (std::int64_t i = 0; i < n; ++i) q[i] = rounded(w[i], best);
  }

  float half_;
  bool shift_;
};

// Rounds kLanes rows of one kind, with the steps and the names of dsconv/numerics/balanced.py.
template <class V>
class Solver : BalancedVectors<V> {
  using Vectors = BalancedVectors<V>;
  using typename Vectors::Double, typename Vectors::Float, typename Vectors::WideMask, typename Vectors::Memory,
      typename Vectors::Rounded;
  using Vectors::widen, Vectors::to_float, Vectors::to_double, Vectors::level, Vectors::kLanes;

 public:
  Solver(Memory& memory, std::int64_t taps, std::int64_t n, const BalancedRule& rule)
      : taps_(taps), n_(n), unknowns_(taps * (rule.shift ? 2 : 1)), rule_(rule), half_(1 << (rule.bits - 1)), refined_(rule) {
    memory.take(n, true_.own, true_.shared, true_.mean), memory.take(n, held_.own, held_.shared, held_.mean);
    memory.take(n, made_up_, free_weight_, weight_, change_, pull_, push_);
    memory.take(n, sums_, moved_, weighted_), memory.take(n, w_, free_, ratio_, integers_);
    memory.take(taps * n, target_, found_.q, plain_.q);
    memory.take(taps, found_.scale, found_.shift, plain_.scale, plain_.shift);
    memory.take(unknowns_ * unknowns_, normal_), memory.take(unknowns_, right_, inner_, own_part_);
  }

  // Sets the model of the next rows.
  void expect(const InputModel& model, const InputModel& regularized, std::int64_t kinds, std::int64_t kind) {
    take(true_, model, kinds, kind), take(held_, regularized, kinds, kind);
  }

  void solve(const WeightRows& rows, std::int64_t first, int count, const BalancedResults& to) {
    Float unit{};
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      for (std::int64_t c = 0; c < n_; ++c) {
        const Float w = loaded(rows, tap, c, first, count), size = w < 0 ? -w : w;
        unit = size > unit ? size : unit;
        target_[tap * n_ + c] = to_double(w);
      }
    }
    // Near the largest float, squares would overflow.
    unit = unit == 0 ? widen(1.0f) : unit;
    const Double whole = to_double(unit), inverse = 1 / whole;
    for (std::int64_t i = 0; i < taps_ * n_; ++i) target_[i] *= inverse;

    nearest_plane();
    refit();
    descend();
    refit();
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      for (std::int64_t c = 0; c < n_; ++c) w_[c] = loaded(rows, tap, c, first, count);
      const Line<Double> line = refined_.round(w_, n_, ratio_, integers_);
      for (std::int64_t c = 0; c < n_; ++c) plain_.q[tap * n_ + c] = to_double(integers_[c]);
      plain_.scale[tap] = to_double(to_float(line.scale)) / whole, plain_.shift[tap] = to_double(to_float(line.shift)) / whole;
    }
    WideMask better = value(found_) <= value(plain_);
    for (std::int64_t tap = 0; tap < taps_; ++tap) {  // the scale of a huge weight can overflow a float
      const Double a = to_double(to_float(found_.scale[tap] * whole)), b = to_double(to_float(found_.shift[tap] * whole));
      better &= a - a + (b - b) == 0;
    }
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      const Float a = to_float((better ? found_.scale[tap] : plain_.scale[tap]) * whole);
      const Float b = to_float((better ? found_.shift[tap] : plain_.shift[tap]) * whole);
      for (int lane = 0; lane < count; ++lane) {
        to.scale[tap * rows.rows + first + lane] = a[lane], to.shift[tap * rows.rows + first + lane] = b[lane];
      }
      for (std::int64_t c = 0; c < n_; ++c) {
        const Double integer = better ? found_.q[tap * n_ + c] : plain_.q[tap * n_ + c];
        std::int8_t* const q = to.q + (tap * n_ + c) * rows.rows + first;
        for (int lane = 0; lane < count; ++lane) q[lane] = static_cast<std::int8_t>(integer[lane]);
      }
    }
  }

 private:
  struct Channels {
    double *own, *shared, *mean;
  };

  void take(const Channels& to, const InputModel& from, std::int64_t kinds, std::int64_t kind) {
    for (std::int64_t c = 0; c < n_; ++c) {
      const std::int64_t at = c * kinds + kind;
      to.own[c] = from.own[at], to.shared[c] = from.shared[at], to.mean[c] = from.mean[at];
    }
  }
  static void clear(Double* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = Double{};
  }

  static Float loaded(const WeightRows& rows, std::int64_t tap, std::int64_t c, std::int64_t first, int count) {
    Float w{};
    const float* const from = rows.w + (tap * rows.n + c) * rows.rows + first;
    if (count == kLanes) __builtin_memcpy(&w, from, sizeof w);
    else
      for (int lane = 0; lane < count; ++lane) w[lane] = from[lane];
    return w;
  }

  void nearest_plane() {
    clear(sums_, n_);
    for (std::int64_t tap = taps_ - 1; tap >= 0; --tap) {
      const Double common = prepare(tap);
      const Double* const target = target_ + tap * n_;
      for (std::int64_t c = 0; c < n_; ++c) {
        moved_[c] = target[c] + made_up_[c] * sums_[c];
        free_[c] = to_float(moved_[c] + free_weight_[c] * common);
      }
      const Line<Double> line = refined_.round(free_, n_, ratio_, integers_);
      const Double step = found_.scale[tap] = to_double(to_float(line.scale));
      const Double offset = found_.shift[tap] = to_double(to_float(line.shift));
      round_columns(target, found_.q + tap * n_, step, offset, common);
    }
  }

  // Sets the weights of channels at this tap, and returns the pull of the later taps.
  Double prepare(std::int64_t tap) {
    const auto& [own, shared, mean] = held_;
    const auto behind = static_cast<double>(tap);
    double more_power = 0.0, less_power = 0.0;
    for (std::int64_t c = 0; c < n_; ++c) less_power += mean[c] * mean[c] * (behind / (own[c] + behind * shared[c]));
    double less_so_far = 0.0;
    Double common{};
    for (std::int64_t c = 0; c < n_; ++c) {
      const double more = (behind + 1) / (own[c] + (behind + 1) * shared[c]), less = behind / (own[c] + behind * shared[c]);
      const double square = mean[c] * mean[c];
      more_power += square * more, less_so_far += square * less;
      const double gain = more / (behind + 1);
      pull_[c] = mean[c] * (1 - more * shared[c]), push_[c] = mean[c] * (1 - less * shared[c]);
      change_[c] = push_[c] - pull_[c];
      made_up_[c] = gain * shared[c], free_weight_[c] = gain * mean[c];
      weight_[c] = free_weight_[c] / (1 + more_power + less_power - less_so_far);
      common += pull_[c] * sums_[c];
    }
    for (std::int64_t c = 0; c < n_; ++c) free_weight_[c] /= 1 + more_power + less_power - less_so_far;
    return common;
  }

  void round_columns(const Double* target, Double* q, Double step, Double offset, Double common) {
    const Double inverse = step == 0 ? Double{} : 1 / step;
    for (std::int64_t c = n_ - 1; c >= 0; --c) {
      q[c] = level((moved_[c] - offset) * inverse + weight_[c] * inverse * common, half_);
      const Double missed = target[c] - offset - step * q[c];
      common = common + push_[c] * missed + change_[c] * sums_[c];
      sums_[c] += missed;
    }
  }

  // Sets sums_ to the errors of each channel, summed over its taps.
  void sum_missed(const Rounded& of) {
    clear(sums_, n_);
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      for (std::int64_t c = 0; c < n_; ++c) sums_[c] += missed(of, tap, c);
    }
  }
  Double missed(const Rounded& of, std::int64_t tap, std::int64_t c) const {
    return target_[tap * n_ + c] - of.shift[tap] - of.q[tap * n_ + c] * of.scale[tap];
  }

  void descend() {
    const auto& [own, shared, mean] = held_;
    sum_missed(found_);
    Double common{};
    for (std::int64_t c = 0; c < n_; ++c) common += mean[c] * sums_[c];
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      Double* const q = found_.q + tap * n_;
      const Double step = found_.scale[tap], inverse = step == 0 ? Double{} : 1 / step;
      for (std::int64_t c = 0; c < n_; ++c) {
        const double diagonal = 1 / (own[c] + shared[c] + mean[c] * mean[c]);
        const Double pulled = (own[c] * missed(found_, tap, c) + shared[c] * sums_[c]) * diagonal;
        const Double before = q[c];
        q[c] = level(before + pulled * inverse + mean[c] * diagonal * inverse * common, half_);
        const Double change = before - q[c];
        common += mean[c] * step * change;
        sums_[c] += change * step;
      }
    }
  }

  // The factors of a tap are its integers and, with a shift, 1: unknown i is a scale, unknown taps + i a shift.
  void refit() {
    const auto& [own, shared, mean] = held_;
    const std::int64_t t = taps_;
    clear(normal_, unknowns_ * unknowns_);
    clear(right_, unknowns_);
    clear(inner_, unknowns_);
    Double common{};
    for (std::int64_t c = 0; c < n_; ++c) {
      moved_[c] = Double{};
      for (std::int64_t tap = 0; tap < t; ++tap) moved_[c] += target_[tap * n_ + c];
      common += mean[c] * moved_[c];
    }
    double own_sum = 0.0, shared_sum = 0.0, mean_sum = 0.0;
    for (std::int64_t c = 0; c < n_; ++c) {
      moved_[c] = shared[c] * moved_[c] + mean[c] * common;
      own_sum += own[c], shared_sum += shared[c], mean_sum += mean[c];
    }
    for (std::int64_t tap = 0; tap < t; ++tap) {
      const Double* const q = found_.q + tap * n_;
      Double square{}, own_level{}, shared_level{}, wanted_sum{};
      for (std::int64_t c = 0; c < n_; ++c) {
        const Double wanted = moved_[c] + own[c] * target_[tap * n_ + c], own_q = own[c] * q[c];
        weighted_[c] = shared[c] * q[c];
        right_[tap] += q[c] * wanted, inner_[tap] += mean[c] * q[c];
        square += own_q * q[c], own_level += own_q, shared_level += weighted_[c], wanted_sum += wanted;
      }
      if (t > 1) {
        for (std::int64_t other = tap; other < t; ++other) {
          Double both{};
          for (std::int64_t c = 0; c < n_; ++c) both += weighted_[c] * found_.q[other * n_ + c];
          normal_[other * unknowns_ + tap] = both;
        }
      }
      normal_[tap * unknowns_ + tap] += square;
      if (!rule_.shift) continue;
      right_[t + tap] = wanted_sum, inner_[t + tap] = widen(mean_sum);
      for (std::int64_t other = 0; other < t; ++other) {
        if (t > 1) normal_[(t + other) * unknowns_ + tap] = shared_level;
        if (t > 1 && other <= tap) normal_[(t + tap) * unknowns_ + t + other] = widen(shared_sum);
      }
      normal_[(t + tap) * unknowns_ + tap] += own_level;
      normal_[(t + tap) * unknowns_ + t + tap] += own_sum;
    }
    for (std::int64_t i = 0; i < unknowns_; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) normal_[i * unknowns_ + j] += inner_[i] * inner_[j];
    }
    solve_held();
  }

  // Solves the normal equations, given by their lower half, by an LDL' factorization. A small regularization holds the
  // solutions near their previous values.
  void solve_held() {
    const auto before = [&](std::int64_t i) -> Double& { return i < taps_ ? found_.scale[i] : found_.shift[i - taps_]; };
    for (std::int64_t i = 0; i < unknowns_; ++i) {
      Double& own = normal_[i * unknowns_ + i];
      const Double held = own > 0 ? rule_.held * own : widen(1.0);
      own += held, right_[i] += held * before(i);
    }
    for (std::int64_t i = 0; i < unknowns_; ++i) {
      Double* const row = normal_ + i * unknowns_;
      for (std::int64_t j = 0; j < i; ++j) {
        const Double* const upper = normal_ + j * unknowns_;
        // own_part_ holds values that are divided by the diagonal later.
        Double sum = row[j];
        for (std::int64_t k = 0; k < j; ++k) sum -= own_part_[k] * upper[k];
        own_part_[j] = sum;
      }
      for (std::int64_t j = 0; j < i; ++j) {
        row[j] = own_part_[j] / normal_[j * unknowns_ + j];
        row[i] -= own_part_[j] * row[j];
        right_[i] -= row[j] * right_[j];
      }
    }
    for (std::int64_t i = unknowns_ - 1; i >= 0; --i) {
      right_[i] /= normal_[i * unknowns_ + i];
      for (std::int64_t k = i + 1; k < unknowns_; ++k) right_[i] -= normal_[k * unknowns_ + i] * right_[k];
      before(i) = right_[i];
    }
  }

  // Returns the expected squared error of an output.
  Double value(const Rounded& of) {
    const auto& [own, shared, mean] = true_;
    Double inner{}, common{};
    clear(sums_, n_);
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      for (std::int64_t c = 0; c < n_; ++c) {
        const Double e = missed(of, tap, c);
        inner += own[c] * e * e, sums_[c] += e;
      }
    }
    for (std::int64_t c = 0; c < n_; ++c) inner += shared[c] * sums_[c] * sums_[c], common += mean[c] * sums_[c];
    return inner + common * common;
  }

  std::int64_t taps_, n_, unknowns_;
  BalancedRule rule_;
  double half_;
  Refined<V> refined_;
  Channels true_, held_;
  // Factors of each channel at a tap of the nearest plane.
  double *made_up_, *free_weight_, *weight_, *change_, *pull_, *push_;
  Double *target_, *sums_, *moved_, *weighted_;
  Rounded found_, plain_;
  Double *normal_, *right_, *inner_, *own_part_;
  Float *w_, *free_, *ratio_, *integers_;
};

template <class V>
std::int64_t balanced_bytes(const WeightRows& rows, const BalancedRule& rule) {
  typename BalancedVectors<V>::Memory counted{nullptr};
  Solver<V>(counted, rows.taps, rows.n, rule);
  return counted.taken;
}

template <class V>
void round_balanced_rows(const BalancedArgs& a) {
  typename BalancedVectors<V>::Memory memory{a.memory};
  Solver<V> solver(memory, a.rows.taps, a.rows.n, a.rule);
  solver.expect(a.model, a.regularized, a.rows.kinds, a.kind);
  solver.solve(a.rows, a.first, a.count, a.results);
}

}  // namespace dsconv
