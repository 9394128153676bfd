// CPU kernel of range_coder.h, which describes the format. With PGOLF_DECODER_ONLY it has no encoder: see
// csrc/alone/range_coder.cpp.
#include <algorithm>
#include <utility>

#include "kernels/range_coder.h"
#include "kernels/range_model.h"

namespace pgolf {
namespace {

using namespace range_model;

constexpr int64_t kMostCols = 1 << 20;
constexpr int64_t kRowsCols = 2048;
constexpr int64_t kPredictRatio = 8;

enum Mode : uint8_t { kRaw = 0, kColumns = 1, kRows = 2, kPredicted = 3 };

inline uint64_t split(uint64_t low, uint64_t high, uint32_t p) {
  return low + static_cast<uint64_t>(static_cast<unsigned __int128>(high - low) * p >> 16);
}

#ifndef PGOLF_DECODER_ONLY
class Encoder {
 public:
  static constexpr bool kDecodes = false;

  explicit Encoder(std::vector<uint8_t>& out, size_t most) : out_(&out), most_(most) {}

  int bit(uint32_t p, int bit) {
    const uint64_t middle = split(low_, high_, p);
    if (bit) {
      high_ = middle;
    } else {
      low_ = middle + 1;
    }
    for (; (low_ ^ high_) >> 56 == 0; low_ <<= 8, high_ = high_ << 8 | 255) {
      out_->push_back(static_cast<uint8_t>(high_ >> 56));
    }
    return bit;
  }

  bool failed() const { return out_->size() > most_; }  // longer than another mode's stream
  static int64_t refuse() { return -1; }                // nothing that is encoded is out of range

  void finish();

 private:
  std::vector<uint8_t>* out_;
  size_t most_;
  uint64_t low_ = 0, high_ = ~uint64_t{0};
};
#endif  // PGOLF_DECODER_ONLY

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

#ifndef PGOLF_DECODER_ONLY
void Encoder::finish() {
  const Ending end = ending(low_, high_);
  for (int i = 0; i < end.bytes; ++i) out_->push_back(static_cast<uint8_t>(end.value >> (56 - 8 * i)));
}
#endif  // PGOLF_DECODER_ONLY

class Decoder {
 public:
  static constexpr bool kDecodes = true;

  Decoder(const uint8_t* data, int64_t size) : data_(data), size_(size) {
    for (int i = 0; i < 8; ++i) shift();
  }

  int bit(uint32_t p, int) {
    const uint64_t middle = split(low_, high_, p);
    const bool bit = value_ <= middle;
    if (bit) {
      high_ = middle;
    } else {
      low_ = middle + 1;
    }
    for (; (low_ ^ high_) >> 56 == 0; low_ <<= 8, high_ = high_ << 8 | 255) shift();
    return bit;
  }

  bool failed() const { return refused_ || left() > size_; }

  int64_t refuse() {
    refused_ = true;
    return -1;
  }

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
  bool refused_ = false;
};

// Codes one value in [lo, hi]; `code` is ignored by a decoder.
template <typename Coder, typename Bits>
[[gnu::always_inline]] inline int code_value(Coder& coder, Correction& correction, Bits& bits, int lo, int hi,
                                             int code) {
  const int center = bits.center();
  if (correction.code(coder, bits.at_center(), 0, code == center)) return center;
  bool up = center < hi;
  if (up && center > lo) {
    if constexpr (Bits::kSignsDiffer) {
      up = correction.code(coder, bits.up(), 1, code > center);
    } else {
      up = coder.bit(32768, code > center);
    }
  }
  bits.go(up);
  const int most = up ? hi - center : center - lo;
  const int wanted = up ? code - center : center - code;
  int size = 1;
  while (size < most && !correction.code(coder, bits.step(size), 2 + std::min(size, 30), wanted == size))
    ++size;
  return up ? center + size : center - size;
}

#ifndef PGOLF_DECODER_ONLY
// For every row of an encoder the earlier one that says most about it: not part of the format.
class Search {
 public:
  Search(const Rows& rows, int64_t first, int64_t count, int64_t cols)
      : cols_(cols), ops_(best_ops()), values_(static_cast<size_t>(count * cols)) {
    for (int64_t i = 0; i < count * cols; ++i) {  // whole codes: their products fit 32 bits
      values_[static_cast<size_t>(i)] = static_cast<int16_t>((rows.row(0)[i] + 8) >> 4);
    }
    for (int64_t i = 0; i < count; ++i) energies_.push_back(ops_.product(row(i), row(i), cols));
    found_.resize(static_cast<size_t>(count), {-1, 0});
    // A few rows at a time against all before them, or the rows would pass through the cache for each.
    for (int64_t begin = first; begin < count; begin += kRowsAtOnce) {
      const int64_t end = std::min(begin + kRowsAtOnce, count);
      for (int64_t i = 0; i < end; ++i) {
        for (int64_t j = std::max(begin, i + 1); j < end; ++j) compare(i, j);
      }
    }
  }

  // The row that `index` should lean on, -1 if none pays.
  int64_t best(int64_t index, int64_t following) const {
    const Found& found = found_[static_cast<size_t>(index)];
    const int64_t price = 16 * (std::bit_width(static_cast<uint64_t>(index)) + 5);
    const int64_t along = following < 0 ? -1 : gain(following, index) - 8;
    if (along > 0 && along >= found.gain - price) return following;
    return found.gain > price ? found.index : -1;
  }

 private:
  struct Found {
    int64_t index, gain;
  };
  static constexpr int64_t kRowsAtOnce = 16;

  const int16_t* row(int64_t index) const { return values_.data() + index * cols_; }

  // 16 times the bits that leaning saves: cols / 2 log2(1 / (1 - r^2)), about 0.72 cols r^2.
  int64_t gain(int64_t earlier, int64_t later) const {
    const int64_t energies = energies_[static_cast<size_t>(earlier)];
    const int64_t product = ops_.product(row(earlier), row(later), cols_);
    if (energies == 0) return 0;
    return product * product / energies * cols_ * 23 / (2 * energies_[static_cast<size_t>(later)] + 1);
  }

  void compare(int64_t earlier, int64_t later) {
    Found& found = found_[static_cast<size_t>(later)];
    const int64_t saved = gain(earlier, later);
    if (saved > found.gain) found = {earlier, saved};
  }

  int64_t cols_;
  VectorOps ops_;
  std::vector<int16_t> values_;  // (rows, cols)
  std::vector<int64_t> energies_;
  std::vector<Found> found_;
};
#endif  // PGOLF_DECODER_ONLY

// Mode 1: every column on its own.
template <typename Coder, typename Code>
void code_columns(Coder& coder, Code* codes, const Shape& shape, int largest) {
  const int lo = -largest, hi = std::min(largest, 127);
  Correction correction;
  Variances variances(shape.cols);
  Centered bits;
  for (int64_t row = 0; row < shape.rows && !coder.failed(); ++row) {
    variances.start_row(row);
    Coder local = coder;  // in registers for a row
    for (int64_t col = 0; col < shape.cols; ++col, ++codes) {
      bits.set_variance(variances.column(col));
      const int code = code_value(local, correction, bits, lo, hi, Coder::kDecodes ? 0 : *codes);
      if constexpr (Coder::kDecodes) *codes = static_cast<int8_t>(code);
      variances.learn_column(col, code * 256);
    }
    coder = local;
  }
}

// Modes 2 and 3: rows lean on earlier rows; mode 3 predicts from the codes to the left before that.
template <bool kPredict, typename Coder>
class RowCoder {
 public:
  RowCoder(Coder& coder, const int8_t* pool, const Shape& shape, int largest)
      : coder_(coder),
        shape_(shape),
        lo_(-largest),
        hi_(std::min(largest, 127)),
        variances_(shape.cols),
        predictor_(kPredict ? shape.cols : 0),
        rows_(pool, shape.pool_rows, shape.rows, shape.cols) {}

#ifndef PGOLF_DECODER_ONLY
  void encode(const int8_t* codes) {
    const std::vector<int> bases = look_ahead(codes);
    const Search search(rows_, shape_.pool_rows, rows_.count(), shape_.cols);
    for (int64_t row = 0; row < shape_.rows && !coder_.failed(); ++row) {
      const int64_t count = shape_.pool_rows + row;
      lean_.start_row(rows_, choice_.code(coder_, count, search.best(count, choice_.following(count))));
      code_row(row, rows_.row(count), codes + row * shape_.cols, bases.data() + row * shape_.cols);
    }
  }
#endif  // PGOLF_DECODER_ONLY

  void decode(int8_t* codes) {
    for (int64_t row = 0; row < shape_.rows && !coder_.failed(); ++row) {
      const int64_t count = shape_.pool_rows + row;
      if constexpr (kPredict) predictor_.start_row(row);
      lean_.start_row(rows_, choice_.code(coder_, count, -1));
      code_row(row, rows_.next(), codes + row * shape_.cols, nullptr);
      rows_.finish();
    }
  }

 private:
#ifndef PGOLF_DECODER_ONLY
  // An encoder knows all rows, so it predicts first, and compares what is left of them.
  std::vector<int> look_ahead(const int8_t* codes) {
    std::vector<int> bases(static_cast<size_t>(shape_.rows * shape_.cols));
    int* base = bases.data();
    for (int64_t row = 0; row < shape_.rows; ++row) {
      if constexpr (kPredict) predictor_.start_row(row);
      for (int64_t col = 0; col < shape_.cols; ++col, ++codes, ++base) {
        if constexpr (kPredict) {
          *base = predictor_.mean(col, lo_, hi_);
          predictor_.learn(col, *codes, *codes * 256 - *base);
        }
        rows_.next()[col] = static_cast<int16_t>((*codes * 256 - *base) >> 4);
      }
      rows_.finish();
    }
    return bases;
  }
#endif  // PGOLF_DECODER_ONLY

  template <typename Left, typename Code>
  void code_row(int64_t row, Left* left, Code* codes, const int* bases) {
    variances_.start_row(row);
    Coder local = coder_;  // in registers for a row
    for (int64_t col = 0; col < shape_.cols; ++col) {
      int base = 0;
      if constexpr (kPredict) base = Coder::kDecodes ? predictor_.mean(col, lo_, hi_) : bases[col];
      const int mean = std::clamp(base + lean_.mean(col), lo_ * 256, hi_ * 256);
      const uint64_t column = variances_.column(col);
      Gaussian bits(mean, kInverse[inverse_index(variances_.scaled(column))]);
      const int code = code_value(local, correction_, bits, lo_, hi_, Coder::kDecodes ? 0 : codes[col]);
      if constexpr (Coder::kDecodes) {
        codes[col] = static_cast<int8_t>(code);
        left[col] = static_cast<int16_t>((code * 256 - base) >> 4);
        if constexpr (kPredict) predictor_.learn(col, code, code * 256 - base);
      }
      variances_.learn(col, code * 256 - mean, column);
      lean_.learn(col, left[col]);
      if ((col & 7) == 7) {
        variances_.refresh();
        lean_.refresh();
      }
    }
    lean_.finish_row();
    coder_ = local;
  }

  Coder& coder_;
  Shape shape_;
  int lo_, hi_;
  Correction correction_;
  Variances variances_;
  Predictor predictor_;
  Rows rows_;
  Lean lean_;
  Choice choice_;
};

#ifndef PGOLF_DECODER_ONLY
template <bool kPredict>
void code_rows(Encoder& coder, const int8_t* pool, const int8_t* codes, const Shape& shape, int largest) {
  RowCoder<kPredict, Encoder>(coder, pool, shape, largest).encode(codes);
}
#endif  // PGOLF_DECODER_ONLY

template <bool kPredict>
void code_rows(Decoder& coder, const int8_t* pool, int8_t* codes, const Shape& shape, int largest) {
  RowCoder<kPredict, Decoder>(coder, pool, shape, largest).decode(codes);
}

template <typename Coder, typename Code>
void code_matrix(Mode mode, Coder& coder, const int8_t* pool, Code* codes, const Shape& shape, int largest) {
  if (mode == kColumns) {
    code_columns(coder, codes, shape, largest);
  } else if (mode == kRows) {
    code_rows<false>(coder, pool, codes, shape, largest);
  } else {
    code_rows<true>(coder, pool, codes, shape, largest);
  }
}

#ifndef PGOLF_DECODER_ONLY
// The stream in one of the coded modes, or one longer than `most` bytes.
std::vector<uint8_t> encode_in(Mode mode, const int8_t* pool, const int8_t* codes, const Shape& shape,
                               int largest, size_t most) {
  std::vector<uint8_t> out{mode, static_cast<uint8_t>(largest)};
  if (largest == 0) return out;
  Encoder encoder(out, most);
  code_matrix(mode, encoder, pool, codes, shape, largest);
  encoder.finish();
  return out;
}
#endif  // PGOLF_DECODER_ONLY

}  // namespace

#ifndef PGOLF_DECODER_ONLY
std::vector<uint8_t> encode_codes_cpu(const int8_t* codes, const int8_t* pool, const Shape& shape,
                                      bool fast) {
  const int64_t count = shape.rows * shape.cols;
  int largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(int{codes[i]}));
  std::vector<uint8_t> best(static_cast<size_t>(count + 1), kRaw);
  std::transform(codes, codes + count, best.begin() + 1, [](int8_t q) { return static_cast<uint8_t>(q); });
  std::vector<Mode> modes;
  if (count > 0 && shape.cols <= kMostCols) modes.push_back(kColumns);
  if (!modes.empty() && !fast && largest > 0 && shape.cols <= kRowsCols) {
    modes.push_back(shape.rows >= kPredictRatio * shape.cols ? kPredicted : kRows);
  }
  for (const Mode mode : modes) {
    std::vector<uint8_t> coded = encode_in(mode, pool, codes, shape, largest, best.size());
    if (coded.size() < best.size()) best = std::move(coded);
  }
  return best;
}
#endif  // PGOLF_DECODER_ONLY

const char* decode_codes_cpu(const uint8_t* data, int64_t size, const int8_t* pool, int8_t* codes,
                             const Shape& shape) {
  const int64_t count = shape.rows * shape.cols;
  if (size < 1 || data[0] > kPredicted) return "the stream has no known mode";
  const auto mode = static_cast<Mode>(data[0]);
  if (mode == kRaw) {
    if (size != count + 1) return "the raw stream has another length";
    std::transform(data + 1, data + size, codes, [](uint8_t byte) { return static_cast<int8_t>(byte); });
    return nullptr;
  }
  if (shape.cols > kMostCols) return "the stream models more columns than are ever modelled";
  if (size < 2 || data[1] > 128) return "the stream has no possible largest code";
  const int largest = data[1];
  if (mode != kColumns && (largest == 0 || shape.cols > kRowsCols)) {
    return "the stream compares rows of a matrix whose rows are never compared";
  }
  if (largest == 0) {
    std::fill_n(codes, count, int8_t{0});
    return size == 2 ? nullptr : "the stream of zeros has another length";
  }
  Decoder decoder(data + 2, size - 2);
  code_matrix(mode, decoder, pool, codes, shape, largest);
  if (decoder.failed()) return "the stream ends before the last code, or leans on a row that is not there";
  return decoder.finished() ? nullptr : "the stream does not end with the last code";
}

}  // namespace pgolf
