// The kernel of newton_schulz_sm90 that runs every product of every matrix.
//
// It is persistent. The tasks (one or more 128x128 tiles of one product of one matrix) lie in a queue in an
// order in which every task follows those that it needs. Blocks take tasks from the head of the queue, so the
// oldest unfinished task can always run, whatever is resident. A task waits until a counter of its matrix
// says that all tiles of the products that it needs are stored. Two threads feed operands through shared
// memory with the copy engine, two warpgroups multiply, and one warp per warpgroup stores.
//
// What bounds it on an H100 (docs/findings.md, 2026-11-28): with 66 matrices the connection between the two
// halves of the L2 cache, which is 94 % busy; with ten matrices the length of the chain of products.
#pragma once

#include "kernels/newton_schulz_sm90_feed.cuh"

namespace pgolf {
namespace ns90 {

// ---- The multiplying warpgroups

// Where the operands of a warpgroup's part of a tile lie in the rings.
struct Operands {
  uint32_t a_index, a_stride;  // first use of ring A and the step per block of k
  uint32_t a_offset;           // bytes, of the group's rows within a slot
  uint32_t a_releases;  // arrivals of each warp when it has read a slot of A; 0: a later tile needs the slot
  uint32_t b_index, b_releases;
  bool diagonal;     // B is A
  uint32_t a_other;  // step from our slot of A to the other group's; 0: they are the same
  int depth;
  uint32_t passed;             // barrier to arrive at when the last slot is filled; 0: none
  int held;                    // last blocks of k whose slots of A stay until finish() has read them
  int first;                   // block of k that comes first
  int a_mirrored, b_mirrored;  // see mirrored_from
};

__device__ __forceinline__ void release_a(uint32_t base, const Operands& slots, uint32_t index) {
  if (slots.a_releases) mbarrier_arrive(RingA::free(base, index), slots.a_releases);
  if (slots.a_other) mbarrier_arrive(RingA::free(base, index + slots.a_other), slots.a_releases);
}

// The low half of wgmma_descriptor(shared), to which sixteenths of bytes can be added; the high half is
// constant.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t shared) {
  return static_cast<uint32_t>(wgmma_descriptor(shared));
}
__device__ __forceinline__ uint64_t descriptor_of(uint32_t low) {
  return (wgmma_descriptor(0) >> 32 << 32) | low;
}

// Opaque to the compiler, which otherwise waits for the products where control flow joins.
__device__ __forceinline__ void set_zero(float (&sum)[64]) {
  PGOLF_UNROLL
  for (int i = 0; i < 64; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sum[i]));
}

// Adds blocks `from` to `to` - 1 of k, in the order of the rings.
template <int Rows, bool AAlongK, bool BAlongK>
__device__ __forceinline__ void multiply(float (&sum)[2][64], uint32_t base, const Operands& slots, int from,
                                         int to) {
  const bool leader = threadIdx.x % kLanes == 0;
  // Only the low halves of descriptors change, in sixteenths of bytes: the loop adds 32-bit numbers.
  const uint32_t low_a = descriptor_low(RingA::slot(base, 0)), low_b = descriptor_low(RingB::slot(base, 0));
  const uint32_t mine = slots.a_offset >> 4;
  uint32_t a = slots.a_index + from * slots.a_stride, b = slots.b_index + from;
#pragma unroll 1
  for (int k = from; k < to; ++k) {
    RingA::wait_filled(base, a);
    // A parity tells a phase from the next only, so neither group may skip a use of a slot.
    if (slots.a_other) RingA::wait_filled(base, a + slots.a_other);
    if (!slots.diagonal) RingB::wait_filled(base, b);
    if (k + 1 == slots.depth && slots.passed && leader) mbarrier_arrive(slots.passed, 1);
    const uint32_t at_a = low_a + a % kASlots * (kSlotBytes >> 4);
    const uint32_t at_b = slots.diagonal ? at_a : low_b + b % kBSlots * (kSlotBytes >> 4);
    wgmma_fence();
    PGOLF_UNROLL
    for (int depth = 0; depth < kBox / 16; ++depth) {
      constexpr uint32_t kAStep = (AAlongK ? 32 : 2048) >> 4, kBStep = (BAlongK ? 32 : 2048) >> 4;
      PGOLF_UNROLL
      for (int i = 0; i < Rows; ++i) {
        wgmma_64x128x16<AAlongK, BAlongK>(sum[i],
                                          descriptor_of(at_a + mine + depth * kAStep + (i * kBoxBytes >> 4)),
                                          descriptor_of(at_b + depth * kBStep), 1, __half{});
      }
    }
    wgmma_commit();
    if (k > from) {
      // All but the newest group are done: the slots of block k - 1 have been read. One group stays under
      // way, so that the tensor cores do not wait for this bookkeeping.
      wgmma_wait<1>();
      if (leader) {
        // The last blocks of A may hold C, too: finish() reads them and lets go of them.
        if (k - 1 + slots.held < slots.depth) release_a(base, slots, a - slots.a_stride);
        if (!slots.diagonal) mbarrier_arrive(RingB::free(base, b - 1), slots.b_releases);
      }
    }
    a += slots.a_stride;
    ++b;
  }
  wgmma_wait<0>();
  // Without this the compiler may move reads of the sums before the wait.
  PGOLF_UNROLL
  for (int i = 0; i < Rows; ++i) wgmma_keep_order(sum[i]);
  if (leader) {
    if (to - 1 + slots.held < slots.depth) release_a(base, slots, a - slots.a_stride);
    if (!slots.diagonal) mbarrier_arrive(RingB::free(base, b - 1), slots.b_releases);
  }
}

// One loop for each layout: with a branch around the products ptxas commits an empty group, and wgmma_wait<1>
// then waits for the group that was just issued (docs/findings.md, 2026-11-23).
__device__ __forceinline__ void multiply(float (&sum)[2][64], int blocks, Layout layout, uint32_t base,
                                         const Operands& slots, int from, int to) {
  if (blocks == 2) {
    // A shared tile: 64 rows for each warpgroup, one product per step of k instead of two.
    if (layout == kRowsRows) {
      multiply<1, true, true>(sum, base, slots, from, to);
    } else if (layout == kRowsColumns) {
      multiply<1, true, false>(sum, base, slots, from, to);
    } else {
      multiply<1, false, false>(sum, base, slots, from, to);
    }
  } else if (layout == kRowsRows) {
    multiply<2, true, true>(sum, base, slots, from, to);
  } else if (layout == kRowsColumns) {
    multiply<2, true, false>(sum, base, slots, from, to);
  } else {
    multiply<2, false, false>(sum, base, slots, from, to);
  }
}

// All blocks of k, in runs of the same layout.
__device__ __forceinline__ void multiply_runs(float (&sum)[2][64], int blocks, Layout layout, uint32_t base,
                                              const Operands& slots) {
  set_zero(sum[0]);
  set_zero(sum[1]);
  // The order of k starts at slots.first and goes on at 0. A run ends where an operand changes from rows
  // along k to its mirror image, which lies along columns, or where k starts again.
  int k = slots.first;
#pragma unroll 1
  for (int from = 0; from < slots.depth;) {
    int end = slots.depth;
    if (k < slots.a_mirrored) end = min(end, slots.a_mirrored);
    if (k < slots.b_mirrored) end = min(end, slots.b_mirrored);
    const int to = min(slots.depth, from + end - k);
    const bool a_along = layout != kColumnsColumns && k < slots.a_mirrored;
    const bool b_along = layout == kRowsRows && k < slots.b_mirrored;
    // A^T B^T comes only above the diagonal, where a tall task drops what it computes.
    const Layout here = b_along ? kRowsRows : a_along ? kRowsColumns : kColumnsColumns;
    multiply(sum, blocks, here, base, slots, from, to);
    k = end == slots.depth ? 0 : end;
    from = to;
  }
}

// ---- A storing warp for each warpgroup

__device__ void store_jobs(const Plan& plan, uint32_t base, const char* shared, int group) {
  for (uint32_t n = 0;; ++n) {
    // The boxes are filled in turn, so their order is that of the jobs.
    const uint32_t box = group * kStagedPerGroup + n % kStagedPerGroup;
    const uint32_t filled = staged_barrier(base, group, n % kStagedPerGroup);
    mbarrier_wait(filled, n / kStagedPerGroup & 1);
    const StoreJob job = reinterpret_cast<const StoreJob*>(shared + kJobOffset)[box];
    if (job.map == kEnd) return;
    tma_store(plan.maps + job.map, base + kStagedOffset + box * kBoxBytes, job.column, job.row, job.matrix);
    tma_store_commit();
    // The box may be filled again once it has been read; the write to memory may still be under way.
    tma_store_wait_read<0>();
    mbarrier_arrive(filled + 8 * kGroups * kStagedPerGroup, 1);
    if (job.counter < 0) continue;
    // The counter tells other blocks that these tiles are in memory: all stores of this thread must be
    // complete, and ordered before the release, which the copy engine's proxy does not do by itself.
    tma_store_wait();
    fence_proxy();
    release_add(plan.queue.done + job.counter, job.tiles);
  }
}

// A warpgroup's way out: registers, a swizzled box in shared memory, the copy engine.
struct Writer {
  uint32_t base;
  char* shared;
  int group;
  uint32_t jobs = 0, waiting = 0;  // handed over, filled since

  // Read again at each use: a register held through the products would be spilled.
  __device__ __forceinline__ static uint32_t thread() { return threadIdx.x % kGroupThreads; }

  // The next box, once it is free.
  __device__ __forceinline__ uint32_t open(const StoreJob& job) {
    if (waiting == kStagedPerGroup) hand_over();
    const uint32_t n = jobs + waiting++, box = n % kStagedPerGroup;
    // The storing warp frees a box when the copy engine has read it.
    mbarrier_wait(staged_barrier(base, group, box) + 8 * kGroups * kStagedPerGroup,
                  (n / kStagedPerGroup & 1) ^ 1);
    if (thread() == 0) reinterpret_cast<StoreJob*>(shared + kJobOffset)[group * kStagedPerGroup + box] = job;
    return base + kStagedOffset + (group * kStagedPerGroup + box) * kBoxBytes;
  }

  // One fence for all boxes that wait: fences and barriers take longer than what fills a box.
  __device__ __forceinline__ void hand_over() {
    // The copy engine reads through another proxy: each lane's writes to the box come before the arrival.
    fence_proxy_shared();
    __syncwarp();
    for (uint32_t end = jobs + waiting; jobs != end; ++jobs) {
      if (thread() % kLanes == 0) mbarrier_arrive(staged_barrier(base, group, jobs % kStagedPerGroup), 1);
    }
    waiting = 0;
  }

  // A 64x64 block of which v[4 j ..] are eight columns j as wgmma_64x128x16 leaves them.
  template <bool Mirror>
  __device__ __forceinline__ void store(const uint32_t (&v)[16], const StoreJob& job) {
    const uint32_t lane = thread() % kLanes, warp = thread() / kLanes;
    const uint32_t at = open(job);
    // Rows of the box are 128 bytes, and its 16-byte chunks are swizzled as the copy engine expects them:
    // chunk c of row r lies at c ^ r % 8, so that the eight rows of a store hit different banks.
    PGOLF_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint32_t r = Mirror ? (2 * q + lane / 16) * 8 + lane % 8 : warp * 16 + lane % 16;
      const uint32_t chunk = Mirror ? warp * 2 + lane / 8 % 2 : 2 * q + lane / 16;
      stmatrix_x4<Mirror>(at + r * 128 + ((chunk ^ r % 8) << 4), v[4 * q], v[4 * q + 1], v[4 * q + 2],
                          v[4 * q + 3]);
    }
  }
};

// A warpgroup's part of an output tile: `blocks` blocks of 64x64, two across.
struct OutputPart {
  int row, column;  // the first, elements
  int blocks;       // 2 or 4
  int tiles;        // what the counter gets when all are stored
};

// sum = alpha sum + beta C, where the slots of A that wait for this hold C.
__device__ __forceinline__ void add_operand(float (&sum)[2][64], int blocks, uint32_t base,
                                            const Operands& slots, float alpha, float beta, int lane,
                                            int warp) {
  PGOLF_UNROLL
  for (int half = 0; half < 2; ++half) {
    // C is A, and first_depth() has put the blocks of k that hold this tile's columns last, so that C is
    // still in the ring: loading C apart took 33,000 of 41,000 clocks of a tile (docs/findings.md,
    // 2026-11-23).
    const uint32_t from = slots.a_index + (slots.depth - slots.held + half) * slots.a_stride;
    const uint32_t r = warp * 16 + lane % 16;
    const uint32_t box = RingA::slot(base, from) + slots.a_offset + r * 128;
    PGOLF_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (2 * i >= blocks) continue;
      float* v = &sum[i][half * 32];
      if (alpha != 1.0f) {  // only polynomials and first updates have another
        PGOLF_UNROLL
        for (int q = 0; q < 32; ++q) v[q] *= alpha;
      }
      if (half >= slots.held) continue;
      PGOLF_UNROLL
      for (int q = 0; q < 4; ++q) {
        uint32_t bits[4];
        ldmatrix_x4<false>(bits, box + i * kBoxBytes + (((2 * q + lane / 16) ^ r % 8) << 4));
        PGOLF_UNROLL
        for (int l = 0; l < 4; ++l) {
          const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&bits[l]));
          v[8 * q + 2 * l] = fmaf(beta, pair.x, v[8 * q + 2 * l]);
          v[8 * q + 2 * l + 1] = fmaf(beta, pair.y, v[8 * q + 2 * l + 1]);
        }
      }
    }
    if (half < slots.held) {
      // All lanes have read the slot before one of them lets go of it.
      __syncwarp();
      if (lane == 0) release_a(base, slots, from);
    }
  }
}

// Adds gamma I to a block of the diagonal.
// Element 4 n + 2 h + e of v: row 16 warp + 8 h + lane / 4, column 8 n + 2 (lane % 4) + e.
__device__ __forceinline__ void add_to_diagonal(float* v, float gamma, int lane, int warp) {
  PGOLF_UNROLL
  for (int n = 0; n < 8; ++n) {
    PGOLF_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (n / 2 == warp && lane / 4 == lane % 4 * 2 + e) v[4 * n + n % 2 * 2 + e] += gamma;
    }
  }
}

// Writes a block as float32 past the copy engine; (r, c) is this thread's first element.
__device__ __forceinline__ void store_direct(const float* v, float* direct, int r, int c, int rows,
                                             int cols) {
  float* at = direct + int64_t{r} * cols + c;
  PGOLF_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (r + i % 2 * 8 < rows && c + i / 2 * 8 < cols)
      *reinterpret_cast<float2*>(at + i % 2 * 8 * cols + i / 2 * 8) = make_float2(v[2 * i], v[2 * i + 1]);
  }
}

__device__ __forceinline__ void pack_block(uint32_t (&packed)[16], const float* v, bool bfloat16) {
  if (bfloat16) {
    PGOLF_UNROLL
    for (int i = 0; i < 16; ++i) packed[i] = pack_bfloat16(v[2 * i], v[2 * i + 1]);
  } else {
    PGOLF_UNROLL
    for (int i = 0; i < 16; ++i) packed[i] = pack_half(v[2 * i], v[2 * i + 1]);
  }
}

// Makes the output of the sums of a part and hands it over to be stored.
__device__ __forceinline__ void finish(float (&sum)[2][64], Writer& writer, const Operands& slots,
                                       uint32_t* done, const Task& task, const OutputPart& part) {
  const auto lane = static_cast<int>(writer.thread() % kLanes),
             warp = static_cast<int>(writer.thread() / kLanes);
  const float alpha = task.alpha, beta = task.beta, gamma = task.gamma;
  add_operand(sum, part.blocks, writer.base, slots, alpha, beta, lane, warp);
  // The task lies in shared memory: what is read only here needs no registers before.
  const int rows = task.rows, cols = task.cols;
  const bool symmetric = task.symmetric, bfloat16 = task.bfloat16;
  float* const direct = task.direct;
  auto stored = [&](int block) {
    const int r0 = part.row + block / 2 * kBox, c0 = part.column + block % 2 * kBox;
    return block < part.blocks && r0 < rows && c0 < cols && (!symmetric || r0 >= c0);
  };
  // The counter is raised with the last block that is stored, and at once where none is: products that wait
  // for it count all tiles, also those of which a group has only what lies outside or above the diagonal.
  int left = 0;
  PGOLF_UNROLL
  for (int block = 0; block < 4; ++block) left += stored(block);
  if (left == 0 && writer.thread() == 0) release_add(done + task.signals, part.tiles);
  StoreJob job{
      .map = task.out, .row = 0, .column = 0, .matrix = task.matrix, .counter = -1, .tiles = part.tiles};
  PGOLF_UNROLL
  for (int block = 0; block < 4; ++block) {
    if (!stored(block)) continue;
    --left;
    const int r0 = part.row + block / 2 * kBox, c0 = part.column + block % 2 * kBox;
    float* v = &sum[block / 2][block % 2 * 32];
    if (r0 == c0) add_to_diagonal(v, gamma, lane, warp);
    if (direct != nullptr) {
      store_direct(v, direct, r0 + warp * 16 + lane / 4, c0 + lane % 4 * 2, rows, cols);
      continue;
    }
    uint32_t packed[16];
    pack_block(packed, v, bfloat16);
    // Of a symmetric product readers mirror whole tiles, so a tile of the diagonal is stored whole.
    const bool mirror = symmetric && r0 > c0 && r0 / kTile == c0 / kTile;
    job.row = r0;
    job.column = c0;
    job.counter = left == 0 && !mirror ? task.signals : -1;
    writer.store<false>(packed, job);
    if (!mirror) continue;
    job.row = c0;
    job.column = r0;
    job.counter = left == 0 ? task.signals : -1;
    writer.store<true>(packed, job);
  }
  if (writer.waiting != 0) writer.hand_over();
}

__device__ void multiply_tasks(uint32_t* done, uint32_t base, char* shared, int group) {
  Writer writer{base, shared, group};
  uint32_t a_index = 0, b_index = 0;
  // Tiles that one group multiplies alone go to the groups in turn. Before a group waits for a slot again it
  // must know that the other's are filled: a parity cannot tell phases further apart.
  int alone = 0, seen = 0;
  auto passed = [&](int owner) { return base + kBarrierOffset + 8 * (kPassedBarrier + owner); };
  auto catch_up = [&] {
    if (seen < alone && (alone - 1) % kGroups != group) {
      mbarrier_wait(passed((alone - 1) % kGroups), (alone - 1) / kGroups & 1);
    }
    seen = alone;
  };
  for (uint32_t n = 0;; ++n) {
    RingTask::wait_filled(base, n);
    const Task& task = reinterpret_cast<const Task*>(shared + kTaskOffset)[n % kTaskSlots];
    if (task.product < 0) {
      writer.open({.map = kEnd, .row = 0, .column = 0, .matrix = 0, .counter = -1, .tiles = 0});
      writer.hand_over();
      return;
    }
    // Tiles of 256x128: 128 rows each. Spread: 64 rows of the tile each. Otherwise tiles in turn, so that one
    // group stores while the other multiplies; each lets go of A with its last tile.
    // Tiles of 256x128: 128 rows for each group. A shared tile: 64 rows for each.
    const bool together = task.shared_tile || task.tall_tiles;
    for (int tile = 0; tile < task.count; ++tile) {
      const int column = task.column + tile * kTile;
      const bool diagonal = operands_coincide(task, column);
      if (together || alone % kGroups == group) {
        Operands slots{.a_index = a_index,
                       .a_stride = 1,
                       .a_offset = 0,
                       .a_releases = 1,
                       .b_index = b_index,
                       .b_releases = 1,
                       .diagonal = diagonal,
                       .a_other = 0,
                       .depth = task.depth,
                       .passed = 0,
                       .held = added_blocks(task, column)};
        int row = task.row, blocks = 4;
        if (task.tall_tiles) {
          slots.a_index += group;
          slots.a_stride = 2;
          slots.a_other = 1u - 2u * group;
          row += group * kTile;
        } else if (task.shared_tile) {
          slots.a_offset = group * kBoxBytes;
          row += group * kBox;
          blocks = 2;
        } else {
          // A slot is free after kReleases arrivals: both groups', or twice those of the only reader. A group
          // that has several tiles of a task needs A again until its last.
          slots.a_releases = task.count == 1 ? 2 : tile + kGroups >= task.count ? 1 : 0;
          slots.b_releases = 2;
          slots.passed = passed(group);
        }
        slots.first = first_depth(task, task.column);
        slots.a_mirrored = mirrored_from(task.a_lower, task.tall_tiles ? row : task.row);
        slots.b_mirrored = mirrored_from(task.b_lower, column);
        catch_up();
        float sum[2][64];
        multiply_runs(sum, blocks, task.layout, base, slots);
        finish(sum, writer, slots, done, task,
               {.row = row, .column = column, .blocks = blocks, .tiles = together ? 1 : 2});
      }
      // Both groups count all tiles, so that they agree on the slots and on whose turn it is.
      b_index += diagonal ? 0 : task.depth;
      alone += together ? 0 : 1;
    }
    a_index += task.tall_tiles ? 2 * task.depth : task.depth;
    mbarrier_arrive(RingTask::free(base, n), 1);
  }
}

__global__ void __launch_bounds__(kThreads, 1) products_kernel(const __grid_constant__ Plan plan, int tasks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char unaligned[];
  // Swizzled boxes repeat every 1024 bytes, so the base must be a multiple of that.
  const uint32_t start = shared_address(unaligned);
  const uint32_t base = (start + 1023) / 1024 * 1024;
  char* shared = unaligned + (base - start);
  if (threadIdx.x == 0) {
    init_barriers(base);
    mbarrier_init_fence();
  }
  __syncthreads();
  // A warp-uniform value: the compiler must see that each role is taken by whole warps.
  const int role = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (role == 0) {
    registers_lower<kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    if (threadIdx.x == 0) feed_a(plan, base, shared, tasks);
    if (threadIdx.x == 3 * kLanes) feed_b(plan, base, shared);
    if (threadIdx.x % kLanes == 0 && warp > 0 && warp <= kGroups) store_jobs(plan, base, shared, warp - 1);
  } else {
    registers_raise<kConsumerRegisters>();
    multiply_tasks(plan.queue.done, base, shared, role - 1);
  }
#endif
}

}  // namespace ns90
}  // namespace pgolf
