// muon_direction_sm90: the directions go straight to where newton_schulz_sm90 starts from, so that nothing
// between the gradient and the first product passes through memory a second time.
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/cuda_check.cuh"
#include "kernels/muon_direction_sm90.h"
#include "kernels/muon_momentum.cuh"
#include "kernels/newton_schulz_sm90_scale.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // per multiprocessor
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeld = 8;   // spans that a warp keeps in shared memory: several short rows, or one long one
constexpr int kBatch = 4;  // spans whose loads are under way at once

struct InputBank {
  MuonPolarInput bank;
  int first_cluster;  // one cluster per matrix, the largest matrices first
  int first_matrix;   // in the order of the caller
};

struct InputArgs {
  InputBank banks[kNsMaxBanks];
  int count;
  NsPrepared prepared;
  const float* hyper;
  MuonOptions options;
  float eps;
};

// A block's part of one matrix, and what turns gradients into directions.
template <typename G, typename M>
struct MatrixPart {
  const G* grad;
  M* momentum;
  __half* x;
  int64_t cols, begin, end;  // rows of this part
  float mu, gain;
  bool nesterov;

  __device__ __forceinline__ void store(const float (&u)[kVector], const PowerOfTwo& power,
                                        int64_t at) const {
    Pack<__half> pack;
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) pack.value[i] = __float2half_rn(power(u[i]));
    *reinterpret_cast<Pack<__half>*>(x + at) = pack;
  }
};

// Places the spans of the rows that a warp takes at once: at[h] is this thread's first element of span h,
// from the first row on, or -1. Returns the set of spans that start a row, one bit each.
__device__ __forceinline__ unsigned int place_spans(int (&at)[kHeld], int rows, int spans, int cols,
                                                    int lane) {
  int of_row = 0, of_span = 0;
  unsigned int starts = 0;
  // Without divisions: `spans` is known at run time only.
  PGOLF_UNROLL
  for (int h = 0; h < kHeld; ++h) {
    const int column = of_span * kSpan + lane;
    at[h] = of_row < rows && column < cols ? of_row * cols + column : -1;
    starts |= (of_span == 0 ? 1u : 0u) << h;
    if (++of_span == spans) {
      of_span = 0;
      ++of_row;
    }
  }
  return starts;
}

// Makes the sums of spans the sums of whole rows, in all lanes: over the lanes, then over the spans of a row,
// forth and back.
__device__ __forceinline__ void sum_rows(float (&sums)[kHeld], unsigned int starts) {
  PGOLF_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    PGOLF_UNROLL
    for (int h = 0; h < kHeld; ++h) sums[h] += __shfl_xor_sync(kAllLanes, sums[h], offset);
  }
  // Forth: the last span of a row gets the row's sum. Back: the others get it from there.
  PGOLF_UNROLL
  for (int h = 1; h < kHeld; ++h) sums[h] += (starts >> h & 1u) != 0 ? 0.0f : sums[h - 1];
  PGOLF_UNROLL
  for (int h = kHeld - 2; h >= 0; --h) sums[h] = (starts >> (h + 1) & 1u) != 0 ? sums[h] : sums[h + 1];
}

// Rows are normalised, so the norm of the matrix is nearly known beforehand and x is written at once, in one
// pass. A warp takes as many rows as it can hold; each thread keeps its u in shared memory, so that registers
// are free for loads under way.
template <typename G, typename M>
__device__ __forceinline__ Squares normalized_rows(const MatrixPart<G, M>& part, int spans,
                                                   const PowerOfTwo& power) {
  const int rows_at_once = kHeld / spans, cols = static_cast<int>(part.cols);
  const int lane = threadIdx.x % kWarp * kVector;
  extern __shared__ float4 held[];  // (kHeld, 2, kThreads)
  Squares squares;
  for (int64_t row = part.begin + threadIdx.x / kWarp * rows_at_once; row < part.end;
       row += kWarps * rows_at_once) {
    const G* const grad = part.grad + row * cols;
    M* const momentum = part.momentum + row * cols;
    const int rows = static_cast<int>(min(part.end - row, static_cast<int64_t>(rows_at_once)));
    float sums[kHeld];
    int at[kHeld];
    const unsigned int starts = place_spans(at, rows, spans, cols, lane);
    // All loads of a batch start before the first store. Loading first and then storing took this kernel from
    // 139 to 126 us on an H100 (docs/findings.md, 2026-11-24).
    PGOLF_UNROLL
    for (int batch = 0; batch < kHeld; batch += kBatch) {
      Raw8<G> grads[kBatch];
      Raw8<M> momenta[kBatch];
      PGOLF_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        if (at[batch + b] < 0) continue;
        grads[b].load(grad + at[batch + b]);
        momenta[b].load(momentum + at[batch + b]);
      }
      PGOLF_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int h = batch + b;
        sums[h] = 0.0f;
        if (at[h] < 0) continue;
        float g[kVector], m[kVector], u[kVector];
        grads[b].widen(g);
        momenta[b].widen(m);
        direction8<true>(u, g, m, momentum + at[h], kVector, true, part.mu, part.gain, part.nesterov);
        PGOLF_UNROLL
        for (int i = 0; i < kVector; ++i) sums[h] = fmaf(u[i], u[i], sums[h]);
        // Each thread reads back only what it wrote itself, so no barrier is needed.
        held[2 * h * kThreads + threadIdx.x] = make_float4(u[0], u[1], u[2], u[3]);
        held[(2 * h + 1) * kThreads + threadIdx.x] = make_float4(u[4], u[5], u[6], u[7]);
      }
    }
    sum_rows(sums, starts);
    PGOLF_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      if (at[h] < 0) continue;
      // kMuonRowEps keeps rows of zeros at zero. Because of such rows the norm of the matrix is not quite
      // known beforehand, and the squares are added although other rows give 1.
      const float scale = 1.0f / fmaxf(sqrtf(sums[h]), kMuonRowEps);
      const float4 low = held[2 * h * kThreads + threadIdx.x];
      const float4 high = held[(2 * h + 1) * kThreads + threadIdx.x];
      float u[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      PGOLF_UNROLL
      for (int i = 0; i < kVector; ++i) {
        u[i] *= scale;
        squares.add(u[i]);
      }
      part.store(u, power, row * cols + at[h]);
    }
  }
  return squares;
}

// Rows of any length in two passes. The first stores the momentum, adds the squares of a row, after its
// normalisation if it has one, and returns the factor of the row; the second writes x, for which it reads the
// gradient and the new momentum again.
template <typename G, typename M>
__device__ __forceinline__ float row_scale(const MatrixPart<G, M>& part, int64_t row, bool normalize,
                                           Squares& squares) {
  const int64_t lane = threadIdx.x % kWarp * kVector;
  Squares mine;
#pragma unroll 4
  for (int64_t column = lane; column < part.cols; column += kSpan) {
    float u[kVector];
    const int64_t at = row * part.cols + column;
    load_direction8<true>(u, part.grad + at, part.momentum + at, kVector, true, part.mu, part.gain,
                          part.nesterov);
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) mine.add(u[i]);
  }
  float scale = 1.0f;
  if (normalize) {
    // All lanes need the sum of the row.
    float sum = mine.sum;
    PGOLF_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    scale = 1.0f / fmaxf(sqrtf(sum), kMuonRowEps);
  }
  // Each lane adds the squares of its own elements; the sum over lanes and warps comes once, at the end.
  squares.sum += mine.sum * scale * scale;
  squares.low += mine.low * scale * scale;
  squares.high += mine.high * scale * scale;
  return scale;
}

template <typename G, typename M>
__device__ __forceinline__ void write_row(const MatrixPart<G, M>& part, int64_t row, float scale, bool finite,
                                          const PowerOfTwo& power) {
  const int64_t lane = threadIdx.x % kWarp * kVector;
#pragma unroll 4
  for (int64_t column = lane; column < part.cols; column += kSpan) {
    float u[kVector] = {};
    const int64_t at = row * part.cols + column;
    // A step that is skipped iterates zeros, and leaves gradient and momentum alone.
    if (finite) {
      load_direction8<false>(u, part.grad + at, part.momentum + at, kVector, true, part.mu, part.gain,
                             part.nesterov);
    }
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) u[i] *= scale;
    part.store(u, power, at);
  }
}

template <typename G, typename M>
__global__ void __cluster_dims__(ns90::kParts, 1, 1) __launch_bounds__(kThreads, kBlocks)
    muon_input_kernel(const __grid_constant__ InputArgs args) {
  // A matrix per cluster: its blocks share the rows and exchange their squares through memory.
  const int cluster = static_cast<int>(blockIdx.x) / ns90::kParts, index = blockIdx.x % ns90::kParts;
  // The products start after this kernel, so that one block may zero their counters.
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < args.prepared.counter_count; i += kThreads) args.prepared.counters[i] = 0;
  }
  int which = args.count - 1;
  while (args.banks[which].first_cluster > cluster) --which;
  const MuonPolarInput& bank = args.banks[which].bank;
  const int in_bank = cluster - args.banks[which].first_cluster;
  const int matrix = args.banks[which].first_matrix + in_bank;
  const float mu = args.hyper[kHyperMomentum], grad_scale = args.hyper[kHyperGradScale];
  const bool finite = isfinite(grad_scale), normalize = args.options.row_normalize && finite;
  const int64_t start = static_cast<int64_t>(in_bank) * bank.rows * bank.cols;
  const MatrixPart<G, M> part{.grad = static_cast<const G*>(bank.grad) + start,
                              .momentum = static_cast<M*>(bank.momentum) + start,
                              .x = static_cast<__half*>(bank.x) + start,
                              .cols = bank.cols,
                              .begin = bank.rows * index / ns90::kParts,
                              .end = bank.rows * (index + 1) / ns90::kParts,
                              .mu = mu,
                              .gain = grad_scale * (args.options.lerp ? 1.0f - mu : 1.0f),
                              .nesterov = args.options.nesterov};
  const int64_t spans = (bank.cols + kSpan - 1) / kSpan, first = part.begin + threadIdx.x / kWarp;
  // Rows of norm 1 make a matrix of norm sqrt(rows), less where some are zero.
  int expected;
  frexpf(sqrtf(static_cast<float>(bank.rows)), &expected);
  expected = kNormExponent - expected;

  Squares squares;
  if (normalize && spans <= kHeld) {
    squares = normalized_rows(part, static_cast<int>(spans), PowerOfTwo(expected));
  } else if (finite) {
    for (int64_t row = first; row < part.end; row += kWarps) {
      const float scale = row_scale(part, row, normalize, squares);
      if (normalize) write_row(part, row, scale, true, PowerOfTwo(expected));
    }
  }
  const Scale scale = ns90::cluster_scale<kThreads>(
      squares, args.prepared.partials + 3 * ns90::kParts * matrix, index, args.eps);
  // x has been written with the expected exponent where rows are normalised; sigma makes up for the
  // difference.
  if (index == 0 && threadIdx.x == 0) {
    args.prepared.sigma[matrix] = normalize ? ldexpf(scale.sigma, scale.exponent - expected) : scale.sigma;
  }
  if (normalize) return;
  // Without normalised rows the exponent is known only now.
  for (int64_t row = first; row < part.end; row += kWarps)
    write_row(part, row, 1.0f, finite, PowerOfTwo(scale.exponent));
}

}  // namespace

template <typename G, typename M>
void muon_direction_sm90(const MuonPolarInput* banks, int count, const NsPrepared& prepared, float eps,
                         const float* hyper, MuonOptions options, CUstream_st* stream) {
  InputArgs args{};
  args.count = count;
  args.prepared = prepared;
  args.hyper = hyper;
  args.options = options;
  args.eps = eps;
  int64_t matrices = 0;
  for (int i = 0; i < count; ++i) {
    args.banks[i] = {.bank = banks[i], .first_cluster = 0, .first_matrix = static_cast<int>(matrices)};
    matrices += banks[i].matrices;
  }
  // The largest matrices take longest and start first, so that the last blocks are short.
  std::stable_sort(args.banks, args.banks + count, [](const InputBank& a, const InputBank& b) {
    return a.bank.rows * a.bank.cols > b.bank.rows * b.bank.cols;
  });
  for (int i = 1; i < count; ++i) {
    args.banks[i].first_cluster =
        args.banks[i - 1].first_cluster + static_cast<int>(args.banks[i - 1].bank.matrices);
  }
  const auto kernel = muon_input_kernel<typename DeviceType<G>::type, typename DeviceType<M>::type>;
  // Only normalized_rows keeps directions in shared memory: two float4 per span and thread.
  const int held = options.row_normalize ? static_cast<int>(sizeof(float4)) * 2 * kHeld * kThreads : 0;
  PGOLF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, held));
  kernel<<<grid_blocks(matrices * ns90::kParts, 1, "muon_step"), kThreads, held, stream>>>(args);
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
