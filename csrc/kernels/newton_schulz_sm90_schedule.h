// Host side of newton_schulz_sm90: where its buffers lie, which products each matrix needs, and in what order
// their tasks are queued. No CUDA headers, so that csrc/tests can check it without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/newton_schulz_sm90_plan.h"

namespace pgolf {
namespace ns90 {

// How the work of a launch is cut.
struct Tuning {
  int chunk;          // tiles of a task
  bool shared_tile;   // the two warpgroups share a tile
  bool short_chains;  // fewer products that wait for each other, for more work
};

// Tiles of a task, and the length of the chains, for a device with so many multiprocessors.
Tuning tune(const NsBank* banks, int count, int multiprocessors);

// Whether the counters and indices of a launch can hold a bank of this shape, and the copy engine its rows.
bool shape_fits(const NsBank& bank);

// How many of the banks, from the first on, one launch takes; at least one.
int banks_of_launch(const NsBank* banks, int count, int steps);

// Blocks of the normalising kernels per matrix.
int64_t chunks_of(const NsBank& bank);

// Where the matrices of one buffer of a bank lie.
struct BufferLayout {
  bool in_output;      // in the bank's `out`, else in the workspace
  size_t offset;       // of the first matrix, bytes
  int64_t stride;      // from one matrix to the next, elements
  int64_t rows, cols;  // of a matrix, elements
};

// A bank's part of the workspace. Offsets are in bytes from the start of the workspace.
struct BankLayout {
  size_t x;
  size_t half_out;  // stands for `out` where that is float32
  size_t factor, spare;
  bool short_chain;
  bool has_spare;
  bool starts_in_out;  // the first X lies in kOut, else in kX
};

// The workspace of one launch.
struct WorkspaceLayout {
  size_t partials, sigma, counters;  // float32, float32 and uint32; bytes from the start
  int matrices;
  int counter_count;  // two per matrix, and the head of the queue
  size_t bytes;       // of the whole workspace
  BankLayout banks[kMaxBanks];

  WorkspaceLayout(const NsBank* banks, int count, int steps, const Tuning& tuning);
};

// Whether a product of the bank may name the buffer.
bool has_buffer(const NsBank& bank, const BankLayout& layout, int buffer);

BufferLayout find_buffer(const NsBank& bank, const BankLayout& layout, int buffer);

// Fills the products, runs and sizes of `queue` (not its pointers) for the banks of one launch; returns the
// number of tasks. `table` holds (a, b, c) per iteration.
int schedule(const NsBank* banks, int count, const float (*table)[3], int steps,
             const WorkspaceLayout& layout, const Tuning& tuning, int multiprocessors, ProductQueue& queue);

}  // namespace ns90
}  // namespace pgolf
