// The products that newton_schulz_sm90 runs, for each matrix in order, and the buffers that they move
// between. Host code, and the structures that it hands to the kernels.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <vector>

#include "kernels/newton_schulz_sm90.h"

namespace pgolf {
namespace ns90 {

inline constexpr int kBox = 64;  // side of the blocks that the copy engine moves, elements
inline constexpr int kBoxBytes = 2 * kBox * kBox;
inline constexpr int kTile = 128;                 // side of an output tile
inline constexpr int kSlotBytes = 2 * kBoxBytes;  // 128 x 64 of an operand
inline constexpr int kASlots = 8, kBSlots = 4;    // operands in shared memory
inline constexpr int kTallDepth = 8;              // blocks of k above which tiles of 256x128 pay
inline constexpr int kMaxBanks = kNsMaxBanks;
inline constexpr int kMaxProducts = 144;  // of all banks of a launch; one bank has at most 35
inline constexpr int kMaxRuns = 480;      // what a kernel's arguments leave room for
inline constexpr int kCastThreads = 256;
inline constexpr int kChunk = kCastThreads * 8 * 4;  // elements that a block of the normalising kernels takes
inline constexpr int kPartsOfInput = 8;              // partial sums a matrix of a caller that scales itself
inline constexpr int kAlignment = 256;               // bytes, of each buffer in the workspace

enum Layout : uint8_t { kRowsRows, kRowsColumns, kColumnsColumns };  // A B^T, A B, A^T B

// X moves between kOut (`out`, where that can hold float16) and kX. The squares R, Z and T of a matrix lie
// where its next X will be written, as far as they fit; kFactor is read by that product and lies apart, as
// does kSpare, which stands for T where only two fit. In short chains X stays in kOut, the product beside the
// chain goes to kX, and all squares lie apart, in the place of kSquaresX.
enum Buffer : uint8_t { kOut, kX, kSquaresOut, kSquaresX = kSquaresOut + 3, kFactor = kSquaresX + 3, kSpare };
inline constexpr int kMapsPerBank = kSpare + 1;
inline constexpr int kTallBoxes = kMaxBanks * kMapsPerBank;  // first map of the boxes of 128 rows

// out = alpha sigma^alpha_power A B + beta sigma^beta_power C + gamma I, for each matrix of a bank.
struct Product {
  float alpha, beta, gamma;
  uint8_t alpha_power, beta_power;
  Layout layout;
  bool symmetric;                     // only tiles on and below the diagonal are computed and stored
  bool tall;                          // tiles of 256x128
  bool spread;                        // the warpgroups share a task of one tile: latency before throughput
  uint8_t a, b, out;                  // tensor maps
  NsType type;                        // of out
  bool added;                         // C is A; else there is none
  bool a_lower, b_lower;              // symmetric, with only the tiles on and below the diagonal in memory
  bool waits_second, signals_second;  // of the matrix' two counters
  bool beside;                        // the next product does not need it, nor it the one before
  float* direct;                      // out where its type is float32
  int rows, cols;
  int depth;           // blocks of 64 along k
  int chunk;           // tiles of a row panel in one task
  int panels, across;  // tiles down and across
  int tasks, tiles;    // per matrix; tiles of 128x128
  int first_matrix;
  uint32_t need;  // the counter that it waits for before this product may start
};

// Consecutive tasks: a product of some matrices of its bank, from `first_matrix` of the bank on.
struct Run {
  int first_task;
  uint32_t first_matrix : 24, product : 8;
};

struct Plan {
  CUtensorMap maps[2 * kMaxBanks * kMapsPerBank];  // boxes of 64x64, then of 128 rows
  Product products[kMaxProducts];
  Run runs[kMaxRuns];
  int run_count, matrices;
  const float* sigma;  // per matrix
  uint32_t* done;      // (2, matrices): two for each stored tile
  uint32_t* queue;
};

// What the multiplying warpgroups know of a task: tiles `column` .. of 128 rows (256 if tall) from `row` on.
struct Task {
  float* direct;                    // of the matrix; null: out through the tensor map
  float alpha, beta, gamma;         // with sigma
  int product;                      // negative: no more tasks
  int matrix, waits, signals, out;  // waits, signals: counters
  int row, column, count;           // elements, elements, tiles
  int rows, cols, depth;
  uint32_t need;  // what `waits` must have reached
  uint8_t b;      // tensor map
  Layout layout;
  bool symmetric, tall, spread, added, same, bfloat16;  // same: A is B
  bool a_lower, b_lower;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    inline int tiles_in_panel(const Product& p, int panel) {
  const int reach = (panel + 1) * (p.tall ? 2 : 1);
  return p.symmetric && reach < p.across ? reach : p.across;
}

inline size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Tuning {
  int small_chunk, update_chunk;  // tiles of a task
  bool spread;                    // both warpgroups share a tile
  bool brief;                     // short chains of products, for more work
};

// Pairs of steps where the products on the short side are enough cheaper.
inline bool takes_pairs(const NsBank& bank, int steps) {
  return steps >= 2 && std::max(bank.rows, bank.cols) >= 2 * std::min(bank.rows, bank.cols);
}

inline bool takes_short_chain(const NsBank& bank, int steps, const Tuning& tuning) {
  return tuning.brief && takes_pairs(bank, steps);
}

inline int segment_count(const NsBank& bank, int steps) {
  return takes_pairs(bank, steps) ? (steps + 1) / 2 : steps;
}

inline int product_count(const NsBank& bank, int steps) {
  return takes_pairs(bank, steps) ? steps / 2 * 7 + steps % 2 * 3 : 3 * steps;
}

// Whether T lies with R and Z in the place of the next X.
inline bool has_room_for_three(const NsBank& bank) {
  return std::max(bank.rows, bank.cols) >= 3 * std::min(bank.rows, bank.cols);
}

// A matrix of a bank's buffer: where the first lies, and the step to the next, elements.
struct Place {
  __half* first;
  int64_t batch;
  int64_t rows, cols;
};

// Offsets of a bank's buffers in the workspace.
struct BankSpace {
  size_t x, even;  // `even` stands for `out` where that cannot hold float16
  size_t factor, spare;
  size_t end;
  bool brief;

  BankSpace(const NsBank& bank, int steps, const Tuning& tuning, size_t at) {
    const size_t matrix = static_cast<size_t>(bank.batch * bank.rows * bank.cols) * 2;
    const auto side = static_cast<size_t>(std::min(bank.rows, bank.cols));
    const size_t square = static_cast<size_t>(bank.batch) * side * side * 2;
    auto take = [&](bool needed, size_t bytes) {
      const size_t begin = at;
      if (needed) at += round_up(bytes);
      return begin;
    };
    x = take(true, matrix);
    even = take(bank.type == NsType::kFloat32, matrix);
    brief = takes_short_chain(bank, steps, tuning);
    factor = take(true, brief ? 3 * square : square);
    spare = take(!brief && takes_pairs(bank, steps) && !has_room_for_three(bank), square);
    end = at;
  }
};

inline Place place_of(const NsBank& bank, unsigned char* workspace, const BankSpace& space, int buffer) {
  auto at = [&](size_t offset) { return reinterpret_cast<__half*>(workspace + offset); };
  __half* out = bank.type == NsType::kFloat32 ? at(space.even) : static_cast<__half*>(bank.out);
  const int64_t size = bank.rows * bank.cols, side = std::min(bank.rows, bank.cols);
  if (buffer == kOut) return {out, size, bank.rows, bank.cols};
  if (buffer == kX) return {at(space.x), size, bank.rows, bank.cols};
  if (buffer == kFactor) return {at(space.factor), side * side, side, side};
  if (buffer == kSpare) return {at(space.spare), side * side, side, side};
  if (space.brief) {
    return {at(space.factor) + (buffer - kSquaresOut) % 3 * bank.batch * side * side, side * side, side,
            side};
  }
  __half* around = buffer < kSquaresX ? out : at(space.x);
  return {around + (buffer - kSquaresOut) % 3 * side * side, size, side, side};
}

// Where the products start from.
inline __half* first_x(const NsBank& bank, int steps, unsigned char* workspace, const BankSpace& space) {
  const bool in_out = (space.brief ? steps : segment_count(bank, steps)) % 2 == 0;
  return place_of(bank, workspace, space, in_out ? kOut : kX).first;
}

inline int64_t chunks_of(const NsBank& bank) { return (bank.rows * bank.cols + kChunk - 1) / kChunk; }

inline int counter_count(int64_t matrices) { return 2 * static_cast<int>(matrices) + 1; }

// The head of the workspace.
struct Words {
  float *partials, *sigma;
  uint32_t *done, *queue;  // counters
  size_t bytes;

  Words() = default;
  Words(unsigned char* workspace, const NsBank* banks, int count) {
    int64_t chunks = 0, matrices = 0;
    for (int i = 0; i < count; ++i) {
      chunks += banks[i].batch * std::max(chunks_of(banks[i]), int64_t{kPartsOfInput});
      matrices += banks[i].batch;
    }
    partials = reinterpret_cast<float*>(workspace);
    sigma = partials + 3 * chunks;
    done = reinterpret_cast<uint32_t*>(sigma + matrices);
    queue = done + 2 * matrices;
    bytes = round_up(static_cast<size_t>(4 * (3 * chunks + matrices + counter_count(matrices))));
  }
};

inline size_t words_bytes(const NsBank* banks, int count) { return Words(nullptr, banks, count).bytes; }

inline int tiles_of(int64_t extent, int tile) { return static_cast<int>((extent + tile - 1) / tile); }

// Writes one bank's chain of products.
class Chain {
 public:
  Chain(const NsBank& bank, unsigned char* workspace, const BankSpace& space, int first_map, int first_matrix,
        const Tuning& tuning)
      : bank_(bank),
        workspace_(workspace),
        space_(space),
        first_map_(first_map),
        first_matrix_(first_matrix),
        tuning_(tuning),
        small_(std::min(bank.rows, bank.cols)),
        large_(std::max(bank.rows, bank.cols)) {}

  std::vector<Product> run(const float (*table)[3], int steps) {
    const bool pairs = takes_pairs(bank_, steps);
    const int segments = segment_count(bank_, steps);
    int step = 0;
    for (int segment = 0; segment < segments; ++segment) {
      const int length = !pairs || (segment == 0 && steps % 2 == 1) ? 1 : 2;
      const uint8_t power = segment == 0 ? 1 : 0;
      const bool last = segment + 1 == segments;
      const Buffer to = space_.brief ? kOut : x_buffer(segments - segment - 1);
      const Buffer from = space_.brief ? (length == 1 ? kX : kOut) : x_buffer(segments - segment);
      const auto square = [&](int i) {
        return static_cast<Buffer>((to == kOut && !space_.brief ? kSquaresOut : kSquaresX) + i);
      };
      const Buffer r = square(0), z = square(1);
      const Buffer t = has_room_for_three(bank_) || space_.brief ? square(2) : kSpare;
      gram(from, r);
      if (length == 1) {
        const Buffer factor = space_.brief ? z : kFactor;
        polynomial(r, factor, table[step], power);
        update(factor, from, to, power, last);
      } else if (space_.brief) {
        polynomial(r, z, table[step], power);
        const uint32_t after_z = need_;
        small(r, z, t);
        product_beside(z, from, after_z);
        small(z, t, r);
        polynomial(r, t, table[step + 1], power, true);
        update(t, kX, to, power, last, true);
      } else {
        polynomial(r, z, table[step], power);
        small(r, z, t);
        small(z, t, r);
        polynomial(r, t, table[step + 1], power);
        small(t, z, kFactor);
        update(kFactor, from, to, power, last);
      }
      step += length;
    }
    return chain_;
  }

  // X after all but `left` segments: `out` and the workspace in turn, `out` last.
  static Buffer x_buffer(int left) { return left % 2 == 0 ? kOut : kX; }

 private:
  void add(Product p, int64_t rows, int64_t cols, int64_t depth, Buffer a, Buffer b, Buffer out, int chunk) {
    p.a = static_cast<uint8_t>(first_map_ + a + (p.layout != kColumnsColumns ? kTallBoxes : 0));
    p.b = static_cast<uint8_t>(first_map_ + b + (p.layout == kRowsRows ? kTallBoxes : 0));
    p.out = static_cast<uint8_t>(first_map_ + out);
    p.rows = static_cast<int>(rows);
    p.cols = static_cast<int>(cols);
    p.depth = tiles_of(depth, kBox);
    p.tall = p.depth > kTallDepth && rows >= 1024;
    p.spread = tuning_.spread && !p.tall;
    p.chunk = p.depth <= kASlots && !p.tall ? chunk : 1;
    p.panels = tiles_of(rows, p.tall ? 2 * kTile : kTile);
    p.across = tiles_of(cols, kTile);
    p.first_matrix = first_matrix_;
    if (!p.beside) p.need = p.waits_second ? second_need_ : need_;
    uint32_t& need = p.signals_second ? second_need_ : need_;
    for (int panel = 0; panel < p.panels; ++panel) {
      p.tasks += (tiles_in_panel(p, panel) + p.chunk - 1) / p.chunk;
      need += 2 * static_cast<uint32_t>(tiles_in_panel(p, panel));
      p.tiles += tiles_in_panel(p, panel) * (p.tall ? 2 : 1);
    }
    chain_.push_back(p);
  }

  void gram(Buffer x, Buffer r) {
    Product p{};
    p.alpha = 1.0f;
    p.layout = bank_.rows <= bank_.cols ? kRowsRows : kColumnsColumns;
    p.symmetric = true;
    p.type = NsType::kFloat16;
    add(p, small_, small_, large_, x, x, r, tuning_.small_chunk);
  }

  // out = a I + b r + c r^2 with the scale of r, sigma^-2, taken out.
  void polynomial(Buffer r, Buffer out, const float (&abc)[3], uint8_t power, bool signals_second = false) {
    Product p{};
    p.alpha = abc[2], p.beta = abc[1], p.gamma = abc[0];
    p.alpha_power = static_cast<uint8_t>(4 * power), p.beta_power = static_cast<uint8_t>(2 * power);
    p.layout = kRowsRows;
    p.symmetric = true;
    p.type = NsType::kFloat16;
    p.added = true;
    p.signals_second = signals_second;
    p.a_lower = p.b_lower = true;
    add(p, small_, small_, small_, r, r, out, 1);
  }

  // A product of polynomials of one symmetric matrix is symmetric.
  void small(Buffer a, Buffer b, Buffer out) {
    Product p{};
    p.alpha = 1.0f;
    p.layout = kRowsRows;
    p.symmetric = true;
    p.a_lower = p.b_lower = true;
    p.type = NsType::kFloat16;
    add(p, small_, small_, small_, a, b, out, tuning_.small_chunk);
  }

  // to = factor from, on the short side.
  void update(Buffer factor, Buffer from, Buffer to, uint8_t power, bool last, bool waits_second = false) {
    Product p{};
    p.alpha_power = power;
    p.type = last ? bank_.type : NsType::kFloat16;
    p.direct = static_cast<float*>(bank_.out);
    p.waits_second = waits_second;
    add_large(p, factor, from, to);
  }

  // Beside the products that follow z. The next update waits for it and for the last of those.
  void product_beside(Buffer z, Buffer x, uint32_t need) {
    Product p{};
    p.type = NsType::kFloat16;
    p.signals_second = p.beside = true;
    p.need = need;
    add_large(p, z, x, kX);
  }

  void add_large(Product p, Buffer factor, Buffer from, Buffer to) {
    const bool wide = bank_.rows <= bank_.cols;
    p.alpha = 1.0f;
    p.layout = wide ? kRowsColumns : kRowsRows;
    p.a_lower = wide, p.b_lower = !wide;
    add(p, bank_.rows, bank_.cols, small_, wide ? factor : from, wide ? from : factor, to,
        tuning_.update_chunk);
  }

  NsBank bank_;
  unsigned char* workspace_;
  BankSpace space_;
  int first_map_, first_matrix_;
  Tuning tuning_;
  int64_t small_, large_;
  uint32_t need_ = 0, second_need_ = 0;  // what the products so far bring the counters to
  std::vector<Product> chain_;
};

}  // namespace ns90
}  // namespace pgolf
