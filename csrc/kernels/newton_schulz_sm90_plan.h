// What the host plans (newton_schulz_sm90_schedule.h) and the kernel carries out
// (newton_schulz_sm90_products.cuh): for each matrix a chain of products, cut into tasks, and one queue of
// the tasks of all matrices. Plain structures for both sides, without CUDA headers.
#pragma once

#include "kernels/newton_schulz_sm90.h"

namespace pgolf {
namespace ns90 {

inline constexpr int kBox = 64;  // side of the blocks that the copy engine moves, elements
inline constexpr int kBoxBytes = 2 * kBox * kBox;
inline constexpr int kTile = 128;                 // side of an output tile, elements
inline constexpr int kSlotBytes = 2 * kBoxBytes;  // 128 x 64 elements of an operand
inline constexpr int kASlots = 8, kBSlots = 4;    // slots of the two operands in shared memory
inline constexpr int kMaxBanks = kNsMaxBanks;
inline constexpr int kMaxProducts = 144;  // of all banks of a launch; one bank has at most 35
inline constexpr int kMaxRuns = 480;      // as many as the limit of a kernel's arguments leaves room for
inline constexpr int kCastThreads = 256;
inline constexpr int kChunk = kCastThreads * 8 * 4;  // elements of a block of the normalising kernels

enum Layout : uint8_t { kRowsRows, kRowsColumns, kColumnsColumns };  // A B^T, A B, A^T B

// The buffers of a bank. X moves between kOut (`out` of the bank, where that can hold float16) and kX. The
// squares R, Z and T of a matrix lie where its next X will be written, as far as they fit there. The product
// that writes this X reads kFactor, which therefore lies apart. kSpare also lies apart; it takes T where only
// two squares fit. In short chains X stays in kOut, the product off the chain goes to kX, and all squares lie
// apart, in the place of kSquaresX.
enum Buffer : uint8_t { kOut, kX, kSquaresOut, kSquaresX = kSquaresOut + 3, kFactor = kSquaresX + 3, kSpare };
inline constexpr int kMapsPerBank = kSpare + 1;
// Each buffer has two maps: with boxes of 64 rows, and from kFirstTallMap on with boxes of 128 rows.
inline constexpr int kFirstTallMap = kMaxBanks * kMapsPerBank;
inline constexpr int kMapCount = 2 * kFirstTallMap;

// out = alpha sigma^alpha_power A B + beta sigma^beta_power C + gamma I, for each matrix of a bank.
struct Product {
  float alpha, beta, gamma;
  uint8_t alpha_power, beta_power;
  Layout layout;
  bool symmetric;         // only tiles on and below the diagonal are computed and stored
  bool tall_tiles;        // tiles of 256 x 128 elements instead of 128 x 128
  bool shared_tile;       // the two warpgroups share a task of one tile: latency before throughput
  uint8_t a, b, out;      // indices of tensor maps
  NsType type;            // of out
  bool added;             // C is A; else there is no C
  bool a_lower, b_lower;  // symmetric, with only the tiles on and below the diagonal in memory
  bool waits_second, signals_second;  // which of the matrix's two counters
  bool off_chain;                     // the next product does not need it, nor does it need the one before
  float* direct;                      // out where its type is float32
  int rows, cols;                     // elements, of out
  int depth;                          // blocks of 64 elements along k
  int chunk;                          // tiles of a row panel in one task
  int panels, across;                 // tiles down and across
  int tasks, tiles;                   // per matrix; tiles of 128 x 128 elements
  int first_matrix;                   // of the bank, among all matrices of the launch
  uint32_t need;                      // what the counter must have reached before this product may start
};

// Consecutive tasks: one product of some matrices of its bank, from `first_matrix` of the bank on.
struct TaskRun {
  int first_task;
  uint32_t first_matrix : 24, product : 8;
};
static_assert(kMaxProducts <= 256, "a run names its product in 8 bits");

// The tasks of one launch, in the order in which blocks take them.
struct ProductQueue {
  Product products[kMaxProducts];
  TaskRun runs[kMaxRuns];
  int run_count, matrices;
  const float* sigma;  // one per matrix
  uint32_t* done;      // (2, matrices) counters of stored tiles: each tile counts 2
  uint32_t* next;      // index of the task that is taken next
};

// Output tiles of a row panel.
PGOLF_HOST_DEVICE inline int tiles_in_panel(const Product& p, int panel) {
  const int reach = (panel + 1) * (p.tall_tiles ? 2 : 1);
  return p.symmetric && reach < p.across ? reach : p.across;
}

PGOLF_HOST_DEVICE inline int tasks_in_panel(const Product& p, int panel) {
  return (tiles_in_panel(p, panel) + p.chunk - 1) / p.chunk;
}

// Which output tiles a task computes: those of a row panel from tile `column` on. `left` of them are left in
// the panel; a task takes at most Product::chunk.
struct TaskTiles {
  int product;
  int matrix;  // of the bank
  int panel, column, left;
};

// The tiles of task `index`. `run` is the run of an earlier task, and becomes that of this one.
PGOLF_HOST_DEVICE inline TaskTiles find_tiles(const ProductQueue& queue, int index, int& run) {
  while (run + 1 < queue.run_count && index >= queue.runs[run + 1].first_task) ++run;
  const auto product = static_cast<int>(queue.runs[run].product);
  const Product& p = queue.products[product];
  // Within a run the tasks of a matrix are consecutive.
  const int local = index - queue.runs[run].first_task;
  const int before = local / p.tasks;
  const int matrix = static_cast<int>(queue.runs[run].first_matrix) + before;
  int left = local - before * p.tasks;
  // The longest panels of a symmetric product come first.
  int panel = p.panels - 1;
  for (;; --panel) {
    const int tasks = tasks_in_panel(p, panel);
    if (left < tasks) break;
    left -= tasks;
  }
  const int column = left * p.chunk;
  return {product, matrix, panel, column, tiles_in_panel(p, panel) - column};
}

}  // namespace ns90
}  // namespace pgolf
