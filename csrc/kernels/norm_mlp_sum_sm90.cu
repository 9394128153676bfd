// Hopper kernel of norm_mlp.h: out = residual + a b - (rho^2 S / width) x.
//
// A product of plain_product_sm90.cuh. Half of what the epilogue adds is fetched to registers before the
// product, the other half to the L2 cache.
#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/norm_mlp.h"
#include "kernels/plain_product_sm90.cuh"

namespace pgolf {
namespace norm_mlp_sum {

struct Args {
  const bf16* x;         // or null
  const bf16* residual;  // or null
  const float* rate;     // rho^2 S / width of each row
  bf16* out;
  plain_product::Schedule schedule;
};

// What the epilogue adds to 64 rows: of rows r and r + 8, columns 32 run + 8 t .. 8 t + 7.
struct Addends {
  uint4 x[2][4], residual[2][4];
  float rate[2];

  __device__ __forceinline__ void load_row(const Args& args, int half, int row, int column) {
    const int64_t at = static_cast<int64_t>(row) * args.schedule.columns + column;
    PGOLF_UNROLL
    for (int run = 0; run < 4; ++run) {
      const bool inside = row < args.schedule.rows && column + run * 32 < args.schedule.columns;
      x[half][run] =
          inside && args.x != nullptr ? fetch16_alone(args.x + at + run * 32) : make_uint4(0, 0, 0, 0);
      residual[half][run] = inside && args.residual != nullptr ? fetch16_alone(args.residual + at + run * 32)
                                                               : make_uint4(0, 0, 0, 0);
    }
    rate[half] = row < args.schedule.rows && args.x != nullptr ? __ldg(args.rate + row) : 0.0f;
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
    if (row < args.schedule.rows && column + run * 32 < args.schedule.columns) {
      *reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(row) * args.schedule.columns + column +
                                run * 32) = v;
    }
  }
}

struct SumEpilogue {
  using Args = norm_mlp_sum::Args;
  Addends addends;
  int own_row, own_column;  // of this thread; kept because to compute them again takes a division

  __device__ __forceinline__ void fetch(const Args& args, const plain_product::Place& place) {
    const int t = threadIdx.x % 4;
    // Not the members themselves: the compiler orders the whole kernel's instructions by how it reads these.
    const int row = place.row(args.schedule), first = place.column(args.schedule), column = first + t * 8;
    own_row = row;
    own_column = column;
    PGOLF_UNROLL
    for (int half = 0; half < 2; ++half) {
      addends.load_row(args, half, row + 8 * half, column);
      // The other fragment's row, a line for each of the four lanes.
      const bf16* const from = t / 2 == 0 ? args.x : args.residual;
      const int later = row + 64 + 8 * half, line = first + t % 2 * 64;
      if (later < args.schedule.rows && line < args.schedule.columns && from != nullptr) {
        prefetch_line(from + static_cast<int64_t>(later) * args.schedule.columns + line);
      }
    }
  }

  __device__ __forceinline__ void finish(const Args& args, const float (&sum)[2][64],
                                         const plain_product::Place&) {
    const int t = threadIdx.x % 4;
    const int row = own_row, column = own_column;
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
};

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
  plain_product::launch<SumEpilogue>(
      {.left = in.a,
       .right = in.b,
       .rows = shape.rows,
       .columns = shape.width,
       .depth = shape.hidden,
       .left_ld = shape.hidden},
      {.x = in.x, .residual = in.residual, .rate = in.rate, .out = in.out, .schedule = {}}, stream);
}

}  // namespace pgolf
