// muon_direction_sm90 of muon_step.h: the directions go straight to where newton_schulz_sm90 starts from, so
// that nothing between the gradient and the first product passes through memory a second time.
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/cuda_check.cuh"
#include "kernels/muon_momentum.cuh"
#include "kernels/muon_step.h"
#include "kernels/newton_schulz_sm90_scale.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeld = 4;  // spans of a row that stay in registers

struct InputBank {
  MuonPolarInput bank;
  int first_matrix;
};

struct InputArgs {
  InputBank banks[kNsMaxBanks];
  int count;
  NsPrepared prepared;
  const float* scalars;
  MuonOptions options;
  float eps;
};

// A warp a row. Where rows are normalised the norm of the matrix is nearly known beforehand, and x is written
// at once; otherwise in a second pass, that reads the gradient and the new momentum again.
template <typename G, typename M>
__global__ void __cluster_dims__(ns90::kParts, 1, 1) __launch_bounds__(kThreads, 2)
    muon_input_kernel(const __grid_constant__ InputArgs args) {
  const int matrix = static_cast<int>(blockIdx.x) / ns90::kParts, part = blockIdx.x % ns90::kParts;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < args.prepared.counter_count; i += kThreads) args.prepared.counters[i] = 0;
  }
  int which = args.count - 1;
  while (args.banks[which].first_matrix > matrix) --which;
  const MuonPolarInput& bank = args.banks[which].bank;
  const int64_t cols = bank.cols, start = (matrix - args.banks[which].first_matrix) * bank.rows * cols;
  const int64_t begin = bank.rows * part / ns90::kParts + threadIdx.x / kWarp,
                end = bank.rows * (part + 1) / ns90::kParts;
  const G* grad = static_cast<const G*>(bank.grad) + start;
  M* momentum = static_cast<M*>(bank.momentum) + start;
  __half* x = static_cast<__half*>(bank.x) + start;
  const float mu = args.scalars[kMuonMomentum], grad_scale = args.scalars[kMuonGradScale];
  const float gain = grad_scale * (args.options.lerp ? 1.0f - mu : 1.0f);
  const bool finite = isfinite(grad_scale), nesterov = args.options.nesterov;
  const bool row_normalize = args.options.row_normalize && finite, held = cols <= kHeld * kSpan;
  const int64_t lane = threadIdx.x % kWarp * kVector;

  auto direction = [&](auto first, float (&u)[kVector], int64_t row, int64_t column) {
    momentum8<first.value>(u, grad + row * cols + column, momentum + row * cols + column, kVector, true, mu,
                           gain, nesterov);
  };
  auto store = [&](const float (&u)[kVector], const ns90::PowerOfTwo& power, float scale, int64_t row,
                   int64_t column) {
    Pack<__half> pack;
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) pack.value[i] = __float2half_rn(power(u[i] * scale));
    *reinterpret_cast<Pack<__half>*>(x + row * cols + column) = pack;
  };
  // Rows of norm 1 make a matrix of norm sqrt(rows), less where some are zero.
  int exponent;
  frexpf(sqrtf(static_cast<float>(bank.rows)), &exponent);
  exponent = ns90::kNormExponent - exponent;
  const ns90::PowerOfTwo expected(exponent);

  ns90::Squares squares;
  for (int64_t row = begin; finite && row < end; row += kWarps) {
    float u[kHeld][kVector];
    ns90::Squares mine;
    for (int64_t base = lane; base < cols; base += kHeld * kSpan) {
      PGOLF_UNROLL
      for (int h = 0; h < kHeld; ++h) {
        if (base + h * kSpan >= cols) continue;
        direction(std::true_type{}, u[h], row, base + h * kSpan);
        PGOLF_UNROLL
        for (int i = 0; i < kVector; ++i) mine.add(u[h][i]);
      }
    }
    float scale = 1.0f;
    if (row_normalize) {
      float sum = mine.sum;
      PGOLF_UNROLL
      for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      scale = 1.0f / fmaxf(sqrtf(sum), kMuonRowEps);
      for (int64_t base = lane; base < cols; base += kHeld * kSpan) {
        PGOLF_UNROLL
        for (int h = 0; h < kHeld; ++h) {
          if (base + h * kSpan >= cols) continue;
          if (!held) direction(std::false_type{}, u[h], row, base + h * kSpan);
          store(u[h], expected, scale, row, base + h * kSpan);
        }
      }
    }
    squares.sum += mine.sum * scale * scale;
    squares.low += mine.low * scale * scale;
    squares.high += mine.high * scale * scale;
  }
  const ns90::Scale scale = ns90::cluster_scale<kThreads>(
      squares, args.prepared.partials + 3 * ns90::kParts * matrix, part, args.eps);
  if (part == 0 && threadIdx.x == 0) {
    args.prepared.sigma[matrix] =
        row_normalize ? ldexpf(scale.sigma, scale.exponent - exponent) : scale.sigma;
  }
  if (row_normalize) return;
  const ns90::PowerOfTwo power(scale.exponent);
  for (int64_t row = begin; row < end; row += kWarps) {
#pragma unroll 2
    for (int64_t column = lane; column < cols; column += kSpan) {
      float u[kVector] = {};
      if (finite) direction(std::false_type{}, u, row, column);
      store(u, power, 1.0f, row, column);
    }
  }
}

}  // namespace

template <typename G, typename M>
void muon_direction_sm90(const MuonPolarInput* banks, int count, const NsPrepared& prepared, float eps,
                         const float* scalars, MuonOptions options, CUstream_st* stream) {
  InputArgs args{};
  args.count = count;
  args.prepared = prepared;
  args.scalars = scalars;
  args.options = options;
  args.eps = eps;
  int64_t matrices = 0;
  for (int i = 0; i < count; ++i) {
    args.banks[i] = {banks[i], static_cast<int>(matrices)};
    matrices += banks[i].matrices;
  }
  muon_input_kernel<typename DeviceType<G>::type, typename DeviceType<M>::type>
      <<<grid_blocks(matrices * ns90::kParts, 1, "muon_step"), kThreads, 0, stream>>>(args);
  PGOLF_LAUNCH_CHECK();
}

template void muon_direction_sm90<float, float>(const MuonPolarInput*, int, const NsPrepared&, float,
                                                const float*, MuonOptions, CUstream_st*);
template void muon_direction_sm90<float, bf16>(const MuonPolarInput*, int, const NsPrepared&, float,
                                               const float*, MuonOptions, CUstream_st*);
template void muon_direction_sm90<bf16, float>(const MuonPolarInput*, int, const NsPrepared&, float,
                                               const float*, MuonOptions, CUstream_st*);
template void muon_direction_sm90<bf16, bf16>(const MuonPolarInput*, int, const NsPrepared&, float,
                                              const float*, MuonOptions, CUstream_st*);

}  // namespace pgolf
