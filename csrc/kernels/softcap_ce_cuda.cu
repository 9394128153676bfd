// CUDA kernels of softcap_ce.h, one block per row.
//
// With e = exp(-2|x| / cap) and q = 1 / (1 + e), both in full precision:
//   z - cap = -2 cap r,  r = x > 0 ? e q : q          1 - tanh^2 = 4 e q^2
// For cap <= kFixedOffsetCap the sum needs no running maximum: |z| <= cap, so exp(z - cap) is at least
// exp(-2 cap), a normal float32. Each element costs three special-function instructions. A multiprocessor of
// an H100 runs 16 of them per clock (CUDA C++ Programming Guide, table of arithmetic throughput), so 98304 x
// 8192 elements take 0.65 ms on 132 multiprocessors at 1.755 GHz. That is less than the 1.07 ms of a copy,
// one read and one write (bench/results/20261123_nvidia-h100-80gb-hbm3_kernels/linear_softcap_ce.log), so
// the memory decides.
//
// Loss and gradient at once: a row of up to 32768 16-bit elements waits in registers between the sum and the
// gradient (gradient_kernel); a longer or misaligned one is read twice, the second time mostly from L2
// (two_pass_kernel).
#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx.cuh"
#include "kernels/reduce.cuh"
#include "kernels/softcap_ce.h"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
// 16-byte loads in flight per thread where it only reads, and where it writes as well.
constexpr int kReadUnroll = 4, kStoreUnroll = 2;
// Caps the kernels at 64 registers: 32 warps to hide the special-function latency behind.
constexpr int kBlocksPerSm = 4;
constexpr int kWideThreads = 512;  // of two_pass_kernel
// gradient_kernel: elements that a thread holds, and threads per multiprocessor.
template <typename D>
constexpr int kHeld = sizeof(D) == 2 ? 32 : 16;
constexpr int kHeldThreads = 1024;
constexpr float kFixedOffsetCap = 40.0f;  // exp(-80) = 1.8e-35
constexpr float kLog2e = 1.44269504f;
constexpr float kNan = __builtin_nanf("");

// 16 bytes that are not read again.
template <typename D>
__device__ __forceinline__ Pack<D> load_streaming(const Pack<D>* from) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
  Pack<D> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <typename D>
__device__ __forceinline__ void store_streaming(Pack<D>* to, const Pack<D>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(to), bits);
}

// 2 log2(e) / cap; 0 for an infinite cap.
__device__ __forceinline__ float exp_rate(const SoftcapCeShape& shape) {
  return __fdividef(2.0f * kLog2e, shape.cap);
}

struct Capped {
  float q;   // 1 / (1 + e), e = exp(-2|x| / cap)
  float eq;  // e q
  float r;   // (cap - z) / (2 cap)
  __device__ __forceinline__ Capped(float x, float rate) {
    const float e = ex2_approx(-fabsf(x) * rate);
    q = rcp_approx(1.0f + e);
    eq = e * q;
    r = x > 0.0f ? eq : q;
  }
  __device__ __forceinline__ float quarter_slope() const { return eq * q; }
  __device__ __forceinline__ float slope() const { return 4.0f * quarter_slope(); }
};

// z where the form above does not hold its precision: tanhf, because for |x| far below the cap it loses cap *
// 1e-7. An infinite cap caps nothing.
__device__ __forceinline__ float cap_exactly(float x, float cap) {
  return isinf(cap) ? x : cap * tanhf(__fdividef(x, cap));
}

struct RowResult {
  float loss;
  float lse;
};

// `others` and `own` are the sums of exp(z - top) without and with only the target, `offset` is z_target -
// top. Where the target dominates, log1p keeps the relative precision of a loss near 0.
__device__ __forceinline__ RowResult finish_row(float others, float own, float offset, float top) {
  const float log_sum = logf(others + own);
  return {others < own ? log1pf(__fdividef(others, own)) : log_sum - offset, top + log_sum};
}

// Sum of exp(z - cap) over all but the target.
struct FixedSum {
  static constexpr bool kFixedOffset = true;
  float sum;
  __device__ static FixedSum empty() { return {0.0f}; }
  __device__ __forceinline__ void add(float x, float cap, float rate) {
    sum += ex2_approx(-2.0f * kLog2e * cap * Capped(x, rate).r);
  }
  // Returns exp(z - cap) (1 - tanh^2) / 4.
  __device__ __forceinline__ float add_and_hold(float x, float cap, float rate) {
    const Capped capped(x, rate);
    const float e = ex2_approx(-2.0f * kLog2e * cap * capped.r);
    sum += e;
    return e * capped.quarter_slope();
  }
  __device__ RowResult finish(float x_target, float cap, float rate) const {
    const float offset = -2.0f * cap * Capped(x_target, rate).r;
    return finish_row(sum, ex2_approx(offset * kLog2e), offset, cap);
  }
  __device__ static FixedSum merge(FixedSum a, FixedSum b) { return {a.sum + b.sum}; }
  __device__ static FixedSum shuffle_xor(FixedSum v, int offset) {
    return {__shfl_xor_sync(0xffffffffu, v.sum, offset)};
  }
};

// Sum of exp(z - largest z so far) over all but the target, for caps whose range exp() cannot hold.
struct OnlineSum {
  static constexpr bool kFixedOffset = false;
  float sum;
  float largest;
  __device__ static OnlineSum empty() { return {0.0f, -INFINITY}; }
  __device__ __forceinline__ void add(float x, float cap, float) {
    const float z = cap_exactly(x, cap);
    if (z == -INFINITY) return;  // before anything finite, z - largest would be NaN
    if (z > largest) {
      sum *= __expf(largest - z);
      largest = z;
    }
    sum += __expf(z - largest);
  }
  // Returns x.
  __device__ __forceinline__ float add_and_hold(float x, float cap, float rate) {
    add(x, cap, rate);
    return x;
  }
  __device__ RowResult finish(float x_target, float cap, float) const {
    const float z = cap_exactly(x_target, cap);
    const float top = fmaxf(largest, z);
    return finish_row(sum * __expf(largest - top), __expf(z - top), z - top, top);
  }
  __device__ static OnlineSum merge(OnlineSum a, OnlineSum b) {
    const float top = fmaxf(a.largest, b.largest);
    if (top == -INFINITY) return {a.sum + b.sum, top};  // nothing seen, or nothing but NaN
    return {a.sum * __expf(a.largest - top) + b.sum * __expf(b.largest - top), top};
  }
  __device__ static OnlineSum shuffle_xor(OnlineSum v, int offset) {
    return {__shfl_xor_sync(0xffffffffu, v.sum, offset), __shfl_xor_sync(0xffffffffu, v.largest, offset)};
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

// Calls body(x, is_target) for this thread's share of a row; Store: out[j] = what the body returns, `out` may
// be the row itself.
template <bool Store, typename D, typename Body>
__device__ __forceinline__ void walk_row(const D* row, D* out, int64_t count, int64_t target,
                                         const Body& body) {
  const RowSplit split = split_row(row, Store ? out : row, count);
  auto scalar = [&](int64_t j) {
    const float value = body(load_float(row[j]), j == target);
    if constexpr (Store) out[j] = store_float<D>(value);
  };
  for (int64_t j = threadIdx.x; j < split.head; j += blockDim.x) scalar(j);
  for (int64_t j = split.tail + threadIdx.x; j < count; j += blockDim.x) scalar(j);

  constexpr int kCount = Pack<D>::kCount;
  const Pack<D>* packs = reinterpret_cast<const Pack<D>*>(row + split.head);
  constexpr int kUnroll = Store ? kStoreUnroll : kReadUnroll;
  const int64_t stride = blockDim.x;
  for (int64_t first = threadIdx.x; first < split.packs; first += stride * kUnroll) {
    Pack<D> loaded[kUnroll];
    PGOLF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * stride < split.packs) loaded[u] = packs[first + u * stride];
    }
    PGOLF_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t pack = first + u * stride;
      if (pack >= split.packs) break;
      const int64_t own = target - split.head - pack * kCount;
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const float value = body(load_float(loaded[u].value[i]), i == own);
        if constexpr (Store) loaded[u].value[i] = store_float<D>(value);
      }
      if constexpr (Store) reinterpret_cast<Pack<D>*>(out + split.head)[pack] = loaded[u];
    }
  }
}

// Merges the threads' sums; every thread receives the result. Called once in a kernel.
template <int Threads, typename Sum>
__device__ __forceinline__ Sum merge_block(Sum sum) {
  __shared__ Sum staged[Threads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum = Sum::merge(sum, Sum::shuffle_xor(sum, offset));
  }
  if (threadIdx.x % kWarp == 0) staged[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = staged[0];
  for (int warp = 1; warp < Threads / kWarp; ++warp) sum = Sum::merge(sum, staged[warp]);
  return sum;
}

// Loss and lse of a row whose target counts, both without the z-loss; stores them with it.
template <typename Sum>
__device__ __forceinline__ RowResult finish_and_store(const Sum& sum, float x_target, int64_t row,
                                                      float* losses, float* lses,
                                                      const SoftcapCeShape& shape) {
  const RowResult result = sum.finish(x_target, shape.cap, exp_rate(shape));
  if (threadIdx.x == 0) {
    losses[row] = fmaf(shape.z_loss * result.lse, result.lse, result.loss);
    lses[row] = result.lse;
  }
  return result;
}

// Loss and lse of rows without a sum: 0 where ignored, NaN where the target is out of range.
__device__ __forceinline__ float store_uncounted(int64_t target, int64_t row, float* losses, float* lses,
                                                 const SoftcapCeShape& shape) {
  const float value = target == shape.ignore_index ? 0.0f : kNan;
  if (threadIdx.x == 0) losses[row] = lses[row] = value;
  return value;
}

__device__ __forceinline__ bool counts(int64_t target, const SoftcapCeShape& shape) {
  return target != shape.ignore_index && target >= 0 && target < shape.vocab;
}

// Gradient of one logit: `weight` is the upstream gradient, w = 1 + 2 z_loss lse.
struct Gradient {
  float cap, rate, lse, weight;
  float w_weight;    // weight w
  float own_weight;  // weight (w p_target - 1), with p_target - 1 = expm1(-loss)

  // `loss` without the z-loss.
  __device__ __forceinline__ Gradient(const SoftcapCeShape& shape, float upstream, RowResult row)
      : cap(shape.cap), rate(exp_rate(shape)), lse(row.lse), weight(upstream) {
    const float w_less_1 = 2.0f * shape.z_loss * row.lse;
    w_weight = fmaf(weight, w_less_1, weight);
    own_weight = weight * fmaf(w_less_1, expf(-row.loss), expm1f(-row.loss));
  }

  template <bool FixedOffset>
  __device__ __forceinline__ float at(float x, bool own) const {
    if (!FixedOffset && isinf(cap)) return own ? own_weight : w_weight * ex2_approx((x - lse) * kLog2e);
    const Capped capped(x, rate);
    // As in the sum, so that the probabilities of a row add up to 1.
    const float offset = FixedOffset ? fmaf(-2.0f * cap, capped.r, cap - lse) : cap_exactly(x, cap) - lse;
    return (own ? own_weight : w_weight * ex2_approx(offset * kLog2e)) * capped.slope();
  }
};

template <typename D, typename Sum>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    forward_kernel(const D* logits, const int64_t* targets, float* losses, float* lses,
                   SoftcapCeShape shape) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  if (!counts(target, shape)) {
    store_uncounted(target, row, losses, lses, shape);
    return;
  }
  const D* x = logits + row * shape.vocab;
  const float rate = exp_rate(shape);
  Sum sum = Sum::empty();
  walk_row<false>(x, static_cast<D*>(nullptr), shape.vocab, target, [&](float value, bool own) {
    if (!own) sum.add(value, shape.cap, rate);
    return 0.0f;
  });
  finish_and_store(merge_block<kThreads>(sum), load_float(x[target]), row, losses, lses, shape);
}

template <typename D, bool FixedOffset>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const float* grad_losses, const D* logits, const int64_t* targets, const float* losses,
                    const float* lses, D* grads, SoftcapCeShape shape) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  const bool ignored = target == shape.ignore_index;
  const float lse = lses[row];
  const Gradient gradient(shape, grad_losses[row], {fmaf(-shape.z_loss * lse, lse, losses[row]), lse});
  walk_row<true>(logits + row * shape.vocab, grads + row * shape.vocab, shape.vocab, target,
                 [&](float x, bool own) { return ignored ? 0.0f : gradient.at<FixedOffset>(x, own); });
}

struct GradientArgs {
  const float* grad_losses;
  int64_t grad_stride;
  const int64_t* targets;
  float* losses;
  float* lses;
};

// Loss and gradient of any row, read twice.
template <typename D, typename Sum>
__global__ void __launch_bounds__(kWideThreads)
    two_pass_kernel(const D* logits, D* grads, GradientArgs args, SoftcapCeShape shape) {
  const int64_t row = blockIdx.x;
  const int64_t target = args.targets[row];
  const D* x = logits + row * shape.vocab;
  D* grad = grads + row * shape.vocab;
  if (!counts(target, shape)) {
    const float value = store_uncounted(target, row, args.losses, args.lses, shape);
    walk_row<true>(x, grad, shape.vocab, target, [&](float, bool) { return value; });
    return;
  }
  const float rate = exp_rate(shape);
  const float x_target = load_float(x[target]);
  Sum sum = Sum::empty();
  walk_row<false>(x, grad, shape.vocab, target, [&](float value, bool own) {
    if (!own) sum.add(value, shape.cap, rate);
    return 0.0f;
  });
  const RowResult result =
      finish_and_store(merge_block<kWideThreads>(sum), x_target, row, args.losses, args.lses, shape);
  const Gradient gradient(shape, args.grad_losses[row * args.grad_stride], result);
  walk_row<true>(x, grad, shape.vocab, target,
                 [&](float value, bool own) { return gradient.at<Sum::kFixedOffset>(value, own); });
}

// Loss and gradient of a row of at most Threads * kHeld<D> elements, 16-byte aligned: read once. What waits
// in registers is exp(z - cap) (1 - tanh^2) / 4 where the offset is fixed, else the logits.
template <typename D, typename Sum, int Threads>
__global__ void __launch_bounds__(Threads, kHeldThreads / Threads)
    gradient_kernel(const D* logits, D* grads, GradientArgs args, SoftcapCeShape shape) {
  constexpr int kCount = Pack<D>::kCount, kPacks = kHeld<D> / kCount;
  const int64_t row = blockIdx.x;
  const D* x = logits + row * shape.vocab;
  const Pack<D>* packs = reinterpret_cast<const Pack<D>*>(x);
  Pack<D>* out = reinterpret_cast<Pack<D>*>(grads + row * shape.vocab);
  const int pack_count = static_cast<int>(shape.vocab / kCount);
  Pack<D> loaded[kPacks];
  PGOLF_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int pack = p * Threads + threadIdx.x;
    if (pack < pack_count) loaded[p] = load_streaming(packs + pack);
  }
  const int64_t target = args.targets[row];
  if (!counts(target, shape)) {
    const float value = store_uncounted(target, row, args.losses, args.lses, shape);
    Pack<D> fill;
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) fill.value[i] = store_float<D>(value);
    for (int pack = threadIdx.x; pack < pack_count; pack += Threads) out[pack] = fill;
    return;
  }
  const float upstream = args.grad_losses[row * args.grad_stride];
  const float x_target = load_float(x[target]);
  const int target_pack = static_cast<int>(target) / kCount, target_place = static_cast<int>(target) % kCount;
  const float rate = exp_rate(shape);
  float held[kHeld<D>];
  Sum sum = Sum::empty();
  PGOLF_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int pack = p * Threads + threadIdx.x;
    if (pack >= pack_count) break;
    Sum before = sum;
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      held[p * kCount + i] = sum.add_and_hold(load_float(loaded[p].value[i]), shape.cap, rate);
    }
    if (pack == target_pack) {  // the same sum without the target, rather than a comparison per element
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (i != target_place) before.add(load_float(loaded[p].value[i]), shape.cap, rate);
      }
      sum = before;
    }
  }
  const RowResult result =
      finish_and_store(merge_block<Threads>(sum), x_target, row, args.losses, args.lses, shape);
  const Gradient gradient(shape, upstream, result);
  const float scale = 4.0f * gradient.w_weight * ex2_approx((shape.cap - result.lse) * kLog2e);
  PGOLF_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int pack = p * Threads + threadIdx.x;
    if (pack >= pack_count) break;
    Pack<D> store;
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float value = held[p * kCount + i];
      store.value[i] = store_float<D>(Sum::kFixedOffset ? scale * value : gradient.at<false>(value, false));
    }
    store_streaming(out + pack, store);
    if (pack == target_pack) {
      grads[row * shape.vocab + target] = store_float<D>(gradient.at<Sum::kFixedOffset>(x_target, true));
    }
  }
}

// Blocks take 32 rows at a time, so that looking at the factors costs one read.
template <typename D>
__global__ void __launch_bounds__(kThreads)
    rescale_kernel(D* grads, const float* factors, int64_t factor_stride, int64_t rows, int64_t vocab) {
  if (factor_stride == 0 && factors[0] == 1.0f) return;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kWarp) {
    const int64_t mine = first + threadIdx.x % kWarp;
    const float factor = mine < rows ? factors[mine * factor_stride] : 1.0f;
    uint32_t pending = __ballot_sync(0xffffffffu, factor != 1.0f);
    while (pending != 0) {
      const int lane = __ffs(static_cast<int>(pending)) - 1;
      pending &= pending - 1;
      const float scale = __shfl_sync(0xffffffffu, factor, lane);
      D* grad = grads + (first + lane) * vocab;
      walk_row<true>(grad, grad, vocab, -1, [&](float value, bool) { return scale * value; });
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

template <typename D, typename Sum>
void launch_gradient(const D* logits, D* grads, const GradientArgs& args, const SoftcapCeShape& shape,
                     cudaStream_t stream) {
  const unsigned int blocks = grid_blocks(shape.rows, 1, "softcap_ce_gradient");
  const auto alignment = reinterpret_cast<uint64_t>(logits) | reinterpret_cast<uint64_t>(grads);
  const bool aligned = alignment % 16 == 0 && shape.vocab % Pack<D>::kCount == 0;
  if (aligned && shape.vocab <= 64 * kHeld<D>) {
    gradient_kernel<D, Sum, 64><<<blocks, 64, 0, stream>>>(logits, grads, args, shape);
  } else if (aligned && shape.vocab <= 256 * kHeld<D>) {
    gradient_kernel<D, Sum, 256><<<blocks, 256, 0, stream>>>(logits, grads, args, shape);
  } else if (aligned && shape.vocab <= 1024 * kHeld<D>) {
    gradient_kernel<D, Sum, 1024><<<blocks, 1024, 0, stream>>>(logits, grads, args, shape);
  } else {
    two_pass_kernel<D, Sum><<<blocks, kWideThreads, 0, stream>>>(logits, grads, args, shape);
  }
  PGOLF_LAUNCH_CHECK();
}

template <typename T>
void softcap_ce_gradient_cuda(const T* logits, const int64_t* target, const float* grad_loss,
                              int64_t grad_stride, float* loss, float* lse, T* grad_logits,
                              const SoftcapCeShape& shape, CUstream_st* stream) {
  if (shape.rows == 0) return;
  using D = typename DeviceType<T>::type;
  const D* x = reinterpret_cast<const D*>(logits);
  D* grad = reinterpret_cast<D*>(grad_logits);
  const GradientArgs args{
      .grad_losses = grad_loss, .grad_stride = grad_stride, .targets = target, .losses = loss, .lses = lse};
  if (shape.cap <= kFixedOffsetCap) {
    launch_gradient<D, FixedSum>(x, grad, args, shape, stream);
  } else {
    launch_gradient<D, OnlineSum>(x, grad, args, shape, stream);
  }
}

template <typename T>
void softcap_ce_rescale_cuda(T* grad_logits, const float* factor, int64_t factor_stride, int64_t rows,
                             int64_t vocab, CUstream_st* stream) {
  if (rows == 0 || vocab == 0) return;
  using D = typename DeviceType<T>::type;
  constexpr int64_t kMostBlocks = 1024;
  const int64_t chunks = (rows + kWarp - 1) / kWarp;
  const auto blocks = static_cast<unsigned int>(chunks < kMostBlocks ? chunks : kMostBlocks);
  rescale_kernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<D*>(grad_logits), factor, factor_stride,
                                                  rows, vocab);
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
template void softcap_ce_gradient_cuda(const float*, const int64_t*, const float*, int64_t, float*, float*,
                                       float*, const SoftcapCeShape&, CUstream_st*);
template void softcap_ce_gradient_cuda(const bf16*, const int64_t*, const float*, int64_t, float*, float*,
                                       bf16*, const SoftcapCeShape&, CUstream_st*);
template void softcap_ce_gradient_cuda(const f16*, const int64_t*, const float*, int64_t, float*, float*,
                                       f16*, const SoftcapCeShape&, CUstream_st*);
template void softcap_ce_rescale_cuda(float*, const float*, int64_t, int64_t, int64_t, CUstream_st*);
template void softcap_ce_rescale_cuda(bf16*, const float*, int64_t, int64_t, int64_t, CUstream_st*);
template void softcap_ce_rescale_cuda(f16*, const float*, int64_t, int64_t, int64_t, CUstream_st*);

}  // namespace pgolf
