// Hopper kernel of norm_mlp.h: out = residual + a b - (rho^2 S / width) x.
//
// As linear_softcap_ce_hidden_sm90.cu: persistent blocks, in clusters of two that work on the same 256 rows
// and neighbouring columns and multicast their halves of `a` to each other; one thread feeds a ring of slices
// of the hidden width, two warpgroups multiply 128 x 128 each. Half of what the epilogue adds is fetched to
// registers before the product, the other half to the L2 cache.
#include <cuda.h>

#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/norm_mlp.h"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace norm_mlp_sum {

constexpr int kDepth = 64;  // slice of the hidden width: 128 bytes, the width of the swizzle
constexpr int kBoxBytes = 64 * kDepth * 2;
constexpr int kTileRows = 256;
constexpr int kTileColumns = 128;
constexpr int kCluster = 2;
constexpr int kGroup = 128;
constexpr int kThreads = 3 * kGroup;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(registers_fit(2, kConsumerRegisters, kProducerRegisters));
constexpr int kLeftBytes = 4 * kBoxBytes;
constexpr int kStageBytes = kLeftBytes + 2 * kBoxBytes;
constexpr int kStages = 4;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 232448, "shared memory of a block on sm_90");

struct Args {
  const bf16* x;         // or null
  const bf16* residual;  // or null
  const float* rate;     // rho^2 S / width of each row
  bf16* out;
  int rows, width;
  int column_pairs;  // of tiles
  int tiles;         // of a cluster: 256 rows and two column tiles
  int slices;
};

struct Ring {
  uint32_t base, barriers;
  int stage = 0;
  uint32_t phase = 0;
  __device__ explicit Ring(uint32_t shared) {
    base = __shfl_sync(0xffffffffu, (shared + 1023u) & ~1023u, 0);
    barriers = base + kStages * kStageBytes;
  }
  __device__ uint32_t slot() const { return base + stage * kStageBytes; }
  __device__ uint32_t full(int at) const { return barriers + at * 8; }
  __device__ uint32_t empty(int at) const { return barriers + (kStages + at) * 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ void produce(const Args& args, Ring ring, const CUtensorMap* left, const CUtensorMap* right,
                        uint32_t rank) {
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster) {
    const int row = tile / args.column_pairs * kTileRows + static_cast<int>(rank) * (kTileRows / 2);
    const int column = (tile % args.column_pairs * kCluster + static_cast<int>(rank)) * kTileColumns;
    for (int slice = 0; slice < args.slices; ++slice) {
      // Free in both blocks: the multicast below writes half of the rows into the other's stage, too.
      mbarrier_wait_or_trap(ring.empty(ring.stage), ring.phase ^ 1);
      const uint32_t full = ring.full(ring.stage), slot = ring.slot();
      mbarrier_expect_bytes(full, kStageBytes);
      tma_load_2d_multicast(slot + rank * (kLeftBytes / 2), left, full, slice * kDepth, row, 3);
      // A box is 64 columns wide, the width of the swizzle.
      tma_load_2d(slot + kLeftBytes, right, full, column, slice * kDepth);
      tma_load_2d(slot + kLeftBytes + kBoxBytes, right, full, column + 64, slice * kDepth);
      ring.advance();
    }
  }
}

// What the epilogue adds to 64 rows: of rows r and r + 8, columns 32 run + 8 t .. 8 t + 7.
struct Addends {
  uint4 x[2][4], residual[2][4];
  float rate[2];

  __device__ __forceinline__ void load_row(const Args& args, int half, int row, int column) {
    const int64_t at = static_cast<int64_t>(row) * args.width + column;
    PGOLF_UNROLL
    for (int run = 0; run < 4; ++run) {
      const bool inside = row < args.rows && column + run * 32 < args.width;
      x[half][run] =
          inside && args.x != nullptr ? fetch16_alone(args.x + at + run * 32) : make_uint4(0, 0, 0, 0);
      residual[half][run] = inside && args.residual != nullptr ? fetch16_alone(args.residual + at + run * 32)
                                                               : make_uint4(0, 0, 0, 0);
    }
    rate[half] = row < args.rows && args.x != nullptr ? __ldg(args.rate + row) : 0.0f;
  }
};

__device__ __forceinline__ float half_of(uint32_t word, int e) {
  return __uint_as_float(e == 0 ? word << 16 : word & 0xffff0000u);
}

// Eight columns of one row.
__device__ __forceinline__ uint4 finish_run(const float (&sum)[64], int half, int run, const uint4& x,
                                            const uint4& residual, float rate, int t) {
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, rs[4] = {residual.x, residual.y, residual.z, residual.w};
  uint32_t v[2][4];
  PGOLF_UNROLL
  for (int e = 0; e < 2; ++e) {
    PGOLF_UNROLL
    for (int j = 0; j < 4; ++j) v[e][j] = __float_as_uint(sum[(run * 4 + j) * 4 + half * 2 + e]);
    // A thread has two columns of every eight; after the exchange it has eight of every 32.
    epilogue::transpose_quad(v[e], t);
  }
  uint32_t word[4];
  PGOLF_UNROLL
  for (int j = 0; j < 4; ++j) {
    float pair[2];
    PGOLF_UNROLL
    for (int e = 0; e < 2; ++e) {
      pair[e] = fmaf(-rate, half_of(xs[j], e), __uint_as_float(v[e][j])) + half_of(rs[j], e);
    }
    word[j] = pack_bfloat16(pair[0], pair[1]);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ void finish_row(const Args& args, const float (&sum)[64], int half,
                                           const Addends& with, int row, int column, int t) {
  PGOLF_UNROLL
  for (int run = 0; run < 4; ++run) {
    const uint4 v =
        finish_run(sum, half, run, with.x[half][run], with.residual[half][run], with.rate[half], t);
    if (row < args.rows && column + run * 32 < args.width) {
      *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(row) * args.width + column + run * 32) = v;
    }
  }
}

__device__ void consume(const Args& args, Ring ring, uint32_t rank) {
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster) {
    const int row = tile / args.column_pairs * kTileRows + group * 128 + warp * 16 + lane / 4;
    const int first = (tile % args.column_pairs * kCluster + static_cast<int>(rank)) * kTileColumns;
    const int column = first + t * 8;
    Addends addends;
    PGOLF_UNROLL
    for (int half = 0; half < 2; ++half) {
      addends.load_row(args, half, row + 8 * half, column);
      // The other fragment's row, a line for each of the four lanes.
      const bf16* const from = t / 2 == 0 ? args.x : args.residual;
      const int later = row + 64 + 8 * half, line = first + t % 2 * 64;
      if (later < args.rows && line < args.width && from != nullptr) {
        prefetch_line(from + static_cast<int64_t>(later) * args.width + line);
      }
    }
    float sum[2][64];
    uint32_t previous = 0;
    for (int slice = 0; slice < args.slices; ++slice) {
      mbarrier_wait_or_trap(ring.full(ring.stage), ring.phase);
      const uint64_t a = wgmma_descriptor(ring.slot() + group * 2 * kBoxBytes);
      const uint64_t b = wgmma_descriptor(ring.slot() + kLeftBytes);
      wgmma_fence();
      PGOLF_UNROLL
      for (int k = 0; k < kDepth / 16; ++k) {
        PGOLF_UNROLL
        for (int i = 0; i < 2; ++i) {
          wgmma_64x128x16<true, false>(sum[i], wgmma_advance(a, k * 32 + i * kBoxBytes),
                                       wgmma_advance(b, k * 2048), slice > 0 || k > 0, __nv_bfloat16{});
        }
      }
      wgmma_commit();
      if (slice > 0) {
        // The slice before has been read; lanes 0 and 1 of each warp tell the producers of both blocks.
        wgmma_wait<1>();
        if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
      }
      previous = ring.empty(ring.stage);
      ring.advance();
    }
    wgmma_wait<0>();
    wgmma_keep_order(sum[0]);
    wgmma_keep_order(sum[1]);
    if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);

    PGOLF_UNROLL
    for (int half = 0; half < 2; ++half) {
      finish_row(args, sum[0], half, addends, row + 8 * half, column, t);
      addends.load_row(args, half, row + 64 + 8 * half, column);
    }
    PGOLF_UNROLL
    for (int half = 0; half < 2; ++half) {
      finish_row(args, sum[1], half, addends, row + 64 + 8 * half, column, t);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    sum_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
               const __grid_constant__ Args args) {
  const Ring ring(shared_address(dynamic_shared()));
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    // Full: one arrival, which announces the bytes of all copies into the stage, also those of the other
    // block.
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(ring.full(stage), 1);
      mbarrier_init(ring.empty(stage), 8 * kCluster);  // the consuming warps of both blocks
    }
    mbarrier_init_fence();
    tma_prefetch(&left);
    tma_prefetch(&right);
  }
  // No block may copy into the other or arrive there before that one's barriers exist.
  cluster_sync();

  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, ring, &left, &right, rank);
    __syncwarp();
  } else {
    registers_raise<kConsumerRegisters>();
    consume(args, ring, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other block.
  cluster_sync();
}

// rate = rho^2 / width times the sum of the row's partial sums.
__global__ void __launch_bounds__(256)
    rate_kernel(const float* __restrict__ partials, const float* __restrict__ rho, float* __restrict__ rate,
                int rows, int tiles, float inverse_width) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= rows) return;
  float sum = 0.0f;
  _Pragma("unroll 16") for (int i = 0; i < tiles; ++i) sum += partials[static_cast<int64_t>(i) * rows + row];
  rate[row] = rho[row] * rho[row] * sum * inverse_width;
}

}  // namespace norm_mlp_sum

void norm_mlp_sum_sm90(const NormMlpSum& in, const NormMlpShape& shape, CUstream_st* stream) {
  using namespace norm_mlp_sum;
  if (shape.rows == 0) return;
  if (in.x != nullptr) {
    launch_kernel(rate_kernel, {grid_blocks(shape.rows, 256, "norm_mlp"), 256}, stream, in.partials, in.rho,
                  in.rate, static_cast<int>(shape.rows), static_cast<int>(shape.hidden / 128),
                  1.0f / static_cast<float>(shape.width));
  }
  const int64_t pairs = (shape.width + kCluster * kTileColumns - 1) / (kCluster * kTileColumns);
  const Args args{.x = in.x,
                  .residual = in.residual,
                  .rate = in.rate,
                  .out = in.out,
                  .rows = static_cast<int>(shape.rows),
                  .width = static_cast<int>(shape.width),
                  .column_pairs = static_cast<int>(pairs),
                  .tiles = static_cast<int>((shape.rows + kTileRows - 1) / kTileRows * pairs),
                  .slices = static_cast<int>(shape.hidden / kDepth)};
  const CUtensorMap left = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.a,
                                      matrix_map(shape.rows, shape.hidden, shape.hidden, kTileRows / 2));
  const CUtensorMap right = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.b,
                                       matrix_map(shape.hidden, shape.width, shape.width, kDepth));
  launch_clusters(sum_kernel,
                  {.clusters = args.tiles, .blocks = kCluster, .threads = kThreads, .shared = kSharedBytes},
                  stream, left, right, args);
}

}  // namespace pgolf
