// Launchers of qk_norm_rope's kernels for sm_80 and newer.
#include "kernels/qk_norm_rope.cuh"

namespace pgolf {
namespace {

// Calls launch(Width, Whole) as compile-time constants.
template <typename Launch>
void with_sizes(const QkNormRopeShape& shape, const Launch& launch) {
  if (!qk_norm_rope_supports(shape)) throw std::runtime_error("qk_norm_rope: no kernel for this shape");
  const auto with_whole = [&](auto width) {
    if (shape.dims % (2 * kVector) == 0) {
      launch(width, std::true_type{});
    } else {
      launch(width, std::false_type{});
    }
  };
  if (shape.width == 64) {
    with_whole(std::integral_constant<int, 64>{});
  } else {
    with_whole(std::integral_constant<int, 128>{});
  }
}

}  // namespace

void qk_norm_rope_cuda(const QkNormRopeForward& args, const QkNormRopeShape& shape, CUstream_st* stream) {
  if (shape.tokens == 0) return;
  with_sizes(shape, [&](auto width, auto whole) {
    const auto kernel = &qk_norm_rope_kernel<width, whole>;
    const dim3 grid = head_grid(kernel, shape.tokens, rope_parts(shape, false));
    kernel<<<grid, kHeadThreads, 0, stream>>>(args, shape);
    PGOLF_LAUNCH_CHECK();
  });
}

void qk_norm_rope_backward_cuda(const QkNormRopeBackward& args, const QkNormRopeShape& shape,
                                CUstream_st* stream) {
  // Also without tokens: blocks that have none write the zeros of their partials.
  const dim3 grid(kRopePartials, rope_parts(shape, true));
  with_sizes(shape, [&](auto width, auto whole) {
    if (args.dq_is_bf16) {
      qk_norm_rope_backward_kernel<width, whole, false><<<grid, kHeadThreads, 0, stream>>>(args, shape);
    } else {
      qk_norm_rope_backward_kernel<width, whole, true><<<grid, kHeadThreads, 0, stream>>>(args, shape);
    }
    PGOLF_LAUNCH_CHECK();
  });
  const auto heads = static_cast<unsigned int>(shape.heads);
  sum_gain_kernel<<<heads, kRopeSumThreads, 0, stream>>>(args.partials, args.dgain, shape.heads);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
