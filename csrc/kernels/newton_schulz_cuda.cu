// CUDA kernels of newton_schulz.h: two kernels for the norm, then three batched products per iteration. The
// middle product has A's polynomial in its epilogue, the last one aX. A and B are symmetric, so only half of
// their tiles are computed.
//
// X, A and B are float16. The input is scaled by a power of two, exactly for 16-bit input, that brings its
// norm to [16, 32); the rest of 1 / (norm + eps) is sigma, which the first iteration's factors contain. Where
// singular values are zero, the rounding of X to float16 is noise that the later iterations multiply by their
// factors a, about 120 times from the first of five on. X therefore keeps its remainder while the product of
// those factors is large, and aX contains it. Noise in the operands of the products is harmless: it enters
// squared where the singular values are zero. Errors of this and of simpler forms:
// bench/results/20261130_portable-emulation.txt. The last product is rounded once, to the output.
#include <algorithm>
#include <cmath>

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
// Largest product of later factors a at which X is kept in one float16.
constexpr float kMostGrowth = 16.0f;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where everything lies in the workspace; offsets in bytes.
struct Workspace {
  int64_t small, large;   // short and long side
  int64_t x_ld, gram_ld;  // leading dimensions, elements
  int64_t count;          // partial sums per matrix
  int64_t x, next, rest, gram, poly, partials, sigma, total;

  explicit Workspace(const NewtonSchulzShape& shape) {
    small = std::min(shape.rows, shape.cols);
    large = std::max(shape.rows, shape.cols);
    x_ld = round_up(shape.cols, 8);
    gram_ld = round_up(small, 8);
    count = std::clamp<int64_t>(shape.rows * shape.cols / kElementsPerPartial, 1, kMaxPartials);
    total = 0;
    const auto take = [this](int64_t bytes) {
      const int64_t offset = total;
      total += round_up(bytes, kAlignment);
      return offset;
    };
    const int64_t x_bytes = shape.batch * shape.rows * x_ld * 2,
                  gram_bytes = shape.batch * small * gram_ld * 2;
    x = take(x_bytes);
    next = take(x_bytes);
    rest = take(x_bytes);
    gram = take(gram_bytes);
    poly = take(gram_bytes);
    partials = take(shape.batch * count * int64_t{sizeof(Squares)});
    sigma = take(shape.batch * int64_t{sizeof(float)});
  }
};

// Buffers of the iteration, all in the workspace.
struct Buffers {
  __half *x, *next, *rest, *gram, *poly;  // rest: remainder of x, then of next in the same place
  Squares* partials;
  float* sigma;

  Buffers(void* workspace, const Workspace& w) {
    auto* const base = static_cast<unsigned char*>(workspace);
    const auto half_at = [base](int64_t offset) { return reinterpret_cast<__half*>(base + offset); };
    x = half_at(w.x), next = half_at(w.next), rest = half_at(w.rest);
    gram = half_at(w.gram), poly = half_at(w.poly);
    partials = reinterpret_cast<Squares*>(base + w.partials);
    sigma = reinterpret_cast<float*>(base + w.sigma);
  }
};

// What every launch of one call needs.
struct Call {
  const NewtonSchulzShape& shape;
  Workspace w;
  int input_bytes;  // of an element
  int multiprocessors;
  cudaStream_t stream;

  // Whether the X that iteration `step` starts from has a remainder. 16-bit input is exact after the scaling.
  bool has_rest(int step) const {
    if (step == 0 && input_bytes == 2) return false;
    float growth = 1.0f;
    for (int i = step; i < shape.steps; ++i) growth *= std::fabs(shape.coefficients[i][0]);
    return growth > kMostGrowth;
  }
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

// out[matrix][row][column] = 2^exponent x for column < cols and 0 up to the leading dimension, with the
// remainder of that in `rest` where it is not null.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const S* x, const Squares* partial, __half* out, __half* rest, float* sigma,
                     int64_t rows, int64_t cols, int64_t ld, int64_t partials, int64_t blocks_per_matrix,
                     float eps, bool aligned) {
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
  if (chunk == 0) sigma[matrix] = scale.sigma;
  const PowerOfTwo power(scale.exponent);
  float value[8];
  load8(value, x + (matrix * rows + row) * cols + column, cols - column, aligned);
  Pack<__half> high, low;
  PGOLF_UNROLL
  for (int i = 0; i < 8; ++i) {
    const float scaled = column + i < cols ? power(value[i]) : 0.0f;
    high.value[i] = store_float<__half>(scaled);
    low.value[i] = store_float<__half>((scaled - load_float(high.value[i])) * kRestScale);
  }
  const int64_t at = (matrix * rows + row) * ld + column;
  *reinterpret_cast<Pack<__half>*>(out + at) = high;
  if (rest != nullptr) *reinterpret_cast<Pack<__half>*>(rest + at) = low;
}

template <typename S>
void launch_normalise(const Call& call, const S* x, const Buffers& buffers) {
  const auto& [shape, w, bytes, multiprocessors, stream] = call;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int64_t count = shape.rows * shape.cols;
  launch_kernel(sum_of_squares_kernel<S>, {grid_blocks(shape.batch * w.count, 1, "newton_schulz"), kThreads},
                stream, x, buffers.partials, count, w.count, aligned && count % 8 == 0);
  const int64_t blocks = (shape.rows * (w.x_ld / 8) + kThreads - 1) / kThreads;
  launch_kernel(normalise_kernel<S>, {grid_blocks(blocks * shape.batch, 1, "newton_schulz"), kThreads},
                stream, x, buffers.partials, buffers.x, call.has_rest(0) ? buffers.rest : nullptr,
                buffers.sigma, shape.rows, shape.cols, w.x_ld, w.count, blocks, shape.eps,
                aligned && shape.cols % 8 == 0);
}

// A = X X^T and B = b A + c A^2 of one iteration, on the short side.
void launch_squares(const Call& call, const Buffers& buffers, int step) {
  const NewtonSchulzShape& shape = call.shape;
  const Workspace& w = call.w;
  const int64_t x_batch = shape.rows * w.x_ld, gram_batch = w.small * w.gram_ld;
  const ProductArgs<__half> gram{.a = buffers.x,
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
  if (shape.rows <= shape.cols) {
    launch_product<true, true, true>(gram, shape.batch, call.multiprocessors, call.stream);
  } else {
    launch_product<false, false, true>(gram, shape.batch, call.multiprocessors, call.stream);
  }
  const ProductArgs<__half> poly{.a = buffers.gram,
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
                                 .alpha = shape.coefficients[step][2],
                                 .beta = shape.coefficients[step][1],
                                 .sigma = step == 0 ? buffers.sigma : nullptr,
                                 .alpha_power = 4,
                                 .beta_power = 2};
  launch_product<true, true, true>(poly, shape.batch, call.multiprocessors, call.stream);
}

// The next X, a X + B X, or a X + X B where X is tall. To `out` of the last iteration, which is laid out as
// the input, else to buffers.next with its remainder.
template <typename T>
void launch_update(const Call& call, const Buffers& buffers, int step, T* out) {
  const NewtonSchulzShape& shape = call.shape;
  const Workspace& w = call.w;
  const int64_t x_batch = shape.rows * w.x_ld, gram_batch = w.small * w.gram_ld;
  const bool wide = shape.rows <= shape.cols, last = step + 1 == shape.steps;
  const int64_t ld = last ? shape.cols : w.x_ld;
  const ProductArgs<T> update{.a = wide ? buffers.poly : buffers.x,
                              .b = wide ? buffers.x : buffers.poly,
                              .d = buffers.x,
                              .d_rest = call.has_rest(step) ? buffers.rest : nullptr,
                              .c = out,
                              .c_rest = !last && call.has_rest(step + 1) ? buffers.rest : nullptr,
                              .a_batch = wide ? gram_batch : x_batch,
                              .b_batch = wide ? x_batch : gram_batch,
                              .d_batch = x_batch,
                              .c_batch = shape.rows * ld,
                              .a_ld = wide ? w.gram_ld : w.x_ld,
                              .b_ld = wide ? w.x_ld : w.gram_ld,
                              .d_ld = w.x_ld,
                              .c_ld = ld,
                              .m = shape.rows,
                              .n = shape.cols,
                              .k = w.small,
                              .beta = shape.coefficients[step][0],
                              .sigma = step == 0 ? buffers.sigma : nullptr,
                              .alpha_power = 1,
                              .beta_power = 1,
                              .whole = ld % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0};
  if (wide) {
    launch_product<true, false, false>(update, shape.batch, call.multiprocessors, call.stream);
  } else {  // B is its own transpose
    launch_product<true, true, false>(update, shape.batch, call.multiprocessors, call.stream);
  }
}

// S is the tensors' type.
template <typename S>
void run(const S* x, S* out, void* workspace, const NewtonSchulzShape& shape, cudaStream_t stream) {
  if (shape.batch == 0 || shape.rows == 0 || shape.cols == 0) return;
  const Call call{shape, Workspace(shape), static_cast<int>(sizeof(S)), multiprocessor_count(), stream};
  Buffers buffers(workspace, call.w);
  launch_normalise(call, x, buffers);
  for (int step = 0; step + 1 < shape.steps; ++step) {
    launch_squares(call, buffers, step);
    launch_update(call, buffers, step, buffers.next);
    std::swap(buffers.x, buffers.next);
  }
  launch_squares(call, buffers, shape.steps - 1);
  launch_update(call, buffers, shape.steps - 1, out);
}

}  // namespace

int64_t newton_schulz_workspace_bytes(const NewtonSchulzShape& shape) { return Workspace(shape).total; }

template <typename T>
void newton_schulz_cuda(const T* x, T* out, void* workspace, const NewtonSchulzShape& shape,
                        CUstream_st* stream) {
  using S = typename DeviceType<T>::type;
  run(reinterpret_cast<const S*>(x), reinterpret_cast<S*>(out), workspace, shape, stream);
}

template void newton_schulz_cuda(const float*, float*, void*, const NewtonSchulzShape&, CUstream_st*);
template void newton_schulz_cuda(const bf16*, bf16*, void*, const NewtonSchulzShape&, CUstream_st*);
template void newton_schulz_cuda(const f16*, f16*, void*, const NewtonSchulzShape&, CUstream_st*);

}  // namespace pgolf
