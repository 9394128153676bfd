// CUDA kernels of linear_softcap_ce.h around the matrix products, for any GPU: one warp per row.
#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce.h"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Threads of a row of loss_kernel: few, as one of them does all the arithmetic of the row.
constexpr int kLossLanes = 8;
constexpr int kLossRows = kThreads / kLossLanes;
constexpr float kNan = __builtin_nanf("");

__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

__device__ __forceinline__ bool is_valid(int64_t target, const LinearSoftcapCeShape& shape) {
  return target >= 0 && target < shape.vocab;
}

// 1 + 2 z_loss lse. It is 0 for one lse only; 1e-6 there changes the gradient by 1e-6 of its largest element.
__device__ __forceinline__ float upstream_weight(float lse, const LinearSoftcapCeShape& shape) {
  constexpr float kLeast = 1e-6f;
  const float w = fmaf(2.0f * shape.z_loss, lse, 1.0f);
  return fabsf(w) < kLeast ? copysignf(kLeast, w) : w;
}

__global__ void __launch_bounds__(kThreads)
    loss_kernel(const float* partial_sums, int64_t tiles, const float* target_logits, const int64_t* targets,
                __nv_bfloat16* factor, int64_t factor_ld, float* losses, float* scales,
                LinearSoftcapCeShape shape) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLossRows + threadIdx.x / kLossLanes;
  const int lane = threadIdx.x % kLossLanes;
  float others = 0.0f;
  if (row < shape.rows) {
    _Pragma("unroll 8") for (int64_t i = lane; i < tiles; i += kLossLanes) others +=
        partial_sums[row * tiles + i];
  }
  for (int offset = kLossLanes / 2; offset > 0; offset /= 2) {
    others += __shfl_xor_sync(0xffffffffu, others, offset);
  }
  if (lane != 0 || row >= shape.rows) return;
  const int64_t target = targets[row];
  if (target == shape.ignore_index || !is_valid(target, shape)) {
    losses[row] = scales[row] = target == shape.ignore_index ? 0.0f : kNan;
    return;
  }
  // z - cap = -2 cap r and 1 - tanh^2 = 4 e q^2 do not cancel near the cap.
  const float x = target_logits[row];
  const float e = expf(-2.0f * fabsf(x) / shape.cap), q = 1.0f / (1.0f + e);
  const float offset = -2.0f * shape.cap * (x > 0.0f ? e * q : q);
  const float own = expf(offset);
  const float log_sum = logf(others + own);
  const float lse = shape.cap + log_sum;
  // Where the target dominates, log1p keeps the relative precision of a loss near 0.
  const float loss = others < own ? log1pf(others / own) : log_sum - offset;
  losses[row] = fmaf(shape.z_loss * lse, lse, loss);
  const float w = upstream_weight(lse, shape);
  scales[row] = w / (others + own);
  if (factor != nullptr) {
    const float slope = 4.0f * e * q * q;
    factor[row * factor_ld + target] =
        store_float<__nv_bfloat16>((others + own) * (expm1f(-loss) + (w - 1.0f) / w) * slope);
  }
}

// Calls body(first, pack) for every eight elements of a row, or body(i) where the row is not 16-byte aligned.
template <typename Vector, typename Scalar>
__device__ __forceinline__ void for_each_eight(int64_t width, bool aligned, const Vector& vector,
                                               const Scalar& scalar) {
  const int lane = threadIdx.x % kWarp;
  const int64_t packed = aligned ? width / 8 * 8 : 0;
  for (int64_t i = lane * 8; i < packed; i += kWarp * 8) vector(i);
  for (int64_t i = packed + lane; i < width; i += kWarp) scalar(i);
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer) % 16 == 0;
}

// to[i] = scale * from[i] for one row; `to` may be `from`.
__device__ __forceinline__ void scale_row(const __nv_bfloat16* from, float scale, __nv_bfloat16* to,
                                          int64_t width) {
  using Eight = Pack<__nv_bfloat16>;
  for_each_eight(
      width, is_aligned(from) && is_aligned(to),
      [&](int64_t i) {
        Eight pack = *reinterpret_cast<const Eight*>(from + i);
        PGOLF_UNROLL
        for (int k = 0; k < 8; ++k) {
          pack.value[k] = store_float<__nv_bfloat16>(scale * load_float(pack.value[k]));
        }
        *reinterpret_cast<Eight*>(to + i) = pack;
      },
      [&](int64_t i) { to[i] = store_float<__nv_bfloat16>(scale * load_float(from[i])); });
}

__global__ void __launch_bounds__(kThreads)
    factor_kernel(const float* grad_loss, int64_t grad_stride, const float* scales,
                  const __nv_bfloat16* hidden, float* row_scale, __nv_bfloat16* scaled_hidden, int64_t rows,
                  int64_t width) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  const float scale = scales[row];
  const float v = scale == 0.0f ? 0.0f : grad_loss[row * grad_stride] * scale;
  if (threadIdx.x % kWarp == 0) row_scale[row] = v;
  if (scaled_hidden == nullptr) return;
  scale_row(hidden + row * width, v, scaled_hidden + row * width, width);
}

__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(__nv_bfloat16* product, const float* row_scale, int64_t rows, int64_t width) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  scale_row(product + row * width, row_scale[row], product + row * width, width);
}

unsigned int row_blocks(int64_t rows) { return grid_blocks(rows, kWarps, "linear_softcap_ce"); }

}  // namespace

void linear_softcap_ce_loss_cuda(const float* partial_sums, int64_t tiles, const float* target_logit,
                                 const int64_t* target, bf16* factor, int64_t factor_ld, float* loss,
                                 float* scale, const LinearSoftcapCeShape& shape, CUstream_st* stream) {
  if (shape.rows == 0) return;
  const unsigned int blocks = grid_blocks(shape.rows, kLossRows, "linear_softcap_ce");
  loss_kernel<<<blocks, kThreads, 0, stream>>>(partial_sums, tiles, target_logit, target,
                                               reinterpret_cast<__nv_bfloat16*>(factor), factor_ld, loss,
                                               scale, shape);
  PGOLF_LAUNCH_CHECK();
}

void linear_softcap_ce_factor_cuda(const LinearSoftcapCeFactor& args, int64_t rows, int64_t width,
                                   CUstream_st* stream) {
  if (rows == 0) return;
  factor_kernel<<<row_blocks(rows), kThreads, 0, stream>>>(
      args.grad_loss, args.grad_stride, args.scale, reinterpret_cast<const __nv_bfloat16*>(args.hidden),
      args.row_scale, reinterpret_cast<__nv_bfloat16*>(args.scaled_hidden), rows, width);
  PGOLF_LAUNCH_CHECK();
}

void linear_softcap_ce_scale_rows_cuda(bf16* product, const float* row_scale, int64_t rows, int64_t width,
                                       CUstream_st* stream) {
  if (rows == 0) return;
  scale_rows_kernel<<<row_blocks(rows), kThreads, 0, stream>>>(reinterpret_cast<__nv_bfloat16*>(product),
                                                               row_scale, rows, width);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
