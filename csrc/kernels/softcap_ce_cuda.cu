// CUDA kernels of softcap_ce.h: one block per row, one read of the logits forward; one read, one write
// backward.
//
// With e = exp(-2|x| / cap) and q = 1 / (1 + e), both in full precision:
//   z - cap = -2 cap r,  r = x > 0 ? e q : q          1 - tanh^2 = 4 e q^2
// For cap <= kFixedOffsetCap the sum needs no running maximum: |z| <= cap, so exp(z - cap) is at least exp(-2
// cap), a normal float32. Three special-function instructions an element, 0.65 ms at 98304 x 8192 on an H100
// (KERNELS D.2).
#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx.cuh"
#include "kernels/reduce.cuh"
#include "kernels/softcap_ce.h"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
// 16-byte loads in flight per thread.
constexpr int kUnroll = 4;
// Caps the kernels at 64 registers: 32 warps to hide the special-function latency behind.
constexpr int kBlocksPerSm = 4;
constexpr float kFixedOffsetCap = 40.0f;  // exp(-80) = 1.8e-35
constexpr float kLog2e = 1.44269504f;
constexpr float kNan = __builtin_nanf("");

struct Capped {
  float e;                                                  // exp(-2|x| / cap)
  float q;                                                  // 1 / (1 + e)
  float r;                                                  // (cap - z) / (2 cap)
  __device__ __forceinline__ Capped(float x, float rate) {  // rate = 2 log2(e) / cap
    e = ex2_approx(-fabsf(x) * rate);
    q = rcp_approx(1.0f + e);
    r = x > 0.0f ? e * q : q;
  }
  __device__ __forceinline__ float slope() const { return 4.0f * e * q * q; }
};

struct RowResult {
  float loss;
  float lse;
};

// `others` and `own` are the sums of exp(z - top) without and with only the target, `offset` is z_target -
// top. Where the target dominates, log1p keeps the relative precision of a loss near 0.
__device__ __forceinline__ RowResult finish_row(float others, float own, float offset, float top) {
  const float log_sum = logf(others + own);
  return {others < own ? log1pf(others / own) : log_sum - offset, top + log_sum};
}

// Sum of exp(z - cap) over all but the target.
struct FixedSum {
  float sum;
  __device__ static FixedSum empty() { return {0.0f}; }
  __device__ __forceinline__ void add(float x, float cap, float rate) {
    sum += ex2_approx(-2.0f * kLog2e * cap * Capped(x, rate).r);
  }
  __device__ RowResult finish(float x_target, float cap, float rate) const {
    const float offset = -2.0f * cap * Capped(x_target, rate).r;
    return finish_row(sum, ex2_approx(offset * kLog2e), offset, cap);
  }
  __device__ static FixedSum merge(FixedSum a, FixedSum b) { return {a.sum + b.sum}; }
  __device__ static FixedSum shuffle_down(FixedSum v, int offset) {
    return {__shfl_down_sync(0xffffffffu, v.sum, offset)};
  }
};

// Sum of exp(z - largest z so far) over all but the target, for caps whose range exp() cannot hold. tanhf,
// because for |x| far below the cap the form above loses cap * 1e-7.
struct OnlineSum {
  float sum;
  float largest;
  __device__ static OnlineSum empty() { return {0.0f, -INFINITY}; }
  __device__ __forceinline__ void add(float x, float cap, float) {
    const float z = cap * tanhf(x / cap);
    if (z > largest) {
      sum *= __expf(largest - z);
      largest = z;
    }
    sum += __expf(z - largest);
  }
  __device__ RowResult finish(float x_target, float cap, float) const {
    const float z = cap * tanhf(x_target / cap);
    const float top = fmaxf(largest, z);
    return finish_row(sum * __expf(largest - top), __expf(z - top), z - top, top);
  }
  __device__ static OnlineSum merge(OnlineSum a, OnlineSum b) {
    const float top = fmaxf(a.largest, b.largest);
    if (top == -INFINITY) return {a.sum + b.sum, top};  // nothing seen, or nothing but NaN
    return {a.sum * __expf(a.largest - top) + b.sum * __expf(b.largest - top), top};
  }
  __device__ static OnlineSum shuffle_down(OnlineSum v, int offset) {
    return {__shfl_down_sync(0xffffffffu, v.sum, offset), __shfl_down_sync(0xffffffffu, v.largest, offset)};
  }
};

// How a row splits into a scalar head, 16-byte packs and a scalar tail.
struct RowSplit {
  int64_t head;   // elements before the first aligned pack
  int64_t packs;  // aligned packs
  int64_t tail;   // first element after the packs
};

// `other` is a second row walked in step (or the same); unless both align together everything is head.
template <typename D>
__device__ __forceinline__ RowSplit split_row(const D* row, const void* other, int64_t count) {
  const uint64_t address = reinterpret_cast<uint64_t>(row);
  if ((address - reinterpret_cast<uint64_t>(other)) % 16 != 0) return {count, 0, count};
  int64_t head = static_cast<int64_t>((16 - address % 16) % 16 / sizeof(D));
  head = head < count ? head : count;
  const int64_t packs = (count - head) / Pack<D>::kCount;
  return {head, packs, head + packs * Pack<D>::kCount};
}

// Index of column `target` within a pack that starts at column `first`, or -1.
template <int Count>
__device__ __forceinline__ int place_in_pack(int64_t target, int64_t first) {
  const int64_t place = target - first;
  return place >= 0 && place < Count ? static_cast<int>(place) : -1;
}

template <typename D, typename Sum>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    forward_kernel(const D* logits, const int64_t* targets, float* losses, float* lses,
                   SoftcapCeShape shape) {
  __shared__ Sum staged[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  if (target == shape.ignore_index || target < 0 || target >= shape.vocab) {
    const float value = target == shape.ignore_index ? 0.0f : kNan;
    if (threadIdx.x == 0) losses[row] = lses[row] = value;
    return;
  }
  const D* x = logits + row * shape.vocab;
  const float cap = shape.cap;
  const float rate = 2.0f * kLog2e / cap;
  const RowSplit split = split_row(x, x, shape.vocab);
  Sum total = Sum::empty();
  for (int64_t j = threadIdx.x; j < split.head; j += kThreads) {
    if (j != target) total.add(load_float(x[j]), cap, rate);
  }
  for (int64_t j = split.tail + threadIdx.x; j < shape.vocab; j += kThreads) {
    if (j != target) total.add(load_float(x[j]), cap, rate);
  }
  constexpr int kCount = Pack<D>::kCount;
  const Pack<D>* packs = reinterpret_cast<const Pack<D>*>(x + split.head);
  for (int64_t first = threadIdx.x; first < split.packs; first += kThreads * kUnroll) {
    Pack<D> loaded[kUnroll];
    PGOLF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < split.packs) loaded[u] = packs[first + u * kThreads];
    }
    PGOLF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = first + u * kThreads;
      if (pack >= split.packs) break;
      const int own = place_in_pack<kCount>(target, split.head + pack * kCount);
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (i != own) total.add(load_float(loaded[u].value[i]), cap, rate);
      }
    }
  }
  total = block_reduce<kThreads>(total, staged, Sum::merge, Sum::shuffle_down);
  if (threadIdx.x != 0) return;
  const RowResult result = total.finish(load_float(x[target]), cap, rate);
  losses[row] = result.loss;
  lses[row] = result.lse;
}

// Gradient of one logit: `weight` is the upstream gradient, `own` says whether this is the target.
struct Gradient {
  float cap, rate, lse, weight, own_factor;  // own_factor = p_target - 1 = expm1(-loss)
  bool fixed_offset;

  __device__ __forceinline__ float operator()(float x, bool own) const {
    const Capped capped(x, rate);
    // As in the forward kernel, so that the probabilities of a row add up to 1.
    const float offset = fixed_offset ? fmaf(-2.0f * cap, capped.r, cap - lse) : cap * tanhf(x / cap) - lse;
    const float p = ex2_approx(offset * kLog2e);
    return weight * (own ? own_factor : p) * capped.slope();
  }
};

template <typename D, bool FixedOffset>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    backward_kernel(const float* grad_losses, const D* logits, const int64_t* targets, const float* losses,
                    const float* lses, D* grads, SoftcapCeShape shape) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  const bool ignored = target == shape.ignore_index;
  const D* x = logits + row * shape.vocab;
  D* grad = grads + row * shape.vocab;
  const Gradient gradient{shape.cap,        2.0f * kLog2e / shape.cap, lses[row],
                          grad_losses[row], expm1f(-losses[row]),      FixedOffset};
  const RowSplit split = split_row(x, grad, shape.vocab);
  auto scalar = [&](int64_t j) {
    grad[j] = store_float<D>(ignored ? 0.0f : gradient(load_float(x[j]), j == target));
  };
  for (int64_t j = threadIdx.x; j < split.head; j += kThreads) scalar(j);
  for (int64_t j = split.tail + threadIdx.x; j < shape.vocab; j += kThreads) scalar(j);

  constexpr int kCount = Pack<D>::kCount;
  const Pack<D>* packs = reinterpret_cast<const Pack<D>*>(x + split.head);
  Pack<D>* out = reinterpret_cast<Pack<D>*>(grad + split.head);
  for (int64_t first = threadIdx.x; first < split.packs; first += kThreads * kUnroll) {
    Pack<D> loaded[kUnroll];
    PGOLF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < split.packs) loaded[u] = packs[first + u * kThreads];
    }
    PGOLF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = first + u * kThreads;
      if (pack >= split.packs) break;
      const int own = place_in_pack<kCount>(target, split.head + pack * kCount);
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const float value = ignored ? 0.0f : gradient(load_float(loaded[u].value[i]), i == own);
        loaded[u].value[i] = store_float<D>(value);
      }
      out[pack] = loaded[u];
    }
  }
}

}  // namespace

template <typename T>
void softcap_ce_forward_cuda(const T* logits, const int64_t* target, float* loss, float* lse,
                             const SoftcapCeShape& shape, CUstream_st* stream) {
  if (shape.rows == 0) return;
  using D = typename DeviceType<T>::type;
  const D* x = reinterpret_cast<const D*>(logits);
  const unsigned int blocks = grid_blocks(shape.rows, 1, "softcap_ce");
  if (shape.cap <= kFixedOffsetCap) {
    forward_kernel<D, FixedSum><<<blocks, kThreads, 0, stream>>>(x, target, loss, lse, shape);
  } else {
    forward_kernel<D, OnlineSum><<<blocks, kThreads, 0, stream>>>(x, target, loss, lse, shape);
  }
  PGOLF_LAUNCH_CHECK();
}

template <typename T>
void softcap_ce_backward_cuda(const float* grad_loss, const T* logits, const int64_t* target,
                              const float* loss, const float* lse, T* grad_logits,
                              const SoftcapCeShape& shape, CUstream_st* stream) {
  if (shape.rows == 0) return;
  using D = typename DeviceType<T>::type;
  const D* x = reinterpret_cast<const D*>(logits);
  D* grad = reinterpret_cast<D*>(grad_logits);
  const unsigned int blocks = grid_blocks(shape.rows, 1, "softcap_ce_backward");
  if (shape.cap <= kFixedOffsetCap) {
    backward_kernel<D, true><<<blocks, kThreads, 0, stream>>>(grad_loss, x, target, loss, lse, grad, shape);
  } else {
    backward_kernel<D, false><<<blocks, kThreads, 0, stream>>>(grad_loss, x, target, loss, lse, grad, shape);
  }
  PGOLF_LAUNCH_CHECK();
}

template void softcap_ce_forward_cuda(const float*, const int64_t*, float*, float*, const SoftcapCeShape&,
                                      CUstream_st*);
template void softcap_ce_forward_cuda(const bf16*, const int64_t*, float*, float*, const SoftcapCeShape&,
                                      CUstream_st*);
template void softcap_ce_forward_cuda(const f16*, const int64_t*, float*, float*, const SoftcapCeShape&,
                                      CUstream_st*);
template void softcap_ce_backward_cuda(const float*, const float*, const int64_t*, const float*, const float*,
                                       float*, const SoftcapCeShape&, CUstream_st*);
template void softcap_ce_backward_cuda(const float*, const bf16*, const int64_t*, const float*, const float*,
                                       bf16*, const SoftcapCeShape&, CUstream_st*);
template void softcap_ce_backward_cuda(const float*, const f16*, const int64_t*, const float*, const float*,
                                       f16*, const SoftcapCeShape&, CUstream_st*);

}  // namespace pgolf
