// What the roles of the kernel in newton_schulz_sm90_products.cuh share in shared memory, and the threads
// that feed it: one takes the tasks and loads A, one loads B.
#pragma once

#include <cuda.h>

#include "kernels/newton_schulz_sm90_plan.h"
#include "kernels/ptx.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"

namespace pgolf {
namespace ns90 {

constexpr int kTaskSlots = 4;
constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kGroupThreads = 128;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kConsumerRegisters = 232;  // they hold 128 sums
constexpr int kProducerRegisters = 40;
static_assert(registers_fit(kGroups, kConsumerRegisters, kProducerRegisters));
constexpr int kStagedPerGroup = 2;  // boxes on their way out
constexpr int kLanes = 32;

// What the kernel is launched with.
struct Plan {
  CUtensorMap maps[kMapCount];
  ProductQueue queue;
};
static_assert(sizeof(Plan) + sizeof(int) <= 32764, "kernel arguments of sm_70 and newer");

// What the multiplying warpgroups know of a task: `count` tiles of 128 rows (256 if tall) from `row` on.
struct Task {
  float* direct;                    // of the matrix; null: out through the tensor map
  float alpha, beta, gamma;         // with sigma
  int product;                      // negative: no more tasks
  int matrix, waits, signals, out;  // waits, signals: indices of counters
  int row, column, count;           // elements, elements, tiles
  int rows, cols, depth;
  uint32_t need;  // what the counter `waits` must have reached
  uint8_t b;      // tensor map
  Layout layout;
  bool symmetric, tall_tiles, shared_tile, added, same, bfloat16;  // same: A is B
  bool a_lower, b_lower;
};

__device__ __forceinline__ float power(float x, int n) {
  return n == 0 ? 1.0f : n == 1 ? x : n == 2 ? x * x : (x * x) * (x * x);
}

// What the task at `index` is; `run` as in find_tiles. One thread decodes for all roles.
__device__ Task decode(const Plan& plan, int index, int& run) {
  const ProductQueue& queue = plan.queue;
  const TaskTiles tiles = find_tiles(queue, index, run);
  const int matrix = tiles.matrix;
  const Product& p = queue.products[tiles.product];
  // sigma is written before this kernel starts; most products do not need it.
  const float sigma = p.alpha_power + p.beta_power > 0 ? queue.sigma[p.first_matrix + matrix] : 1.0f;
  Task task;
  task.direct = p.type == NsType::kFloat32 ? p.direct + int64_t{matrix} * p.rows * p.cols : nullptr;
  task.alpha = p.alpha * power(sigma, p.alpha_power);
  task.beta = p.beta * power(sigma, p.beta_power);
  task.gamma = p.gamma;
  task.product = tiles.product;
  task.matrix = matrix;
  task.out = p.out;
  task.waits = p.first_matrix + matrix + (p.waits_second ? queue.matrices : 0);
  task.signals = p.first_matrix + matrix + (p.signals_second ? queue.matrices : 0);
  task.row = tiles.panel * (p.tall_tiles ? 2 * kTile : kTile);
  task.column = tiles.column * kTile;
  task.count = min(tiles.left, p.chunk);
  task.rows = p.rows;
  task.cols = p.cols;
  task.depth = p.depth;
  task.layout = p.layout;
  task.symmetric = p.symmetric;
  task.tall_tiles = p.tall_tiles;
  // The last task of a panel may have fewer tiles than the others.
  task.shared_tile = p.shared_tile && task.count == 1;
  task.need = p.need;
  task.b = p.b;
  task.a_lower = p.a_lower;
  task.b_lower = p.b_lower;
  task.added = p.added;
  task.same = p.symmetric && p.a == p.b;
  task.bfloat16 = p.type == NsType::kBfloat16;
  return task;
}

// Whether the tile needs the same rows of the same matrix on both sides.
__device__ __forceinline__ bool operands_coincide(const Task& task, int column) {
  return task.same && !task.tall_tiles && column == task.row;
}

// Blocks of A among the last along k that hold the tile's part of C = A.
__device__ __forceinline__ int added_blocks(const Task& task, int column) {
  return task.added ? min(2, task.depth - column / kBox) : 0;
}

// The block of k from which on the 128 rows at `row` of a matrix of which only the lower tiles are stored lie
// in its columns.
__device__ __forceinline__ int mirrored_from(bool lower, int row) {
  constexpr int kNever = 1 << 24;
  return lower ? (row / kTile + 1) * (kTile / kBox) : kNever;
}

// The block of k that comes first: those that a tile adds, too, come last.
__device__ __forceinline__ int first_depth(const Task& task, int column) {
  const int after = column / kBox + 2;
  return task.added && after < task.depth ? after : 0;
}

// A staged box on its way out.
struct StoreJob {
  int map, row, column, matrix;
  int counter;  // to add `tiles` to when all of this group's boxes are stored; negative: not yet
  int tiles;
};
constexpr int kEnd = -1;  // in place of a map: no more jobs

// ---- Shared memory

constexpr int kAOffset = 0;
constexpr int kBOffset = kAOffset + kASlots * kSlotBytes;
constexpr int kStagedOffset = kBOffset + kBSlots * kSlotBytes;
constexpr int kBarrierOffset = kStagedOffset + kGroups * kStagedPerGroup * kBoxBytes;
constexpr int kPassedBarrier = 2 * (kASlots + kBSlots + kTaskSlots);  // one per group
constexpr int kStagedBarrier = kPassedBarrier + kGroups;
constexpr int kBarriers = kStagedBarrier + 2 * kGroups * kStagedPerGroup;
constexpr int kTaskOffset = kBarrierOffset + 8 * kBarriers;
static_assert(kTaskOffset % 8 == 0, "barriers and tasks are aligned");
constexpr int kJobOffset = kTaskOffset + kTaskSlots * static_cast<int>(sizeof(Task));
constexpr int kSharedBytes =
    kJobOffset + kGroups * kStagedPerGroup * static_cast<int>(sizeof(StoreJob)) + 1024;  // alignment
static_assert(kSharedBytes <= 232448, "more than a block of sm_90 can have");

// Ring of slots with a barrier for "filled" and one for "free"; `index` counts uses from 0, unsigned and with
// powers of two for slots because divisions in the loops cost more than the waits.
template <uint32_t Slots, int Offset, int FirstBarrier, int Bytes>
struct Ring {
  static_assert((Slots & (Slots - 1)) == 0, "slots are a power of two");
  __device__ __forceinline__ static uint32_t slot(uint32_t base, uint32_t index) {
    return base + Offset + index % Slots * Bytes;
  }
  __device__ __forceinline__ static uint32_t filled(uint32_t base, uint32_t index) {
    return base + kBarrierOffset + 8 * FirstBarrier + 8 * (index % Slots);
  }
  __device__ __forceinline__ static uint32_t free(uint32_t base, uint32_t index) {
    return filled(base, index) + 8 * Slots;
  }
  __device__ __forceinline__ static void wait_filled(uint32_t base, uint32_t index) {
    mbarrier_wait(filled(base, index), index / Slots & 1);
  }
  __device__ __forceinline__ static void wait_free(uint32_t base, uint32_t index) {
    mbarrier_wait(free(base, index), (index / Slots & 1) ^ 1);
  }
};
using RingA = Ring<kASlots, kAOffset, 0, kSlotBytes>;
using RingB = Ring<kBSlots, kBOffset, 2 * kASlots, kSlotBytes>;
using RingTask = Ring<kTaskSlots, kTaskOffset, 2 * (kASlots + kBSlots), static_cast<int>(sizeof(Task))>;
constexpr int kWarpsPerGroup = kGroupThreads / kLanes;
constexpr int kReleases = kGroups * kWarpsPerGroup;  // arrivals that free a slot

// "Filled"; "free" lies kGroups * kStagedPerGroup further.
__device__ __forceinline__ uint32_t staged_barrier(uint32_t base, uint32_t group, uint32_t box) {
  return base + kBarrierOffset + 8 * (kStagedBarrier + group * kStagedPerGroup + box);
}

__device__ __forceinline__ void init_barriers(uint32_t base) {
  // One arrival fills a slot, that of the feeding thread; the bytes of the copies count on the barrier, too.
  for (int i = 0; i < kASlots; ++i) {
    mbarrier_init(RingA::filled(base, i), 1);
    mbarrier_init(RingA::free(base, i), kReleases);
  }
  for (int i = 0; i < kBSlots; ++i) {
    mbarrier_init(RingB::filled(base, i), 1);
    mbarrier_init(RingB::free(base, i), kReleases);
  }
  for (int i = 0; i < kTaskSlots; ++i) {
    mbarrier_init(RingTask::filled(base, i), 1);
    // Every thread that has read a task arrives for itself: racecheck does not see that a warp's leader
    // arrives for its other lanes.
    mbarrier_init(RingTask::free(base, i), kGroups * kGroupThreads + 1);
  }
  for (int i = 0; i < kGroups; ++i)
    mbarrier_init(base + kBarrierOffset + 8 * (kPassedBarrier + i), kWarpsPerGroup);
  for (int i = 0; i < kGroups * kStagedPerGroup; ++i) {
    mbarrier_init(staged_barrier(base, 0, i), kWarpsPerGroup);
    mbarrier_init(staged_barrier(base, 0, i) + 8 * kGroups * kStagedPerGroup, 1);
  }
}

// ---- The feeding warps: one for A, which also takes the tasks, and one for B

// Position in a ring: slot and parity, kept apart because one thread has no time for divisions.
template <typename Ring, int Slots>
struct Cursor {
  int slot = 0;
  uint32_t parity = 1;
  // Fills the next slot, once free, with 128 rows (along k) or columns from `origin` on.
  __device__ __forceinline__ void load(uint32_t base, const CUtensorMap* map, bool along_k, int origin,
                                       int depth, int matrix) {
    const uint32_t filled = Ring::filled(base, 0) + 8 * slot, at = Ring::slot(base, 0) + slot * kSlotBytes;
    // parity starts at 1, so that the first use of each slot does not wait for a reader that never was.
    mbarrier_wait(filled + 8 * Slots, parity);
    mbarrier_expect_bytes(filled, kSlotBytes);
    if (along_k) {
      tma_load_3d(at, map, filled, depth, origin, matrix);
    } else {
      // 64 columns are 128 bytes, the width of the swizzle, so 128 columns take two boxes.
      tma_load_3d(at, map, filled, origin, depth, matrix);
      tma_load_3d(at + kBoxBytes, map, filled, origin + kBox, depth, matrix);
    }
    if (++slot == Slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

__device__ void feed_a(const Plan& plan, uint32_t base, char* shared, int tasks) {
  Cursor<RingA, kASlots> cursor;
  int run = 0;
  // The index of the next task is fetched while this one is fed, which hides the latency of the atomic.
  int next = static_cast<int>(atomicAdd(plan.queue.next, 1u));
  for (uint32_t n = 0;; ++n) {
    const int task_index = next;
    RingTask::wait_free(base, n);
    Task* slot = reinterpret_cast<Task*>(shared + kTaskOffset) + n % kTaskSlots;
    if (task_index >= tasks) {
      // Every role sees the end in its turn: what was taken before is finished first.
      slot->product = -1;
      mbarrier_arrive(RingTask::filled(base, n), 1);
      return;
    }
    next = static_cast<int>(atomicAdd(plan.queue.next, 1u));
    const Task task = decode(plan, task_index, run);
    // The other roles learn of the task before its operands are there: B's thread waits for the flag itself.
    *slot = task;
    mbarrier_arrive(RingTask::filled(base, n), 1);
    const CUtensorMap* map = plan.maps + plan.queue.products[task.product].a;
    const bool along_k = task.layout != kColumnsColumns;
    wait_for(plan.queue.done + task.waits, task.need);
    int k = first_depth(task, task.column) * kBox;
    const int end = task.depth * kBox;
    for (int step = 0; step < task.depth; ++step) {
      // A tall tile takes two slots per block of k, one for each group.
      for (int row = task.row; row <= task.row + (task.tall_tiles ? kTile : 0); row += kTile) {
        // Above the diagonal's tiles nothing is stored: the same rows are read as columns, by the map with
        // boxes of 64 rows, which lies kFirstTallMap before the other.
        const bool mirrored = k >= kBox * mirrored_from(task.a_lower, row);
        cursor.load(base, mirrored ? map - kFirstTallMap : map, along_k && !mirrored, row, k, task.matrix);
      }
      k += kBox;
      if (k == end) k = 0;
    }
  }
}

__device__ void feed_b(const Plan& plan, uint32_t base, const char* shared) {
  Cursor<RingB, kBSlots> cursor;
  for (uint32_t n = 0;; ++n) {
    RingTask::wait_filled(base, n);
    // A copy, so that the slot can be refilled while this task is fed.
    const Task task = reinterpret_cast<const Task*>(shared + kTaskOffset)[n % kTaskSlots];
    mbarrier_arrive(RingTask::free(base, n), 1);
    if (task.product < 0) return;
    const CUtensorMap* map = plan.maps + task.b;
    const bool along_k = task.layout == kRowsRows;
    wait_for(plan.queue.done + task.waits, task.need);
    const int end = task.depth * kBox;
    for (int tile = 0; tile < task.count; ++tile) {
      const int column = task.column + tile * kTile;
      // Where B is A the multiplying groups read A's slots for both.
      if (operands_coincide(task, column)) continue;
      int k = first_depth(task, column) * kBox;
      for (int step = 0; step < task.depth; ++step) {
        const bool mirrored = k >= kBox * mirrored_from(task.b_lower, column);
        cursor.load(base, mirrored ? map - kFirstTallMap : map, along_k && !mirrored, column, k, task.matrix);
        k += kBox;
        if (k == end) k = 0;
      }
    }
  }
}

}  // namespace ns90
}  // namespace pgolf
