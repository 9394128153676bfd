// Binding of newton_schulz: schema, checks, allocation, dispatch. Maths: kernels/newton_schulz.h.
#include "kernels/newton_schulz.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "kernels/newton_schulz_sm90.h"
#include "ops/checks.h"

namespace pgolf {
namespace {

// Whether "auto" takes the Hopper kernel where it can. False until that kernel has passed its tests on an
// H100.
[[maybe_unused]] constexpr bool kAutoTakesHopper = false;

NewtonSchulzShape check_inputs(const at::Tensor& x, at::ArrayRef<double> coefficients, double eps,
                               std::string_view algorithm) {
  TORCH_CHECK_VALUE(algorithm == "auto" || algorithm == "standard" || algorithm == "gram",
                    "newton_schulz: algorithm must be 'auto', 'standard' or 'gram', got '", algorithm, "'");
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "newton_schulz: x must be (m, n) or (b, m, n), got ",
                    x.sizes());
  const auto count = static_cast<int64_t>(coefficients.size());
  TORCH_CHECK_VALUE(count % 3 == 0 && count >= 3 && count <= 3 * kNewtonSchulzMaxSteps,
                    "newton_schulz: coefficients must be 1 to ", kNewtonSchulzMaxSteps,
                    " triples (a, b, c), got ", count, " numbers");
  TORCH_CHECK_VALUE(eps >= 0, "newton_schulz: eps must be >= 0, got ", eps);
  NewtonSchulzShape shape{};
  shape.batch = x.dim() == 3 ? x.size(0) : 1;
  shape.rows = x.size(-2);
  shape.cols = x.size(-1);
  shape.steps = static_cast<int>(count / 3);
  shape.eps = static_cast<float>(eps);
  for (int64_t i = 0; i < count; ++i) {
    const double value = coefficients[static_cast<size_t>(i)];
    TORCH_CHECK_VALUE(std::isfinite(value), "newton_schulz: coefficients must be finite, got ", value,
                      " in triple ", i / 3);
    shape.coefficients[i / 3][i % 3] = static_cast<float>(value);
  }
  return shape;
}

at::Tensor run_cpu(const at::Tensor& x, at::ArrayRef<double> coefficients, double eps,
                   c10::string_view algorithm) {
  const NewtonSchulzShape shape = check_inputs(x, coefficients, eps, algorithm);
  TORCH_CHECK(algorithm != "gram", "newton_schulz: algorithm 'gram' needs a Hopper GPU, got a CPU tensor; ",
              "use 'auto'");
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options());
  dispatch_float("newton_schulz", in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    newton_schulz_cpu(const_pointer<T>(in), mutable_pointer<T>(out), shape, at::get_num_threads());
  });
  return out;
}

#ifdef PGOLF_WITH_CUDA
NsType type_of(at::ScalarType type) {
  return type == at::kFloat ? NsType::kFloat32 : type == at::kHalf ? NsType::kFloat16 : NsType::kBfloat16;
}

at::Tensor run_cuda(const at::Tensor& x, at::ArrayRef<double> coefficients, double eps,
                    c10::string_view algorithm) {
  const NewtonSchulzShape shape = check_inputs(x, coefficients, eps, algorithm);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options());
  if (algorithm == "gram" || (kAutoTakesHopper && algorithm == "auto")) {
    dispatch_float("newton_schulz", in.scalar_type(), [](auto) {});
    const NsBank bank{
        in.const_data_ptr(), out.mutable_data_ptr(), type_of(in.scalar_type()), shape.batch, shape.rows,
        shape.cols};
    if (newton_schulz_sm90_supports(&bank, 1)) {
      const auto bytes = static_cast<int64_t>(newton_schulz_sm90_workspace(&bank, 1, shape.steps));
      const at::Tensor scratch = at::empty({bytes}, in.options().dtype(at::kByte));
      newton_schulz_sm90(&bank, 1, shape.coefficients, shape.steps, true, shape.eps,
                         scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
      return out;
    }
    TORCH_CHECK(algorithm != "gram" || out.numel() == 0,
                "newton_schulz: algorithm 'gram' needs a Hopper GPU and sides that are multiples of 8, got ",
                x.sizes(), "; use 'auto'");
  }
  const at::Tensor workspace =
      at::empty({newton_schulz_workspace_bytes(shape)}, in.options().dtype(at::kByte));
  dispatch_float("newton_schulz", in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    newton_schulz_cuda(const_pointer<T>(in), mutable_pointer<T>(out), workspace.mutable_data_ptr(), shape,
                       c10::cuda::getCurrentCUDAStream().stream());
  });
  return out;
}
#endif

}  // namespace
}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("newton_schulz(Tensor x, float[] coefficients, float eps, str algorithm=\"auto\") -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) { m.impl("newton_schulz", &pgolf::run_cpu); }

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) { m.impl("newton_schulz", &pgolf::run_cuda); }
#endif
