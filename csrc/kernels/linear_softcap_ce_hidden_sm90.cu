// Hopper kernel of linear_softcap_ce.h: grad_hidden = v (factor weight), and v hidden on the side.
//
// A product of plain_product_sm90.cuh. Threads that it leaves idle meanwhile scale the hidden states, which
// are needed by the next product: a pass over memory that costs no time of its own.
#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce.h"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/plain_product_sm90.cuh"

namespace pgolf {
namespace {

struct HiddenArgs {
  const float* grad_loss;
  const float* scale;
  const uint4* hidden;
  uint4* scaled_hidden;  // or null
  bf16* product;
  int64_t chunks;  // of eight elements of hidden
  int grad_stride;
  plain_product::Schedule schedule;
};

__device__ __forceinline__ float row_scale(const HiddenArgs& args, int row) {
  const float scale = args.scale[row];
  return scale == 0.0f ? 0.0f : args.grad_loss[static_cast<int64_t>(row) * args.grad_stride] * scale;
}

// Eight columns of each of 64 rows: the accumulators of one warpgroup.
__device__ __forceinline__ void store(const HiddenArgs& args, const float (&sum)[64], int first_row,
                                      int first_column, int t) {
  PGOLF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half;
    const float v = row < args.schedule.rows ? row_scale(args, row) : 0.0f;
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
      if (row < args.schedule.rows && column < args.schedule.columns) {
        *reinterpret_cast<uint4*>(args.product + static_cast<int64_t>(row) * args.schedule.columns + column) =
            make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

struct HiddenEpilogue {
  using Args = HiddenArgs;

  __device__ __forceinline__ void fetch(const Args&, const plain_product::Place&) {}

  __device__ __forceinline__ void finish(const Args& args, const float (&sum)[2][64],
                                         const plain_product::Place& place) {
    const int row = place.row(args.schedule), column = place.column(args.schedule), t = threadIdx.x % 4;
    store(args, sum[0], row, column, t);
    store(args, sum[1], row + 64, column, t);
  }

  __device__ static bool has_beside(const Args& args) { return args.scaled_hidden != nullptr; }

  // This thread's share of scaled_hidden = v hidden.
  __device__ static void beside(const Args& args, int index, int count) {
    const int per_row = args.schedule.columns / 8;
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
};

}  // namespace

bool linear_softcap_ce_hidden_sm90_supports(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kMax = int64_t{1} << 30;
  if (shape.rows <= 0 || shape.rows > kMax || shape.vocab > kMax || shape.width > kMax ||
      shape.vocab % 8 != 0 || shape.width % 8 != 0 ||
      device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) {
    return false;
  }
  const int64_t tiles = plain_product::cluster_tiles(shape.rows, shape.width);
  const int64_t clusters = multiprocessor_count() / plain_product::kCluster;
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
  args.chunks = shape.rows * (shape.width / 8);
  plain_product::launch<HiddenEpilogue>({.left = in.factor,
                                         .right = in.weight,
                                         .rows = shape.rows,
                                         .columns = shape.width,
                                         .depth = shape.vocab,
                                         .left_ld = in.factor_ld},
                                        args, stream);
}

}  // namespace pgolf
