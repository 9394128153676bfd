// Hopper kernel of linear_softcap_ce.h: grad_hidden = v (factor weight), and v hidden on the side.
//
// Persistent blocks, in clusters of two that work on the same 256 rows and neighbouring columns and multicast
// their halves of the factor to each other. One thread feeds a ring of k slices, two warpgroups multiply
// 128 x 128 each. The rest of the feeding warpgroup meanwhile scales the hidden states, which are needed by
// the next product: a pass over memory that costs no time of its own.
#include <cuda.h>

#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce.h"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

constexpr int kDepth = 64;  // slice of k: 128 bytes, the width of the swizzle
constexpr int kBoxBytes = 64 * kDepth * 2;
constexpr int kTileRows = 256;
constexpr int kTileColumns = 128;
constexpr int kCluster = 2;
constexpr int kGroup = 128;
constexpr int kThreads = 3 * kGroup;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(registers_fit(2, kConsumerRegisters, kProducerRegisters));
constexpr int kFactorBytes = 4 * kBoxBytes;
constexpr int kStageBytes = kFactorBytes + 2 * kBoxBytes;
constexpr int kStages = 4;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 232448, "shared memory of a block on sm_90");

struct HiddenArgs {
  const float* grad_loss;
  const float* scale;
  const uint4* hidden;
  uint4* scaled_hidden;
  bf16* product;
  int64_t chunks;  // of eight elements of hidden
  int grad_stride;
  int rows, width;
  int column_pairs;  // of tiles
  int tiles;         // of a cluster: 256 rows and two column tiles
  int slices;
};

__device__ __forceinline__ float row_scale(const HiddenArgs& args, int row) {
  const float scale = args.scale[row];
  return scale == 0.0f ? 0.0f : args.grad_loss[static_cast<int64_t>(row) * args.grad_stride] * scale;
}

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

__device__ void produce(const HiddenArgs& args, Ring ring, const CUtensorMap* factor,
                        const CUtensorMap* weight, uint32_t rank) {
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster) {
    const int row = tile / args.column_pairs * kTileRows + static_cast<int>(rank) * (kTileRows / 2);
    const int column = (tile % args.column_pairs * kCluster + static_cast<int>(rank)) * kTileColumns;
    for (int slice = 0; slice < args.slices; ++slice) {
      // Free in both blocks: the multicast below writes half of the factor's rows into the other's stage,
      // too.
      mbarrier_wait_or_trap(ring.empty(ring.stage), ring.phase ^ 1);
      const uint32_t full = ring.full(ring.stage), slot = ring.slot();
      mbarrier_expect_bytes(full, kStageBytes);
      tma_load_2d_multicast(slot + rank * (kFactorBytes / 2), factor, full, slice * kDepth, row, 3);
      // Columns of the weight are this block's own. A box is 64 columns wide, the width of the swizzle.
      tma_load_2d(slot + kFactorBytes, weight, full, column, slice * kDepth);
      tma_load_2d(slot + kFactorBytes + kBoxBytes, weight, full, column + 64, slice * kDepth);
      ring.advance();
    }
  }
}

// This thread's share of scaled_hidden = v hidden.
__device__ void scale_hidden(const HiddenArgs& args, int index, int count) {
  const int per_row = args.width / 8;
  // Consecutive threads take consecutive chunks of 16 bytes, so that loads and stores coalesce.
  const int64_t step = static_cast<int64_t>(gridDim.x) * count;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * count + index; i < args.chunks; i += step) {
    const float v = row_scale(args, static_cast<int>(i / per_row));
    const uint4 from = args.hidden[i];
    const uint32_t word[4] = {from.x, from.y, from.z, from.w};
    uint32_t to[4];
    PGOLF_UNROLL
    for (int k = 0; k < 4; ++k) {
      to[k] = pack_bfloat16(v * __uint_as_float(word[k] << 16), v * __uint_as_float(word[k] & 0xffff0000u));
    }
    args.scaled_hidden[i] = make_uint4(to[0], to[1], to[2], to[3]);
  }
}

// Eight columns of each of 64 rows: the accumulators of one warpgroup.
__device__ __forceinline__ void store(const HiddenArgs& args, const float (&sum)[64], int first_row,
                                      int first_column, int t) {
  PGOLF_UNROLL
  for (int half = 0; half < 2; ++half) {
    // A thread holds rows r and r + 8 of 64; see wgmma_64x128x16.
    const int row = first_row + 8 * half;
    const float v = row < args.rows ? row_scale(args, row) : 0.0f;
    PGOLF_UNROLL
    for (int block = 0; block < 4; ++block) {
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int at = (block * 4 + j) * 4 + half * 2;
        word[j] = pack_bfloat16(v * sum[at], v * sum[at + 1]);
      }
      // A thread has two columns of every eight; after the exchange it has eight of every 32, 16 bytes.
      epilogue::transpose_quad(word, t);
      const int column = first_column + block * 32 + t * 8;
      if (row < args.rows && column < args.width) {
        *reinterpret_cast<uint4*>(args.product + static_cast<int64_t>(row) * args.width + column) =
            make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

__device__ void consume(const HiddenArgs& args, Ring ring, uint32_t rank) {
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  // All blocks walk the tiles in the same order, a grid apart: those at work at one time share rows in L2.
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster) {
    float sum[2][64];
    uint32_t previous = 0;
    for (int slice = 0; slice < args.slices; ++slice) {
      mbarrier_wait_or_trap(ring.full(ring.stage), ring.phase);
      const uint64_t a = wgmma_descriptor(ring.slot() + group * 2 * kBoxBytes);
      const uint64_t b = wgmma_descriptor(ring.slot() + kFactorBytes);
      wgmma_fence();
      PGOLF_UNROLL
      for (int k = 0; k < kDepth / 16; ++k) {
        // The first product of a tile overwrites the sums, which saves setting them to zero.
        const int accumulate = slice > 0 || k > 0;
        PGOLF_UNROLL
        for (int i = 0; i < 2; ++i) {
          wgmma_64x128x16<true, false>(sum[i], wgmma_advance(a, k * 32 + i * kBoxBytes),
                                       wgmma_advance(b, k * 2048), accumulate, __nv_bfloat16{});
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

    const int row = tile / args.column_pairs * kTileRows + group * 128 + warp * 16 + lane / 4;
    const int column = (tile % args.column_pairs * kCluster + static_cast<int>(rank)) * kTileColumns;
    store(args, sum[0], row, column, lane % 4);
    store(args, sum[1], row + 64, column, lane % 4);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    hidden_kernel(const __grid_constant__ CUtensorMap factor, const __grid_constant__ CUtensorMap weight,
                  const __grid_constant__ HiddenArgs args) {
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
    tma_prefetch(&factor);
    tma_prefetch(&weight);
  }
  // No block may copy into the other or arrive there before that one's barriers exist.
  cluster_sync();

  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, ring, &factor, &weight, rank);
    if (threadIdx.x >= 32 && args.scaled_hidden != nullptr) {
      scale_hidden(args, static_cast<int>(threadIdx.x) - 32, kGroup - 32);
    }
    __syncwarp();
  } else {
    registers_raise<kConsumerRegisters>();
    consume(args, ring, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other block.
  cluster_sync();
}

int64_t column_pairs(int64_t width) {
  return (width + kCluster * kTileColumns - 1) / (kCluster * kTileColumns);
}

int64_t cluster_tiles(int64_t rows, int64_t width) {
  return (rows + kTileRows - 1) / kTileRows * column_pairs(width);
}

}  // namespace

bool linear_softcap_ce_hidden_sm90_supports(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kMax = int64_t{1} << 30;
  if (shape.rows <= 0 || shape.rows > kMax || shape.vocab > kMax || shape.width > kMax ||
      shape.vocab % 8 != 0 || shape.width % 8 != 0 ||
      device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) {
    return false;
  }
  const int64_t tiles = cluster_tiles(shape.rows, shape.width), clusters = multiprocessor_count() / kCluster;
  // Clusters take tiles in rounds. Where more than an eighth of them would be idle in the average round, the
  // caller takes torch's product instead.
  const int64_t rounds = (tiles + clusters - 1) / clusters;
  return tiles < kMax && tiles * 8 >= rounds * clusters * 7;
}

void linear_softcap_ce_hidden_sm90(const LinearSoftcapCeHidden& in, const LinearSoftcapCeShape& shape,
                                   CUstream_st* stream) {
  if (shape.rows == 0) return;
  HiddenArgs args{};
  args.grad_loss = in.grad_loss;
  args.grad_stride = static_cast<int>(in.grad_stride);
  args.scale = in.scale;
  args.hidden = reinterpret_cast<const uint4*>(in.hidden);
  args.scaled_hidden = reinterpret_cast<uint4*>(in.scaled_hidden);
  args.product = in.product;
  args.rows = static_cast<int>(shape.rows);
  args.width = static_cast<int>(shape.width);
  args.chunks = shape.rows * (shape.width / 8);
  args.column_pairs = static_cast<int>(column_pairs(shape.width));
  args.tiles = static_cast<int>(cluster_tiles(shape.rows, shape.width));
  // The sum runs over the vocabulary; past its end the copy engine fills in zeros.
  args.slices = static_cast<int>((shape.vocab + kDepth - 1) / kDepth);
  const CUtensorMap factor = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.factor,
                                        matrix_map(shape.rows, shape.vocab, in.factor_ld, kTileRows / 2));
  const CUtensorMap weight = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.weight,
                                        matrix_map(shape.vocab, shape.width, shape.width, kDepth));
  launch_clusters(hidden_kernel,
                  {.clusters = args.tiles, .blocks = kCluster, .threads = kThreads, .shared = kSharedBytes},
                  stream, factor, weight, args);
}

}  // namespace pgolf
