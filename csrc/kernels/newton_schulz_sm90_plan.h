// The products that newton_schulz_sm90 runs, for each matrix in order, and the buffers that they move between.
// Host code, and the structures that it hands to the kernels.
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
inline constexpr int kMaxBanks = 8;
inline constexpr int kMaxProducts = 200;  // of all banks of a launch; 10 steps of one bank are at most 35
inline constexpr int kMapsPerBank = 5;
inline constexpr int kAlignment = 256;  // bytes, of each buffer in the workspace
inline constexpr int kCastThreads = 256;
inline constexpr int kChunk = kCastThreads * 8 * 4;  // elements that a block of the normalising kernels takes

enum Layout : uint8_t { kRowsRows, kRowsColumns, kColumnsColumns };  // A B^T, A B, A^T B
enum Buffer : uint8_t { kOut, kX, kR, kZ, kT };

// out = alpha sigma^alpha_power A B + beta sigma^beta_power C + gamma I, for each matrix of a bank.
struct Product {
  float alpha, beta, gamma;
  uint8_t alpha_power, beta_power;
  Layout layout;
  bool symmetric;       // only blocks of 64 on and below the diagonal are stored, with their mirror images
  bool tall;            // tiles of 256x128
  uint8_t a, b, out;    // tensor maps
  NsType type;          // of out
  const __half* c;      // (batch, rows, cols), or null
  float* direct;        // out where its type is float32
  int rows, cols;
  int depth;            // blocks of 64 along k
  int chunk;            // tiles of a row panel in one task
  int panels, across;   // tiles down and across
  int tasks;            // per matrix
  int first_task, first_matrix;
  uint32_t need;        // the matrix' counter before this product may start
};

struct Plan {
  CUtensorMap maps[kMaxBanks * kMapsPerBank];
  Product products[kMaxProducts];
  int product_count;
  const float* sigma;   // per matrix
  uint32_t* done;       // per matrix: two for each stored tile
  uint32_t* queue;
};

struct Task {
  int product, matrix, panel, column, count;  // tiles `column` .. `column + count - 1` of row panel `panel`
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
  bool grouped;                   // one launch for each rank of products instead of one for all
};

// Pairs of steps where the matrix is long enough that products on the short side are cheaper.
inline bool takes_pairs(const NsBank& bank, int steps) {
  return steps >= 2 && 4 * std::max(bank.rows, bank.cols) >= 5 * std::min(bank.rows, bank.cols);
}

inline int segment_count(const NsBank& bank, int steps) { return takes_pairs(bank, steps) ? (steps + 1) / 2 : steps; }

// Offsets of a bank's buffers in the workspace.
struct BankSpace {
  size_t x[2];  // the second only where `out` cannot hold float16
  size_t small[3];
  size_t end;

  BankSpace(const NsBank& bank, int steps, size_t at) {
    const size_t matrix = static_cast<size_t>(bank.batch * bank.rows * bank.cols) * 2;
    const auto side = static_cast<size_t>(std::min(bank.rows, bank.cols));
    const size_t square = static_cast<size_t>(bank.batch) * side * side * 2;
    auto take = [&](size_t bytes) {
      const size_t begin = at;
      at += round_up(bytes);
      return begin;
    };
    x[0] = take(matrix);
    x[1] = bank.type == NsType::kFloat32 ? take(matrix) : 0;
    small[0] = take(square);
    small[1] = take(square);
    small[2] = takes_pairs(bank, steps) ? take(square) : 0;
    end = at;
  }
};

inline int64_t chunks_of(const NsBank& bank) { return (bank.rows * bank.cols + kChunk - 1) / kChunk; }

// Matrices' words: partial sums, sigma, counters, queues.
inline size_t words_bytes(const NsBank* banks, int count) {
  size_t blocks = 0, matrices = 0;
  for (int i = 0; i < count; ++i) {
    blocks += static_cast<size_t>(banks[i].batch * chunks_of(banks[i]));
    matrices += static_cast<size_t>(banks[i].batch);
  }
  return round_up(4 * (3 * blocks + 2 * matrices + kMaxProducts));
}

inline int tiles_of(int64_t extent, int tile) { return static_cast<int>((extent + tile - 1) / tile); }

// A product with its place in the order of the queue.
struct Ranked {
  Product product;
  int rank;         // position among its matrix' products
  double progress;  // share of the matrix' work before it
  int64_t batch;
};

// Writes one bank's chain of products.
class Chain {
 public:
  Chain(const NsBank& bank, unsigned char* workspace, const BankSpace& space, int first_map, int first_matrix,
        const Tuning& tuning)
      : bank_(bank), first_map_(first_map), first_matrix_(first_matrix), tuning_(tuning) {
    small_ = std::min(bank.rows, bank.cols);
    large_ = std::max(bank.rows, bank.cols);
    for (int i = 0; i < 3; ++i) squares_[i] = reinterpret_cast<__half*>(workspace + space.small[i]);
  }

  std::vector<Ranked> run(const float (*table)[3], int steps) {
    const bool pairs = takes_pairs(bank_, steps);
    const int segments = segment_count(bank_, steps);
    int step = 0;
    for (int segment = 0; segment < segments; ++segment) {
      const int length = !pairs || (segment == 0 && steps % 2 == 1) ? 1 : 2;
      const uint8_t power = segment == 0 ? 1 : 0;
      const Buffer from = x_buffer(segments - segment), to = x_buffer(segments - segment - 1);
      gram(from);
      polynomial(kR, kZ, table[step], power);
      Buffer factor = kZ;
      if (length == 2) {
        small(kR, kZ, kT);
        small(kZ, kT, kR);
        polynomial(kR, kT, table[step + 1], power);
        small(kT, kZ, kR);
        factor = kR;
      }
      update(factor, from, to, power, segment + 1 == segments);
      step += length;
    }
    double total = 0.0;
    for (const Ranked& ranked : chain_) total += cost(ranked.product);
    double before = 0.0;
    for (Ranked& ranked : chain_) {
      ranked.progress = before / total;
      before += cost(ranked.product);
    }
    return chain_;
  }

  // X after all but `left` segments: `out` and the workspace in turn, `out` last.
  Buffer x_buffer(int left) const {
    if (bank_.type == NsType::kFloat32) return left % 2 == 0 ? kOut : kX;
    return left % 2 == 0 ? kOut : kX;
  }

 private:
  // What one tile takes, in blocks of k; 6 stand for its latency.
  static double cost(const Product& p) { return p.depth + 6.0; }

  void add(Product p, int64_t rows, int64_t cols, int64_t depth, Buffer a, Buffer b, Buffer out, int chunk) {
    p.a = static_cast<uint8_t>(first_map_ + a);
    p.b = static_cast<uint8_t>(first_map_ + b);
    p.out = static_cast<uint8_t>(first_map_ + out);
    p.rows = static_cast<int>(rows);
    p.cols = static_cast<int>(cols);
    p.depth = tiles_of(depth, kBox);
    p.tall = p.depth > kASlots && rows >= 1024;
    p.chunk = p.depth <= kASlots && !p.tall ? chunk : 1;
    p.panels = tiles_of(rows, p.tall ? 2 * kTile : kTile);
    p.across = tiles_of(cols, kTile);
    p.first_matrix = first_matrix_;
    p.need = need_;
    for (int panel = 0; panel < p.panels; ++panel) {
      p.tasks += (tiles_in_panel(p, panel) + p.chunk - 1) / p.chunk;
      need_ += 2 * static_cast<uint32_t>(tiles_in_panel(p, panel));
    }
    chain_.push_back({p, static_cast<int>(chain_.size()), 0.0, bank_.batch});
  }

  void gram(Buffer x) {
    Product p{};
    p.alpha = 1.0f;
    p.layout = bank_.rows <= bank_.cols ? kRowsRows : kColumnsColumns;
    p.symmetric = true;
    p.type = NsType::kFloat16;
    add(p, small_, small_, large_, x, x, kR, tuning_.small_chunk);
  }

  // out = a I + b r + c r^2 with the scale of r, sigma^-2, taken out.
  void polynomial(Buffer r, Buffer out, const float (&abc)[3], uint8_t power) {
    Product p{};
    p.alpha = abc[2], p.beta = abc[1], p.gamma = abc[0];
    p.alpha_power = static_cast<uint8_t>(4 * power), p.beta_power = static_cast<uint8_t>(2 * power);
    p.layout = kRowsRows;
    p.symmetric = true;
    p.type = NsType::kFloat16;
    p.c = squares_[r - kR];
    add(p, small_, small_, small_, r, r, out, tuning_.small_chunk);
  }

  // A product of polynomials of one symmetric matrix is symmetric.
  void small(Buffer a, Buffer b, Buffer out) {
    Product p{};
    p.alpha = 1.0f;
    p.layout = kRowsRows;
    p.symmetric = true;
    p.type = NsType::kFloat16;
    add(p, small_, small_, small_, a, b, out, tuning_.small_chunk);
  }

  void update(Buffer factor, Buffer from, Buffer to, uint8_t power, bool last) {
    Product p{};
    p.alpha = 1.0f;
    p.alpha_power = power;
    const bool wide = bank_.rows <= bank_.cols;
    p.layout = wide ? kRowsColumns : kRowsRows;
    p.type = last ? bank_.type : NsType::kFloat16;
    p.direct = static_cast<float*>(bank_.out);
    add(p, bank_.rows, bank_.cols, small_, wide ? factor : from, wide ? from : factor, to, tuning_.update_chunk);
  }

  NsBank bank_;
  int first_map_, first_matrix_;
  Tuning tuning_;
  int64_t small_, large_;
  const __half* squares_[3];
  uint32_t need_ = 0;
  std::vector<Ranked> chain_;
};

}  // namespace ns90
}  // namespace pgolf
