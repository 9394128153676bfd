// The kernel of newton_schulz_sm90 that runs every product of every matrix.
//
// It is persistent. A queue of tasks (one or more 128x128 tiles of one product of one matrix) lies in an
// order in which every task follows those it needs; blocks take tasks from its head, so the oldest unfinished
// task can always run, whatever is resident. A task waits until its matrix' counter says that all tiles of
// that matrix' earlier products are stored. One thread feeds operands through shared memory with the copy
// engine; two warpgroups multiply and store.
#pragma once

#include "kernels/hopper.cuh"
#include "kernels/newton_schulz_sm90_plan.h"
#include "kernels/ptx.cuh"

namespace pgolf {
namespace ns90 {

constexpr int kTaskSlots = 4;
constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kGroupThreads = 128;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kStagedPerGroup = 2;  // boxes on their way out
constexpr int kLanes = 32;

__device__ Task decode(const Plan& plan, int task, int& product) {
  while (product + 1 < plan.product_count && task >= plan.products[product + 1].first_task) ++product;
  const Product& p = plan.products[product];
  const int local = task - p.first_task;
  const int matrix = local / p.tasks;
  int left = local - matrix * p.tasks;
  int panel = p.panels - 1;  // the longest panels of a symmetric product first
  for (;; --panel) {
    const int chunks = (tiles_in_panel(p, panel) + p.chunk - 1) / p.chunk;
    if (left < chunks) break;
    left -= chunks;
  }
  const int column = left * p.chunk;
  const int rest = tiles_in_panel(p, panel) - column;
  return Task{product, matrix, panel, column, rest < p.chunk ? rest : p.chunk};
}

// Whether the tile needs the same rows of the same matrix on both sides.
__device__ __forceinline__ bool operands_coincide(const Product& p, int panel, int column) {
  return p.symmetric && p.a == p.b && !p.tall && column == panel;
}

// ---- Shared memory

constexpr int kAOffset = 0;
constexpr int kBOffset = kAOffset + kASlots * kSlotBytes;
constexpr int kStagedOffset = kBOffset + kBSlots * kSlotBytes;
constexpr int kBarrierOffset = kStagedOffset + kGroups * kStagedPerGroup * kBoxBytes;
constexpr int kPassedBarrier = 2 * (kASlots + kBSlots + kTaskSlots);  // one per group
constexpr int kBarriers = kPassedBarrier + kGroups;
constexpr int kTaskOffset = kBarrierOffset + 8 * kBarriers;
static_assert(kTaskOffset % 8 == 0, "barriers and tasks are aligned");
constexpr int kSharedBytes = kTaskOffset + kTaskSlots * static_cast<int>(sizeof(Task)) + 1024;  // alignment
static_assert(kSharedBytes <= 232448, "more than a block of sm_90 can have");

// Ring of slots with a barrier for "filled" and one for "free"; `index` counts uses from 0.
template <int Slots, int Offset, int FirstBarrier, int Bytes>
struct Ring {
  __device__ static uint32_t slot(uint32_t base, int index) { return base + Offset + index % Slots * Bytes; }
  __device__ static uint32_t filled(uint32_t base, int index) {
    return base + kBarrierOffset + 8 * (FirstBarrier + index % Slots);
  }
  __device__ static uint32_t free(uint32_t base, int index) { return filled(base, index) + 8 * Slots; }
  __device__ static void wait_filled(uint32_t base, int index) {
    mbarrier_wait(filled(base, index), index / Slots & 1);
  }
  __device__ static void wait_free(uint32_t base, int index) {
    mbarrier_wait(free(base, index), (index / Slots & 1) ^ 1);
  }
};
using RingA = Ring<kASlots, kAOffset, 0, kSlotBytes>;
using RingB = Ring<kBSlots, kBOffset, 2 * kASlots, kSlotBytes>;
using RingTask = Ring<kTaskSlots, kTaskOffset, 2 * (kASlots + kBSlots), static_cast<int>(sizeof(Task))>;
constexpr int kWarpsPerGroup = kGroupThreads / kLanes;
constexpr int kReleases = kGroups * kWarpsPerGroup;  // arrivals that free a slot

__device__ __forceinline__ void init_barriers(uint32_t base) {
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
    mbarrier_init(RingTask::free(base, i), kReleases);
  }
  for (int i = 0; i < kGroups; ++i)
    mbarrier_init(base + kBarrierOffset + 8 * (kPassedBarrier + i), kWarpsPerGroup);
}

// ---- The feeding warp

__device__ __forceinline__ void load_slot(uint32_t slot, uint32_t filled, const CUtensorMap* map,
                                          bool along_k, int origin, int depth, int matrix) {
  mbarrier_expect_bytes(filled, kSlotBytes);
  PGOLF_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int at = origin + i * kBox;
    tma_load(slot + i * kBoxBytes, map, along_k ? depth : at, along_k ? at : depth, matrix, filled);
  }
}

__device__ void feed(const Plan& plan, uint32_t base, char* shared, int first, int last, uint32_t* queue) {
  int a_index = 0, b_index = 0, product = 0;
  int next = first + static_cast<int>(atomicAdd(queue, 1u));
  for (int n = 0;; ++n) {
    const int task_index = next;
    RingTask::wait_free(base, n);
    Task* slot = reinterpret_cast<Task*>(shared + kTaskOffset) + n % kTaskSlots;
    if (task_index >= last) {
      slot->product = -1;
      mbarrier_arrive(RingTask::filled(base, n), 1);
      return;
    }
    next = first + static_cast<int>(atomicAdd(queue, 1u));
    const Task task = decode(plan, task_index, product);
    *slot = task;
    mbarrier_arrive(RingTask::filled(base, n), 1);

    const Product& p = plan.products[task.product];
    const uint32_t* done = plan.done + p.first_matrix + task.matrix;
    for (uint32_t polls = 0; load_acquire(done) < p.need; ++polls) {
      if (polls == kMaxPolls) give_up();
    }
    fence_proxy();

    const CUtensorMap* map_a = plan.maps + p.a;
    const CUtensorMap* map_b = plan.maps + p.b;
    const bool a_along_k = p.layout != kColumnsColumns, b_along_k = p.layout == kRowsRows;
    const int per_depth = p.tall ? 2 : 1;
    for (int tile = 0; tile < task.count; ++tile) {
      const int column = task.column + tile;
      const bool diagonal = operands_coincide(p, task.panel, column);
      for (int k = 0; k < p.depth; ++k) {
        if (tile == 0) {
          for (int i = 0; i < per_depth; ++i, ++a_index) {
            RingA::wait_free(base, a_index);
            load_slot(RingA::slot(base, a_index), RingA::filled(base, a_index), map_a, a_along_k,
                      (task.panel * per_depth + i) * kTile, k * kBox, task.matrix);
          }
        }
        if (!diagonal) {
          RingB::wait_free(base, b_index);
          load_slot(RingB::slot(base, b_index), RingB::filled(base, b_index), map_b, b_along_k,
                    column * kTile, k * kBox, task.matrix);
          ++b_index;
        }
      }
    }
  }
}

// ---- The multiplying warpgroups

// Where a warpgroup's part of a tile lies in the rings.
struct Part {
  int a_index, a_stride;  // first use of ring A and the step per block of k
  uint32_t a_offset;      // bytes, of the group's rows within a slot
  uint32_t a_releases;    // arrivals of each warp when it has read a slot; 0: another tile needs it
  int b_index;
  uint32_t b_releases;
  bool diagonal;  // B is A
  int a_other;    // step from our slot of A to the other group's; 0: they are the same
  int depth;
  uint32_t passed;  // barrier to arrive at when the last slot is filled; 0: none
};

template <int Rows, bool AAlongK, bool BAlongK>
__device__ __forceinline__ void multiply(float (&sum)[Rows][64], uint32_t base, const Part& part) {
  auto release = [&](int k) {
    if (threadIdx.x % kLanes != 0) return;
    const int a_index = part.a_index + k * part.a_stride;
    if (part.a_releases) mbarrier_arrive(RingA::free(base, a_index), part.a_releases);
    if (part.a_other) mbarrier_arrive(RingA::free(base, a_index + part.a_other), part.a_releases);
    if (!part.diagonal) mbarrier_arrive(RingB::free(base, part.b_index + k), part.b_releases);
  };
  for (int k = 0; k < part.depth; ++k) {
    const int a_index = part.a_index + k * part.a_stride;
    RingA::wait_filled(base, a_index);
    // A parity tells a phase from the next only, so neither group may skip a use of a slot.
    if (part.a_other) RingA::wait_filled(base, a_index + part.a_other);
    const uint32_t at_a = RingA::slot(base, a_index);
    uint32_t at_b = at_a;
    if (!part.diagonal) {
      RingB::wait_filled(base, part.b_index + k);
      at_b = RingB::slot(base, part.b_index + k);
    }
    if (part.passed && k + 1 == part.depth && threadIdx.x % kLanes == 0) mbarrier_arrive(part.passed, 1);
    const uint64_t a = wgmma_descriptor(at_a + part.a_offset), b = wgmma_descriptor(at_b);
    wgmma_fence();
    PGOLF_UNROLL
    for (int depth = 0; depth < kBox; depth += 16) {
      constexpr uint64_t kAStep = (AAlongK ? 32 : 2048) >> 4, kBStep = (BAlongK ? 32 : 2048) >> 4;
      PGOLF_UNROLL
      for (int i = 0; i < Rows; ++i) {
        wgmma_64x128x16<AAlongK, BAlongK>(sum[i], a + depth / 16 * kAStep + (i * kBoxBytes >> 4),
                                          b + depth / 16 * kBStep, k + depth);
      }
    }
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      release(k - 1);
    }
  }
  wgmma_wait<0>();
  PGOLF_UNROLL
  for (int i = 0; i < Rows; ++i) wgmma_keep_order(sum[i]);
  release(part.depth - 1);
}

__device__ __forceinline__ uint32_t pack2(float x, float y, NsType type) {
  return type == NsType::kBfloat16 ? pack_bfloat16(x, y) : pack_half(x, y);
}

// A warpgroup's way out: registers, a swizzled box in shared memory, the copy engine.
struct Writer {
  uint32_t staged;  // this group's boxes
  int group;
  int turn = 0;

  // Read again at each use: a register held through the products would be spilled.
  __device__ __forceinline__ static uint32_t thread() { return threadIdx.x % kGroupThreads; }

  // Eight columns j of a 64x64 block: v[4 j ..] as wgmma_64x128x16 leaves them.
  __device__ __forceinline__ void store(const uint32_t (&v)[16], const CUtensorMap* map, int row, int column,
                                        int matrix, bool mirror) {
    const uint32_t lane = thread() % kLanes, warp = thread() / kLanes;
    if (thread() == 0) {
      if (mirror) {
        tma_store_wait_read<0>();
      } else {
        tma_store_wait_read<1>();
      }
    }
    named_barrier(1 + group, kGroupThreads);
    const uint32_t box = staged + turn * kBoxBytes, other = staged + (turn ^ 1) * kBoxBytes;
    PGOLF_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint32_t r = warp * 16 + lane % 16, chunk = 2 * q + lane / 16;
      stmatrix_x4<false>(box + r * 128 + ((chunk ^ r % 8) << 4), v[4 * q], v[4 * q + 1], v[4 * q + 2],
                         v[4 * q + 3]);
      if (mirror) {
        const uint32_t mr = (2 * q + lane / 16) * 8 + lane % 8, mchunk = warp * 2 + lane / 8 % 2;
        stmatrix_x4<true>(other + mr * 128 + ((mchunk ^ mr % 8) << 4), v[4 * q], v[4 * q + 1], v[4 * q + 2],
                          v[4 * q + 3]);
      }
    }
    fence_proxy_shared();
    named_barrier(1 + group, kGroupThreads);
    if (thread() == 0) {
      tma_store(map, box, column, row, matrix);
      tma_store_commit();
      if (mirror) {
        tma_store(map, other, row, column, matrix);
        tma_store_commit();
      }
    }
    if (!mirror) turn ^= 1;
  }
};

__device__ __forceinline__ float power(float x, int n) {
  return n == 0 ? 1.0f : n == 1 ? x : n == 2 ? x * x : (x * x) * (x * x);
}

// Stores rows `row` .. of this group, `Rows` blocks of 64, and columns `column` .. + 127.
template <int Rows>
__device__ __forceinline__ void finish(float (&sum)[Rows][64], Writer& writer, const Plan& plan,
                                       const Product& p, const Task& task, int row, int column,
                                       uint32_t tiles) {
  const float sigma = plan.sigma[p.first_matrix + task.matrix];
  const float alpha = p.alpha * power(sigma, p.alpha_power), beta = p.beta * power(sigma, p.beta_power);
  const auto lane = static_cast<int>(writer.thread() % kLanes),
             warp = static_cast<int>(writer.thread() / kLanes);
  const int64_t size = static_cast<int64_t>(p.rows) * p.cols;
  PGOLF_UNROLL
  for (int block = 0; block < 2 * Rows; ++block) {
    const int r0 = row + block / 2 * kBox, c0 = column + block % 2 * kBox;
    if (r0 >= p.rows || c0 >= p.cols || (p.symmetric && r0 < c0)) continue;
    float* v = &sum[block / 2][block % 2 * 32];
    const int r = r0 + warp * 16 + lane / 4, c = c0 + lane % 4 * 2;
    PGOLF_UNROLL
    for (int i = 0; i < 32; ++i) v[i] *= alpha;
    if (p.c != nullptr) {
      const __half* source = p.c + task.matrix * p.c_batch;
      PGOLF_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int ri = r + i % 2 * 8, ci = c + i / 2 * 8;
        if (ri < p.rows && ci < p.cols) {
          // Not through L1: other multiprocessors wrote it during this launch.
          const uint32_t bits =
              __ldcg(reinterpret_cast<const unsigned int*>(source + ri * int64_t{p.cols} + ci));
          const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&bits));
          v[2 * i] = fmaf(beta, pair.x, v[2 * i]);
          v[2 * i + 1] = fmaf(beta, pair.y, v[2 * i + 1]);
        }
      }
    }
    if (r0 == c0) {
      PGOLF_UNROLL
      for (int i = 0; i < 32; ++i) {
        if (r + i / 2 % 2 * 8 == c + i / 4 * 8 + i % 2) v[i] += p.gamma;
      }
    }
    if (p.type == NsType::kFloat32) {
      PGOLF_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int ri = r + i % 2 * 8, ci = c + i / 2 * 8;
        if (ri < p.rows && ci < p.cols) {
          *reinterpret_cast<float2*>(p.direct + task.matrix * size + ri * int64_t{p.cols} + ci) =
              make_float2(v[2 * i], v[2 * i + 1]);
        }
      }
      continue;
    }
    uint32_t packed[16];
    PGOLF_UNROLL
    for (int i = 0; i < 16; ++i) packed[i] = pack2(v[2 * i], v[2 * i + 1], p.type);
    writer.store(packed, plan.maps + p.out, r0, c0, task.matrix, p.symmetric && r0 > c0);
  }
  if (writer.thread() == 0) {
    tma_store_wait();
    fence_proxy();
    release_add(plan.done + p.first_matrix + task.matrix, tiles);
  }
}

// One warpgroup's part of a tile, `Rows` blocks of 64 rows from `row` on.
template <int Rows, bool AAlongK, bool BAlongK>
__device__ __forceinline__ void tile_of(Writer& writer, uint32_t base, const Part& part, const Plan& plan,
                                        const Product& p, const Task& task, int row, int column,
                                        uint32_t tiles) {
  float sum[Rows][64];
  multiply<Rows, AAlongK, BAlongK>(sum, base, part);
  finish<Rows>(sum, writer, plan, p, task, row, column, tiles);
}

template <int Rows>
__device__ __forceinline__ void tile_of(Writer& writer, uint32_t base, const Part& part, const Plan& plan,
                                        const Product& p, const Task& task, int row, int column,
                                        uint32_t tiles) {
  if (p.layout == kRowsRows) {
    tile_of<Rows, true, true>(writer, base, part, plan, p, task, row, column, tiles);
  } else if (p.layout == kRowsColumns) {
    tile_of<Rows, true, false>(writer, base, part, plan, p, task, row, column, tiles);
  } else {
    tile_of<Rows, false, false>(writer, base, part, plan, p, task, row, column, tiles);
  }
}

__device__ void work(const Plan& plan, uint32_t base, char* shared, int group) {
  Writer writer{base + kStagedOffset + group * kStagedPerGroup * kBoxBytes, group};
  int a_index = 0, b_index = 0;
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
  for (int n = 0;; ++n) {
    RingTask::wait_filled(base, n);
    const Task task = reinterpret_cast<const Task*>(shared + kTaskOffset)[n % kTaskSlots];
    __syncwarp();
    if (threadIdx.x % kLanes == 0) mbarrier_arrive(RingTask::free(base, n), 1);
    if (task.product < 0) return;
    const Product& p = plan.products[task.product];
    if (p.spread && task.count == 1) {  // 64 rows of the tile each
      const bool diagonal = operands_coincide(p, task.panel, task.column);
      const Part part{a_index, 1, static_cast<uint32_t>(group * kBoxBytes), 1, b_index, 1, diagonal, 0,
                      p.depth, 0};
      catch_up();
      tile_of<1>(writer, base, part, plan, p, task, task.panel * kTile + group * kBox, task.column * kTile,
                 1);
      a_index += p.depth;
      b_index += diagonal ? 0 : p.depth;
      continue;
    }
    // Tiles of 256x128: 128 rows each. Otherwise tiles in turn, so that one group stores while the other
    // multiplies; each lets go of A with its last tile.
    for (int tile = 0; tile < task.count; ++tile) {
      const int column = task.column + tile;
      const bool diagonal = operands_coincide(p, task.panel, column);
      if (p.tall || alone % kGroups == group) {
        Part part{a_index, 1, 0, 1, b_index, 2, diagonal, 0, p.depth, passed(group)};
        if (p.tall) {
          part.a_index += group, part.a_stride = 2, part.a_other = 1 - 2 * group, part.b_releases = 1,
                                 part.passed = 0;
        } else {
          part.a_releases = task.count == 1 ? 2 : tile + kGroups >= task.count ? 1 : 0;
        }
        catch_up();
        tile_of<2>(writer, base, part, plan, p, task, (p.tall ? task.panel * 2 + group : task.panel) * kTile,
                   column * kTile, p.tall ? 1 : 2);
      }
      b_index += diagonal ? 0 : p.depth;
      alone += p.tall ? 0 : 1;
    }
    a_index += p.tall ? 2 * p.depth : p.depth;
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    products_kernel(const __grid_constant__ Plan plan, int first, int last, int queue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char unaligned[];
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
    registers_lower<40>();
    if (threadIdx.x == 0) feed(plan, base, shared, first, last, plan.queue + queue);
  } else {
    registers_raise<232>();
    work(plan, base, shared, role - 1);
  }
#endif
}

}  // namespace ns90
}  // namespace pgolf
