// CPU kernel of range_coder.h, which describes the format.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <utility>

#include "kernels/isa.h"
#include "kernels/range_coder.h"

namespace pgolf {
namespace {

constexpr int64_t kMostCols = 1 << 20;
constexpr int64_t kPredictCols = 2048;
constexpr int64_t kPredictRatio = 8;
constexpr int kPriorRows = 24;         // weight of the matrix's variance in a column's
constexpr int kBias = 16;              // the predictor's constant input
constexpr int64_t kStep = 40265318;    // 0.15 * 2^28
constexpr uint64_t kRowPrior = 64;     // weight of 1 in a row's variance ratio
constexpr uint64_t kRatioMost = 4096;  // 16, in 1/256
constexpr uint64_t kVarianceLeast = 16;
constexpr uint64_t kVarianceMost = (1u << 25) - 1;
constexpr int kTails = 256;  // z in [0, 8) in steps of 1 / 32

enum Mode : uint8_t { kRaw = 0, kColumns = 1, kPredicted = 2 };

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

// 2^21 / standard deviation for variances (in 1/256) of 32 mantissas an octave, at the middle of each.
constexpr std::array<uint32_t, 25 * 32> inverse_table() {
  std::array<uint32_t, 25 * 32> table{};
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = static_cast<uint32_t>(square_root((uint64_t{1} << 56) / ((65 + 2 * (i & 31)) << (i >> 5))));
  }
  return table;
}

constexpr auto kTail = tail_table();
constexpr auto kInverse = inverse_table();

uint64_t tail(uint64_t distance, uint64_t inverse) {  // distance in 1/256
  const uint64_t z = distance * inverse >> 8;         // 1/32 in 16 bits of fraction
  const uint64_t i = z >> 16;
  if (i >= kTails) return kTail[kTails];
  return kTail[i] - ((kTail[i] - kTail[i + 1]) * (z & 65535) >> 16);
}

uint64_t inverse_deviation(uint64_t variance) {
  const int octave = std::bit_width(variance) - 1;  // 4 to 24
  const uint64_t mantissa = octave >= 5 ? variance >> (octave - 5) : variance << (5 - octave);
  return kInverse[static_cast<size_t>(octave) * 32 + (mantissa & 31)];
}

// Learns what a predicted probability is really worth: for each kind of bit, 33 points on the line of
// predictions, each a running mean of 22 bits with its count; the two next to a prediction answer and learn.
class Correction {
 public:
  Correction() {
    for (size_t i = 0; i < points_.size(); ++i) {
      points_[i] = std::clamp<uint32_t>(static_cast<uint32_t>(i % 33) << 11, 1, 65535) << 16 | 30;
    }
    for (uint32_t count = 0; count < kCounts; ++count) rates_[count] = 131072 / (2 * count + 3);
  }

  template <typename Coder>
  int code(Coder& coder, uint64_t predicted, int kind, int bit) {
    const auto p = static_cast<uint32_t>(std::clamp<uint64_t>(predicted, 1, 65535));
    uint32_t* point = &points_[static_cast<size_t>(kind) * 33 + (p >> 11)];
    const uint32_t above = p & 2047;
    const uint32_t learned = ((point[0] >> 16) * (2048 - above) + (point[1] >> 16) * above) >> 11;
    bit = coder.bit(std::clamp<uint32_t>((p + learned) >> 1, 16, 65520), bit);
    learn(point[0], bit);
    learn(point[1], bit);
    return bit;
  }

 private:
  static constexpr uint32_t kCounts = 1001;

  void learn(uint32_t& point, int bit) const {
    const uint32_t count = point & 1023;
    const int64_t mean = point >> 10;
    const int64_t moved = mean + (((bit ? 4194303 : 0) - mean) * rates_[count] >> 16);
    point = static_cast<uint32_t>(moved) << 10 | std::min(count + 1, kCounts - 1);
  }

  std::array<uint32_t, 33 * 33> points_;  // mean << 10 | count
  std::array<int64_t, kCounts> rates_;    // 2^16 / (count + 3/2)
};

inline __attribute__((always_inline)) uint32_t dot_body(const uint32_t* w, const uint32_t* x, int64_t n) {
  uint32_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += w[k] * x[k];
  return sum;
}

inline __attribute__((always_inline)) void add_body(uint32_t* w, const uint32_t* x, uint32_t g, int64_t n) {
  for (int64_t k = 0; k < n; ++k) w[k] += g * x[k];
}

struct VectorOps {
  uint32_t (*dot)(const uint32_t*, const uint32_t*, int64_t);
  void (*add)(uint32_t*, const uint32_t*, uint32_t, int64_t);
};

uint32_t dot_any(const uint32_t* w, const uint32_t* x, int64_t n) { return dot_body(w, x, n); }
void add_any(uint32_t* w, const uint32_t* x, uint32_t g, int64_t n) { add_body(w, x, g, n); }

#if defined(__x86_64__)
PGOLF_TARGET("avx2") uint32_t dot_avx2(const uint32_t* w, const uint32_t* x, int64_t n) {
  return dot_body(w, x, n);
}
PGOLF_TARGET("avx2") void add_avx2(uint32_t* w, const uint32_t* x, uint32_t g, int64_t n) {
  add_body(w, x, g, n);
}

VectorOps best_ops() {
  return best_isa() == Isa::kBaseline ? VectorOps{dot_any, add_any} : VectorOps{dot_avx2, add_avx2};
}
#else
VectorOps best_ops() { return {dot_any, add_any}; }
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
    ratio_sum_ = kRowPrior * 256;
    ratio_count_ = kRowPrior;
  }

  uint64_t column(int64_t col) const {
    return clamped((sums_[static_cast<size_t>(col)] + prior_) * reciprocal_ >> 32);
  }

  uint64_t scaled(uint64_t variance) const { return clamped(variance * (ratio_sum_ / ratio_count_) >> 8); }

  void learn(int64_t col, int residual, uint64_t variance) {
    const uint64_t square = static_cast<uint64_t>(int64_t{residual} * residual) >> 8;
    sums_[static_cast<size_t>(col)] += square;
    total_ += square;
    ratio_sum_ += std::min((square << 8) / variance, kRatioMost);
    ++ratio_count_;
  }

 private:
  static uint64_t clamped(uint64_t variance) { return std::clamp(variance, kVarianceLeast, kVarianceMost); }

  std::vector<uint64_t> sums_;
  uint64_t total_ = 0, prior_ = 0, reciprocal_ = 0, ratio_sum_ = 0, ratio_count_ = 0;
};

class Encoder {
 public:
  static constexpr bool kDecodes = false;

  explicit Encoder(std::vector<uint8_t>& out, size_t most) : out_(out), most_(most) {}

  int bit(uint32_t p, int bit) {
    const uint64_t range = high_ - low_;
    const uint64_t middle = low_ + (range >> 16) * p + ((range & 65535) * p >> 16);
    (bit ? high_ : low_) = bit ? middle : middle + 1;
    for (; (low_ ^ high_) >> 56 == 0; low_ <<= 8, high_ = high_ << 8 | 255) {
      out_.push_back(static_cast<uint8_t>(high_ >> 56));
    }
    return bit;
  }

  bool failed() const { return out_.size() > most_; }  // longer than another mode's stream

  void finish();

 private:
  std::vector<uint8_t>& out_;
  size_t most_;
  uint64_t low_ = 0, high_ = ~uint64_t{0};
};

// The bytes that end a stream: the shortest prefix that, followed by zeros, lies in [low, high].
struct Ending {
  uint64_t value = 0;
  int bytes = 0;
};

Ending ending(uint64_t low, uint64_t high) {
  if (low == 0) return {};
  for (int bytes = 1; bytes < 8; ++bytes) {
    const uint64_t mask = ~uint64_t{0} >> (8 * bytes);
    const uint64_t value = (low + mask) & ~mask;
    if (value >= low && value <= high) return {value, bytes};
  }
  return {low, 8};
}

void Encoder::finish() {
  const Ending end = ending(low_, high_);
  for (int i = 0; i < end.bytes; ++i) out_.push_back(static_cast<uint8_t>(end.value >> (56 - 8 * i)));
}

class Decoder {
 public:
  static constexpr bool kDecodes = true;

  Decoder(const uint8_t* data, int64_t size) : data_(data), size_(size) {
    for (int i = 0; i < 8; ++i) shift();
  }

  int bit(uint32_t p, int) {
    const uint64_t range = high_ - low_;
    const uint64_t middle = low_ + (range >> 16) * p + ((range & 65535) * p >> 16);
    const int bit = value_ <= middle;
    (bit ? high_ : low_) = bit ? middle : middle + 1;
    for (; (low_ ^ high_) >> 56 == 0; low_ <<= 8, high_ = high_ << 8 | 255) shift();
    return bit;
  }

  bool failed() const { return left() > size_; }

  // Whether the encoder would have ended here, with these bytes.
  bool finished() const {
    const Ending end = ending(low_, high_);
    return left() + end.bytes == size_ && value_ == end.value;
  }

 private:
  void shift() {
    value_ = value_ << 8 | (next_ < size_ ? data_[next_] : 0u);
    ++next_;
  }

  int64_t left() const { return next_ - 8; }  // bytes that are no longer in value_

  const uint8_t* data_;
  int64_t size_;
  int64_t next_ = 0;
  uint64_t low_ = 0, high_ = ~uint64_t{0}, value_ = 0;
};

struct Gaussian {
  int mean;          // in 1/256
  uint64_t inverse;  // 2^21 / standard deviation
  bool signs_differ;
};

// Codes one value in [lo, hi]; `code` is ignored by a decoder.
template <typename Coder>
int code_value(Coder& coder, Correction& correction, const Gaussian& g, int lo, int hi, int code) {
  const int center = (g.mean + 128) >> 8;
  const int offset = g.mean - center * 256;  // in [-128, 127]
  const uint64_t above = tail(static_cast<uint64_t>(128 - offset), g.inverse);
  const uint64_t below = tail(static_cast<uint64_t>(128 + offset), g.inverse);
  const uint64_t outside = ((above + below) << 15) / kTail[0];
  if (correction.code(coder, outside < 65536 ? 65536 - outside : 1, 0, code == center)) return center;
  bool up = center < hi;
  if (up && center > lo) {
    const uint64_t p = (above << 16) / (above + below);
    up = g.signs_differ ? correction.code(coder, p, 1, code > center) : coder.bit(32768, code > center);
  }
  const int most = up ? hi - center : center - lo;
  const int wanted = up ? code - center : center - code;
  uint64_t rest = up ? above : below;
  int size = 1;
  for (; size < most; ++size) {
    const int edge = size * 256 + 128 + (up ? -offset : offset);
    const uint64_t beyond = tail(static_cast<uint64_t>(edge), g.inverse);
    const uint64_t p = 65536 - (beyond << 16) / rest;
    if (correction.code(coder, p, 2 + std::min(size, 30), wanted == size)) break;
    rest = beyond;
  }
  return up ? center + size : center - size;
}

template <bool kPredict, typename Coder, typename Code>
void code_matrix(Coder& coder, Code* codes, int64_t rows, int64_t cols, int largest) {
  const int lo = -largest, hi = std::min(largest, 127);
  Correction correction;
  Variances variances(cols);
  Predictor predictor(kPredict ? cols : 0);
  for (int64_t row = 0; row < rows && !coder.failed(); ++row) {
    variances.start_row(row);
    if constexpr (kPredict) predictor.start_row(row);
    for (int64_t col = 0; col < cols; ++col, ++codes) {
      const uint64_t column = variances.column(col);
      const uint64_t variance = kPredict ? variances.scaled(column) : column;
      const int mean = kPredict ? predictor.mean(col, lo, hi) : 0;
      const Gaussian g{mean, inverse_deviation(variance), kPredict};
      const int code = code_value(coder, correction, g, lo, hi, Coder::kDecodes ? 0 : *codes);
      if constexpr (Coder::kDecodes) *codes = static_cast<int8_t>(code);
      const int residual = code * 256 - mean;
      variances.learn(col, residual, column);
      if constexpr (kPredict) predictor.learn(col, code, residual);
    }
  }
}

// The stream in one of the coded modes, or one longer than `most` bytes.
std::vector<uint8_t> encode_in(Mode mode, const int8_t* codes, int64_t rows, int64_t cols, int largest,
                               size_t most) {
  std::vector<uint8_t> out{mode, static_cast<uint8_t>(largest)};
  if (largest == 0) return out;
  Encoder encoder(out, most);
  if (mode == kPredicted) {
    code_matrix<true>(encoder, codes, rows, cols, largest);
  } else {
    code_matrix<false>(encoder, codes, rows, cols, largest);
  }
  encoder.finish();
  return out;
}

const char* decode_coded(Mode mode, Decoder& decoder, int8_t* codes, int64_t rows, int64_t cols,
                         int largest) {
  if (mode == kPredicted) {
    code_matrix<true>(decoder, codes, rows, cols, largest);
  } else {
    code_matrix<false>(decoder, codes, rows, cols, largest);
  }
  if (decoder.failed()) return "the stream ends before the last code";
  return decoder.finished() ? nullptr : "the stream does not end with the last code";
}

}  // namespace

std::vector<uint8_t> encode_codes_cpu(const int8_t* codes, int64_t rows, int64_t cols) {
  const int64_t count = rows * cols;
  int largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(int{codes[i]}));
  std::vector<uint8_t> best(static_cast<size_t>(count + 1), kRaw);
  std::transform(codes, codes + count, best.begin() + 1, [](int8_t q) { return static_cast<uint8_t>(q); });
  const bool predictable = largest > 0 && cols <= kPredictCols && rows >= kPredictRatio * cols;
  for (const Mode mode : {kColumns, kPredicted}) {
    if (count == 0 || cols > kMostCols || (mode == kPredicted && !predictable)) continue;
    std::vector<uint8_t> coded = encode_in(mode, codes, rows, cols, largest, best.size());
    if (coded.size() < best.size()) best = std::move(coded);
  }
  return best;
}

const char* decode_codes_cpu(const uint8_t* data, int64_t size, int8_t* codes, int64_t rows, int64_t cols) {
  const int64_t count = rows * cols;
  if (size < 1 || data[0] > kPredicted) return "the stream has no known mode";
  const auto mode = static_cast<Mode>(data[0]);
  if (mode == kRaw) {
    if (size != count + 1) return "the raw stream has another length";
    std::transform(data + 1, data + size, codes, [](uint8_t byte) { return static_cast<int8_t>(byte); });
    return nullptr;
  }
  if (cols > kMostCols) return "the stream models more columns than are ever modelled";
  if (size < 2 || data[1] > 128) return "the stream has no possible largest code";
  const int largest = data[1];
  if (mode == kPredicted && (largest == 0 || cols > kPredictCols)) {
    return "the stream predicts a matrix that is never predicted";
  }
  if (largest == 0) {
    std::fill_n(codes, count, int8_t{0});
    return size == 2 ? nullptr : "the stream of zeros has another length";
  }
  Decoder decoder(data + 2, size - 2);
  return decode_coded(mode, decoder, codes, rows, cols, largest);
}

}  // namespace pgolf
