// What range_coder.h's streams are modelled with: Gaussian tails, what probabilities are really worth, means
// from the codes to the left, variances of columns and rows, and earlier rows to lean on. Integers only.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "kernels/isa.h"

namespace pgolf::range_model {

constexpr int kPriorRows = 24;       // weight of the matrix's variance in a column's
constexpr int kBias = 16;            // the predictor's constant input
constexpr int64_t kStep = 40265318;  // 0.15 * 2^28
constexpr uint64_t kPriorCols = 64;  // weight of 1 in a row's variance ratio
constexpr int64_t kPriorCodes = 64;  // weight of the mean factor of earlier rows in a row's
constexpr uint64_t kVarianceLeast = 16;
constexpr uint64_t kVarianceMost = (1u << 25) - 1;
constexpr int kTails = 256;  // z in [0, 8) in steps of 1 / 32

// T[i] ~ integral of exp(-z^2 / 2) above i / 32: trapezoids over a Gaussian made by two recurrences, plus
// what keeps the table positive and strictly falling.
constexpr std::array<uint64_t, kTails + 1> tail_table() {
  std::array<uint64_t, kTails + 2> density{};
  uint64_t value = 1u << 31, ratio = 2146435328;  // 2^31 exp(-h^2 / 2), h = 1 / 32
  for (uint64_t& d : density) {
    d = value;
    value = value * ratio >> 31;
    ratio = ratio * 2145387520 >> 31;  // 2^31 exp(-h^2)
  }
  std::array<uint64_t, kTails + 1> tails{};
  uint64_t sum = 0;
  for (int i = kTails; i >= 0; --i) {
    const auto at = static_cast<size_t>(i);
    sum += (density[at] + density[at + 1]) / 2 + 1;
    tails[at] = sum;
  }
  return tails;
}

constexpr uint64_t square_root(uint64_t value) {
  uint64_t root = 0;
  for (uint64_t bit = uint64_t{1} << 31; bit != 0; bit >>= 1) {
    if ((root | bit) * (root | bit) <= value) root |= bit;
  }
  return root;
}

// 2^21 / standard deviation for variances (in 1/256) of 32 mantissas per octave, at the middle of each.
constexpr std::array<uint32_t, 25 * 32> inverse_table() {
  std::array<uint32_t, 25 * 32> table{};
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = static_cast<uint32_t>(square_root((uint64_t{1} << 56) / ((65 + 2 * (i & 31)) << (i >> 5))));
  }
  return table;
}

constexpr uint32_t kCounts = 1001;

constexpr std::array<int64_t, kCounts> rate_table() {  // 2^16 / (count + 3/2)
  std::array<int64_t, kCounts> table{};
  for (size_t count = 0; count < kCounts; ++count) {
    table[count] = 131072 / (2 * static_cast<int64_t>(count) + 3);
  }
  return table;
}

constexpr auto kTail = tail_table();
constexpr auto kRates = rate_table();
constexpr auto kInverse = inverse_table();

inline uint64_t tail(uint64_t z) {  // z in 1/32, with 16 bits of fraction
  const uint64_t i = z >> 16;
  if (i >= kTails) return kTail[kTails];
  return kTail[i] - ((kTail[i] - kTail[i + 1]) * (z & 65535) >> 16);
}

inline size_t inverse_index(uint64_t variance) {
  const int octave = std::bit_width(variance) - 1;  // 4 to 24
  return static_cast<size_t>(octave) * 32 + ((variance << 5 >> octave) & 31);
}

inline uint32_t probability(uint64_t p) { return static_cast<uint32_t>(std::clamp<uint64_t>(p, 1, 65535)); }

// What a Gaussian says of a code's bits: p(center), p(above it), then p(one more step) from the center out.
class Gaussian {
 public:
  static constexpr bool kSignsDiffer = true;

  Gaussian(int mean, uint64_t inverse) : center_((mean + 128) >> 8), inverse_(inverse) {
    const int offset = mean - center_ * 256;  // in [-128, 127]
    z_above_ = static_cast<uint64_t>(128 - offset) * inverse >> 8;
    z_below_ = static_cast<uint64_t>(128 + offset) * inverse >> 8;
    above_ = tail(z_above_);
    below_ = tail(z_below_);
  }

  int center() const { return center_; }

  uint32_t at_center() const {
    const uint64_t outside = ((above_ + below_) << 15) / kTail[0];
    return probability(outside < 65536 ? 65536 - outside : 1);
  }

  uint32_t up() const { return probability((above_ << 16) / (above_ + below_)); }

  void go(bool up) {
    z_ = up ? z_above_ : z_below_;
    rest_ = up ? above_ : below_;
  }

  uint32_t step(int) {  // sizes in order, after go()
    z_ += inverse_;
    const uint64_t beyond = tail(z_);
    const uint32_t p = probability(65536 - (beyond << 16) / rest_);
    rest_ = beyond;
    return p;
  }

 private:
  int center_;
  uint64_t inverse_, z_above_, z_below_, above_, below_;
  uint64_t z_ = 0, rest_ = 0;
};

// The same where the mean is 0: nothing but the variance counts, so everything is computed once and kept.
class Centered {
 public:
  static constexpr bool kSignsDiffer = false;

  Centered() : known_(kInverse.size() * kSizes) {}

  void set_variance(uint64_t variance) { index_ = inverse_index(variance); }

  static int center() { return 0; }

  uint32_t at_center() {
    return known(0, [](uint64_t inverse) { return Gaussian(0, inverse).at_center(); });
  }

  static void go(bool) {}

  uint32_t step(int size) {
    const auto compute = [size](uint64_t inverse) {
      const uint64_t edge = (128 * inverse >> 8) + static_cast<uint64_t>(size) * inverse;
      return probability(65536 - (tail(edge) << 16) / tail(edge - inverse));
    };
    return size < kSizes ? known(size, compute) : compute(kInverse[index_]);
  }

 private:
  static constexpr int kSizes = 40;

  template <typename Compute>
  uint32_t known(int size, const Compute& compute) {
    uint16_t& p = known_[index_ * kSizes + static_cast<size_t>(size)];
    if (p == 0) [[unlikely]]
      p = static_cast<uint16_t>(compute(kInverse[index_]));
    return p;
  }

  size_t index_ = 0;
  std::vector<uint16_t> known_;  // (variances, sizes), 0 where not known yet
};

// Learns what a predicted probability is really worth: for each kind of bit, 33 points on the line of
// predictions, each a running mean of 22 bits with its count; the two next to a prediction answer and learn.
class Correction {
 public:
  Correction() {
    for (size_t i = 0; i < points_.size(); ++i) {
      points_[i] = std::clamp<uint32_t>(static_cast<uint32_t>(i % 33) << 11, 1, 65535) << 16 | 30;
    }
  }

  template <typename Coder>
  [[gnu::always_inline]] inline bool code(Coder& coder, uint32_t p, int kind, int bit) {
    uint32_t* point = &points_[static_cast<size_t>(kind) * 33 + (p >> 11)];
    const uint32_t a = point[0], b = point[1];
    const int first = static_cast<int>(a >> 16), second = static_cast<int>(b >> 16);
    const int learned = first + ((second - first) * static_cast<int>(p & 2047) >> 11);
    const int mixed = (static_cast<int>(p) + learned) >> 1;
    // Two branches, so that what follows in each is known to the processor before the bit is.
    if (coder.bit(static_cast<uint32_t>(std::clamp(mixed, 16, 65520)), bit)) {
      learn(point, a, b, 4194303);
      return true;
    }
    learn(point, a, b, 0);
    return false;
  }

 private:
  [[gnu::always_inline]] static inline void learn(uint32_t* point, uint32_t a, uint32_t b, int target) {
    constexpr uint32_t kLast = kCounts - 1;
    if ((((a ^ kLast) | (b ^ kLast)) & 1023) ==
        0) {  // full counts, which is what nearly all become: 32 bits do
      constexpr int kRate = kRates[kLast];
      point[0] = a + (static_cast<uint32_t>((target - static_cast<int>(a >> 10)) * kRate >> 16) << 10);
      point[1] = b + (static_cast<uint32_t>((target - static_cast<int>(b >> 10)) * kRate >> 16) << 10);
    } else {
      point[0] = moved(a, target);
      point[1] = moved(b, target);
    }
  }

  static uint32_t moved(uint32_t point, int64_t target) {
    const uint32_t count = point & 1023;
    const int64_t mean = point >> 10;
    const int64_t next = mean + ((target - mean) * kRates[count] >> 16);
    return static_cast<uint32_t>(next) << 10 | std::min(count + 1, kCounts - 1);
  }

  std::array<uint32_t, 33 * 33> points_;  // mean << 10 | count
};

[[gnu::always_inline]] inline uint32_t dot_body(const uint32_t* w, const uint32_t* x, int64_t n) {
  uint32_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += w[k] * x[k];
  return sum;
}

[[gnu::always_inline]] inline void add_body(uint32_t* w, const uint32_t* x, uint32_t g, int64_t n) {
  for (int64_t k = 0; k < n; ++k) w[k] += g * x[k];
}

[[gnu::always_inline]] inline int32_t product_body(const int16_t* a, const int16_t* b, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += int32_t{a[k]} * b[k];
  return sum;
}

struct VectorOps {
  uint32_t (*dot)(const uint32_t*, const uint32_t*, int64_t);
  void (*add)(uint32_t*, const uint32_t*, uint32_t, int64_t);
  int32_t (*product)(const int16_t*, const int16_t*, int64_t);
};

inline uint32_t dot_any(const uint32_t* w, const uint32_t* x, int64_t n) { return dot_body(w, x, n); }
inline void add_any(uint32_t* w, const uint32_t* x, uint32_t g, int64_t n) { add_body(w, x, g, n); }
inline int32_t product_any(const int16_t* a, const int16_t* b, int64_t n) { return product_body(a, b, n); }

#if defined(__x86_64__)
PGOLF_TARGET("avx2") inline uint32_t dot_avx2(const uint32_t* w, const uint32_t* x, int64_t n) {
  return dot_body(w, x, n);
}
PGOLF_TARGET("avx2") inline void add_avx2(uint32_t* w, const uint32_t* x, uint32_t g, int64_t n) {
  add_body(w, x, g, n);
}
PGOLF_TARGET("avx2") inline int32_t product_avx2(const int16_t* a, const int16_t* b, int64_t n) {
  return product_body(a, b, n);
}

inline VectorOps best_ops() {
  if (best_isa() == Isa::kBaseline) return {dot_any, add_any, product_any};
  return {dot_avx2, add_avx2, product_avx2};
}
#else
inline VectorOps best_ops() { return {dot_any, add_any, product_any}; }
#endif

// The mean of a code from the codes to its left: one row of weights for each column.
class Predictor {
 public:
  explicit Predictor(int64_t cols)
      : stride_(cols + 1),
        weights_(static_cast<size_t>(cols * (cols + 1))),
        inputs_(static_cast<size_t>(cols + 1)),
        ops_(best_ops()) {
    inputs_[0] = kBias;
  }

  void start_row(int64_t row) {
    const int64_t energy = std::max<int64_t>(16, (energy_ + 7 * (stride_ - 1)) / (row + 1));
    gain_ = kStep / energy;
  }

  int mean(int64_t col, int lo, int hi) const {  // in 1/256
    const uint32_t sum = ops_.dot(weights_.data() + col * stride_, inputs_.data(), col + 1);
    return std::clamp(static_cast<int32_t>(sum) >> 12, lo * 256, hi * 256);
  }

  void learn(int64_t col, int code, int residual) {
    const auto g = static_cast<uint32_t>(residual * gain_ >> 16);
    ops_.add(weights_.data() + col * stride_, inputs_.data(), g, col + 1);
    inputs_[static_cast<size_t>(col + 1)] = static_cast<uint32_t>(code);
    energy_ += code * code;
  }

 private:
  int64_t stride_;
  int64_t energy_ = 0;
  int64_t gain_ = 0;
  std::vector<uint32_t> weights_;  // (cols, cols + 1), those left of the diagonal are used
  std::vector<uint32_t> inputs_;
  VectorOps ops_;
};

// The variance of a column's residuals, and of the row so far relative to what its columns promised.
class Variances {
 public:
  explicit Variances(int64_t cols) : sums_(static_cast<size_t>(cols)) {}

  void start_row(int64_t row) {
    const auto seen = static_cast<uint64_t>(row);
    const uint64_t mean = (total_ + 7 * 256 * 64) / (seen * sums_.size() + 64);
    prior_ = mean * kPriorRows;
    reciprocal_ = (uint64_t{1} << 32) / (seen + kPriorRows);
    found_ = promised_ = clamped(mean) * kPriorCols;
    ratio_ = 256;
  }

  uint64_t column(int64_t col) const {
    return clamped((sums_[static_cast<size_t>(col)] + prior_) * reciprocal_ >> 32);
  }

  uint64_t scaled(uint64_t variance) const { return clamped(variance * ratio_ >> 8); }

  uint64_t learn_column(int64_t col, int residual) {
    const uint64_t square = static_cast<uint64_t>(int64_t{residual} * residual) >> 8;
    sums_[static_cast<size_t>(col)] += square;
    total_ += square;
    return square;
  }

  void learn(int64_t col, int residual, uint64_t variance) {
    const uint64_t square = learn_column(col, residual);
    found_ += std::min(square, variance * 16);
    promised_ += variance;
  }

  void refresh() { ratio_ = std::min<uint64_t>((found_ << 8) / promised_, 4096); }

 private:
  static uint64_t clamped(uint64_t variance) { return std::clamp(variance, kVarianceLeast, kVarianceMost); }

  std::vector<uint64_t> sums_;
  uint64_t total_ = 0, prior_ = 0, reciprocal_ = 0, found_ = 0, promised_ = 0, ratio_ = 256;
};

// What earlier rows left over: 16 times the code less its predicted mean, row after row, and their energies.
class Rows {
 public:
  Rows(const int8_t* pool, int64_t pool_rows, int64_t rows, int64_t cols)
      : cols_(cols), values_(static_cast<size_t>((pool_rows + rows + 1) * cols)) {
    energies_.reserve(static_cast<size_t>(pool_rows + rows));
    for (int64_t row = 0; row < pool_rows; ++row) {
      std::transform(pool + row * cols, pool + (row + 1) * cols, next(),
                     [](int8_t code) { return static_cast<int16_t>(code * 16); });
      finish();
    }
  }

  int64_t cols() const { return cols_; }
  int64_t count() const { return static_cast<int64_t>(energies_.size()); }
  int16_t* next() { return values_.data() + count() * cols_; }  // the row that is being coded
  const int16_t* row(int64_t index) const { return values_.data() + index * cols_; }
  const int16_t* zeros() const { return values_.data() + static_cast<int64_t>(values_.size()) - cols_; }
  int64_t energy(int64_t index) const { return energies_[static_cast<size_t>(index)]; }

  void finish() {
    int64_t energy = 0;
    for (const int16_t *v = next(), *end = v + cols_; v < end; ++v) energy += int64_t{*v} * *v;
    energies_.push_back(energy);
  }

 private:
  int64_t cols_;
  std::vector<int16_t> values_;  // (pool rows + rows + 1, cols); the last stays zero
  std::vector<int64_t> energies_;
};

// The earlier row that the current one leans on, by a factor that is learned along the row: sum f t / sum
// f^2, with the mean factor of earlier rows as a prior that weighs as much as kPriorCodes codes.
class Lean {
 public:
  void start_row(const Rows& rows, int64_t index) {
    used_ = index >= 0;
    values_ = used_ ? rows.row(index) : rows.zeros();
    squares_ = used_ ? rows.energy(index) * kPriorCodes / rows.cols() + 1 : 1;
    factor_ = used_ ? prior_ : 0;
    products_ = squares_ * factor_ >> 12;
  }

  int mean(int64_t col) const { return factor_ * values_[col] >> 8; }  // in 1/256

  void learn(int64_t col, int left) {  // what was left to explain, in 1/16
    products_ += int64_t{values_[col]} * left;
    squares_ += int64_t{values_[col]} * values_[col];
  }

  void refresh() {
    const int64_t size = std::min<int64_t>((std::abs(products_) << 12) / squares_, 8191);
    factor_ = static_cast<int>(products_ < 0 ? -size : size);
  }

  void finish_row() {
    if (used_) prior_ += (factor_ - prior_) >> 4;
  }

 private:
  const int16_t* values_ = nullptr;
  int64_t products_ = 0, squares_ = 1;
  int factor_ = 0, prior_ = 0;  // in 1/4096
  bool used_ = false;
};

// A bit whose probability follows the last ones.
class Habit {
 public:
  template <typename Coder>
  bool code(Coder& coder, bool wanted) {
    const bool bit = coder.bit(p_, wanted) != 0;
    p_ = static_cast<uint32_t>(static_cast<int>(p_) + (((bit ? 65536 : 0) - static_cast<int>(p_)) >> 4));
    p_ = std::clamp<uint32_t>(p_, 256, 65280);
    return bit;
  }

 private:
  uint32_t p_ = 32768;
};

// Which row is leaned on: the one after the last choice? else: any? else its number.
class Choice {
 public:
  int64_t following(int64_t count) const { return last_ + 1 < count ? last_ + 1 : -1; }

  // Codes the index of one of `count` rows, or -1 for none; `wanted` is ignored by a decoder.
  template <typename Coder>
  int64_t code(Coder& coder, int64_t count, int64_t wanted) {
    const int64_t next = following(count);
    if (next >= 0 && follows_.code(coder, wanted == next)) return last_ = next;
    if (next >= 0) last_ = next;
    if (count == 0 || !any_.code(coder, wanted >= 0)) return -1;
    int64_t index = 0;
    for (int place = std::bit_width(static_cast<uint64_t>(count - 1)) - 1; place >= 0; --place) {
      index = index * 2 + coder.bit(32768, static_cast<int>(wanted >> place & 1));
    }
    if (index >= count) return coder.refuse();
    return last_ = index;
  }

 private:
  int64_t last_ = -1;
  Habit follows_, any_;
};

}  // namespace pgolf::range_model
