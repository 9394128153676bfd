// CUDA kernels of newton_schulz.h: two kernels for the norm, then three batched products per iteration. The
// middle product has A's polynomial in its epilogue, the last one aX. A and B are symmetric, so only half of
// their tiles are computed.
#include <algorithm>
#include <type_traits>

#include "kernels/batched_product.cuh"
#include "kernels/matrix_scale.cuh"
#include "kernels/newton_schulz.h"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxPartials = 64;  // partial sums of squares per matrix, each of three as Squares
constexpr int64_t kElementsPerPartial = kThreads * 32;
constexpr int64_t kAlignment = 256;  // bytes, of each buffer in the workspace

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where everything lies in the workspace; offsets in bytes.
struct Workspace {
  int64_t small, large;   // short and long side
  int64_t x_ld, gram_ld;  // leading dimensions, elements
  int64_t partials;       // partial sums per matrix
  int64_t x_bytes, gram_bytes, partial_bytes;

  explicit Workspace(const NewtonSchulzShape& shape) {
    small = std::min(shape.rows, shape.cols);
    large = std::max(shape.rows, shape.cols);
    x_ld = round_up(shape.cols, 8);
    gram_ld = round_up(small, 8);
    partials = std::clamp<int64_t>(shape.rows * shape.cols / kElementsPerPartial, 1, kMaxPartials);
    x_bytes = round_up(shape.batch * shape.rows * x_ld * 2, kAlignment);
    gram_bytes = round_up(shape.batch * small * gram_ld * 2, kAlignment);
    partial_bytes = round_up(shape.batch * partials * int64_t{sizeof(Squares)}, kAlignment);
  }
  int64_t total() const { return 2 * x_bytes + 2 * gram_bytes + partial_bytes; }
};

// Eight elements from source, zeros past `valid`. Aligned: all eight are valid and 16-byte aligned.
template <typename S>
__device__ __forceinline__ void load8(float (&value)[8], const S* source, int64_t valid, bool aligned) {
  constexpr int kCount = Pack<S>::kCount;
  if (aligned) {
    PGOLF_UNROLL
    for (int i = 0; i < 8; i += kCount) {
      const Pack<S> pack = *reinterpret_cast<const Pack<S>*>(source + i);
      PGOLF_UNROLL
      for (int l = 0; l < kCount; ++l) value[i + l] = load_float(pack.value[l]);
    }
    return;
  }
  PGOLF_UNROLL
  for (int i = 0; i < 8; ++i) value[i] = i < valid ? load_float(source[i]) : 0.0f;
}

// partial[matrix][p] = sum of squares of every partials-th run of kThreads chunks of eight elements.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const S* x, Squares* partial, int64_t count, int64_t partials, bool aligned) {
  __shared__ float staged[3][kThreads / kWarp];
  const int64_t matrix = blockIdx.x / partials;
  const int64_t part = blockIdx.x - matrix * partials;
  Squares squares;
  for (int64_t i = (part * kThreads + threadIdx.x) * 8; i < count; i += partials * kThreads * 8) {
    float value[8];
    load8(value, x + matrix * count + i, count - i, aligned);
    PGOLF_UNROLL
    for (int l = 0; l < 8; ++l) squares.add(value[l]);
  }
  squares.sum = block_sum<kThreads>(squares.sum, staged[0]);
  squares.low = block_sum<kThreads>(squares.low, staged[1]);
  squares.high = block_sum<kThreads>(squares.high, staged[2]);
  if (threadIdx.x == 0) partial[blockIdx.x] = squares;
}

// out[matrix][row][column] = x / (norm + eps) for column < cols and 0 up to the leading dimension.
template <typename S, typename D>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const S* x, const Squares* partial, D* out, int64_t rows, int64_t cols, int64_t ld,
                     int64_t partials, int64_t blocks_per_matrix, float eps, bool aligned) {
  const int64_t matrix = blockIdx.x / blocks_per_matrix;
  const int64_t chunk = (blockIdx.x - matrix * blocks_per_matrix) * kThreads + threadIdx.x;
  const int64_t row = chunk / (ld / 8);
  const int64_t column = (chunk - row * (ld / 8)) * 8;
  if (row >= rows) return;
  Squares squares;
  for (int64_t p = 0; p < partials; ++p) {
    const Squares& part = partial[matrix * partials + p];
    squares.sum += part.sum;
    squares.low += part.low;
    squares.high += part.high;
  }
  const Scale scale = scale_of(squares.sum, squares.low, squares.high, eps);
  const PowerOfTwo power(scale.exponent);
  float value[8];
  load8(value, x + (matrix * rows + row) * cols + column, cols - column, aligned);
  Pack<D> pack;
  PGOLF_UNROLL
  for (int i = 0; i < 8; ++i)
    pack.value[i] = store_float<D>(column + i < cols ? power(value[i]) * scale.sigma : 0.0f);
  *reinterpret_cast<Pack<D>*>(out + (matrix * rows + row) * ld + column) = pack;
}

// Drops the padding of the leading dimension and converts.
template <typename D, typename S>
__global__ void __launch_bounds__(kThreads)
    copy_out_kernel(const D* x, S* out, int64_t cols, int64_t ld, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / cols;
  out[index] = store_float<S>(load_float(x[row * ld + (index - row * cols)]));
}

// Buffers of the iteration, all in the workspace.
template <typename D>
struct Buffers {
  D *x, *next, *gram, *poly;
};

// One step: next = a x + (b A + c A^2) x with A = x x^T on the short side; `next` may be the final output.
template <typename D>
void launch_step(const NewtonSchulzShape& shape, const Workspace& w, const float (&abc)[3],
                 Buffers<D> buffers, int multiprocessors, cudaStream_t stream) {
  const int64_t x_batch = shape.rows * w.x_ld, gram_batch = w.small * w.gram_ld;
  const bool wide = shape.rows <= shape.cols;
  const ProductArgs<D> gram{.a = buffers.x,
                            .b = buffers.x,
                            .c = buffers.gram,
                            .a_batch = x_batch,
                            .b_batch = x_batch,
                            .c_batch = gram_batch,
                            .a_ld = w.x_ld,
                            .b_ld = w.x_ld,
                            .c_ld = w.gram_ld,
                            .m = w.small,
                            .n = w.small,
                            .k = w.large};
  if (wide) {
    launch_product<true, true, true>(gram, shape.batch, multiprocessors, stream);
  } else {
    launch_product<false, false, true>(gram, shape.batch, multiprocessors, stream);
  }
  const ProductArgs<D> poly{.a = buffers.gram,
                            .b = buffers.gram,
                            .d = buffers.gram,
                            .c = buffers.poly,
                            .a_batch = gram_batch,
                            .b_batch = gram_batch,
                            .d_batch = gram_batch,
                            .c_batch = gram_batch,
                            .a_ld = w.gram_ld,
                            .b_ld = w.gram_ld,
                            .d_ld = w.gram_ld,
                            .c_ld = w.gram_ld,
                            .m = w.small,
                            .n = w.small,
                            .k = w.small,
                            .alpha = abc[2],
                            .beta = abc[1]};
  launch_product<true, true, true>(poly, shape.batch, multiprocessors, stream);
  // B x, or x B where x is tall.
  const ProductArgs<D> update{.a = wide ? buffers.poly : buffers.x,
                              .b = wide ? buffers.x : buffers.poly,
                              .d = buffers.x,
                              .c = buffers.next,
                              .a_batch = wide ? gram_batch : x_batch,
                              .b_batch = wide ? x_batch : gram_batch,
                              .d_batch = x_batch,
                              .c_batch = x_batch,
                              .a_ld = wide ? w.gram_ld : w.x_ld,
                              .b_ld = wide ? w.x_ld : w.gram_ld,
                              .d_ld = w.x_ld,
                              .c_ld = w.x_ld,
                              .m = shape.rows,
                              .n = shape.cols,
                              .k = w.small,
                              .beta = abc[0]};
  if (wide) {
    launch_product<true, false, false>(update, shape.batch, multiprocessors, stream);
  } else {  // B is its own transpose
    launch_product<true, true, false>(update, shape.batch, multiprocessors, stream);
  }
}

template <typename S, typename D>
void launch_normalise(const S* x, D* out, Squares* partial, const NewtonSchulzShape& shape,
                      const Workspace& w, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  sum_of_squares_kernel<<<grid_blocks(shape.batch * w.partials, 1, "newton_schulz"), kThreads, 0, stream>>>(
      x, partial, shape.rows * shape.cols, w.partials, aligned && shape.rows * shape.cols % 8 == 0);
  PGOLF_LAUNCH_CHECK();
  const int64_t blocks = (shape.rows * (w.x_ld / 8) + kThreads - 1) / kThreads;
  normalise_kernel<<<grid_blocks(blocks * shape.batch, 1, "newton_schulz"), kThreads, 0, stream>>>(
      x, partial, out, shape.rows, shape.cols, w.x_ld, w.partials, blocks, shape.eps,
      aligned && shape.cols % 8 == 0);
  PGOLF_LAUNCH_CHECK();
}

// S is the tensors' type, D the operands' type.
template <typename S, typename D>
void run(const S* x, S* out, void* workspace, const NewtonSchulzShape& shape, cudaStream_t stream) {
  if (shape.batch == 0 || shape.rows == 0 || shape.cols == 0) return;
  const Workspace w(shape);
  unsigned char* base = static_cast<unsigned char*>(workspace);
  Buffers<D> buffers{reinterpret_cast<D*>(base), reinterpret_cast<D*>(base + w.x_bytes),
                     reinterpret_cast<D*>(base + 2 * w.x_bytes),
                     reinterpret_cast<D*>(base + 2 * w.x_bytes + w.gram_bytes)};
  auto* partial = reinterpret_cast<Squares*>(base + 2 * w.x_bytes + 2 * w.gram_bytes);
  launch_normalise(x, buffers.x, partial, shape, w, stream);
  const int multiprocessors = multiprocessor_count();
  // The last product may write the output itself when that has the operands' type and layout.
  bool direct = false;
  if constexpr (std::is_same_v<S, D>)
    direct = w.x_ld == shape.cols && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int step = 0; step < shape.steps; ++step) {
    if constexpr (std::is_same_v<S, D>) {
      if (direct && step + 1 == shape.steps) buffers.next = out;
    }
    launch_step(shape, w, shape.coefficients[step], buffers, multiprocessors, stream);
    std::swap(buffers.x, buffers.next);
  }
  if (direct) return;
  const int64_t count = shape.batch * shape.rows * shape.cols;
  copy_out_kernel<<<grid_blocks(count, kThreads, "newton_schulz"), kThreads, 0, stream>>>(
      buffers.x, out, shape.cols, w.x_ld, count);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace

int64_t newton_schulz_workspace_bytes(const NewtonSchulzShape& shape) { return Workspace(shape).total(); }

template <>
void newton_schulz_cuda(const float* x, float* out, void* workspace, const NewtonSchulzShape& shape,
                        CUstream_st* stream) {
  run<float, __nv_bfloat16>(x, out, workspace, shape, stream);
}

template <>
void newton_schulz_cuda(const bf16* x, bf16* out, void* workspace, const NewtonSchulzShape& shape,
                        CUstream_st* stream) {
  run<__nv_bfloat16, __nv_bfloat16>(reinterpret_cast<const __nv_bfloat16*>(x),
                                    reinterpret_cast<__nv_bfloat16*>(out), workspace, shape, stream);
}

template <>
void newton_schulz_cuda(const f16* x, f16* out, void* workspace, const NewtonSchulzShape& shape,
                        CUstream_st* stream) {
  run<__half, __half>(reinterpret_cast<const __half*>(x), reinterpret_cast<__half*>(out), workspace, shape,
                      stream);
}

}  // namespace pgolf
