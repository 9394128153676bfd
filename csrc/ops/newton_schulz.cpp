// Binding of newton_schulz: schema, checks, allocation, dispatch. Maths: kernels/newton_schulz.h.
#include "kernels/newton_schulz.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>
#include <vector>

#include "kernels/newton_schulz_sm90.h"
#include "ops/checks.h"

namespace pgolf {
namespace {

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

std::vector<at::Tensor> run_banks_cpu(at::TensorList banks, at::ArrayRef<double> coefficients, double eps,
                                      c10::string_view algorithm) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& x : banks) out.push_back(run_cpu(x, coefficients, eps, algorithm));
  return out;
}

#ifdef PGOLF_WITH_CUDA
NsType type_of(at::ScalarType type) {
  dispatch_float("newton_schulz", type, [](auto) {});
  return type == at::kFloat ? NsType::kFloat32 : type == at::kHalf ? NsType::kFloat16 : NsType::kBfloat16;
}

at::Tensor run_portable(const at::Tensor& in, const NewtonSchulzShape& shape) {
  at::Tensor out = at::empty(in.sizes(), in.options());
  const at::Tensor workspace =
      at::empty({newton_schulz_workspace_bytes(shape)}, in.options().dtype(at::kByte));
  dispatch_float("newton_schulz", in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    newton_schulz_cuda(const_pointer<T>(in), mutable_pointer<T>(out), workspace.mutable_data_ptr(), shape,
                       c10::cuda::getCurrentCUDAStream().stream());
  });
  return out;
}

std::vector<at::Tensor> run_banks_cuda(at::TensorList banks, at::ArrayRef<double> coefficients, double eps,
                                       c10::string_view algorithm) {
  std::vector<at::Tensor> in, out;
  std::vector<NewtonSchulzShape> shapes;
  for (const at::Tensor& x : banks) shapes.push_back(check_inputs(x, coefficients, eps, algorithm));
  if (banks.empty()) return out;
  const c10::cuda::CUDAGuard guard(banks[0].device());
  std::vector<NsBank> list;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const NsType type = type_of(banks[i].scalar_type());
    in.push_back(banks[i].contiguous());
    if (banks[i].numel() == 0) continue;
    list.push_back({.in = in[i].const_data_ptr(),
                    .out = nullptr,
                    .type = type,
                    .batch = shapes[i].batch,
                    .rows = shapes[i].rows,
                    .cols = shapes[i].cols});
  }
  const int count = static_cast<int>(list.size());
  const bool gram = algorithm != "standard" && newton_schulz_sm90_can_run(list.data(), count);
  TORCH_CHECK(gram || algorithm != "gram",
              "newton_schulz: algorithm 'gram' needs a Hopper GPU and sides that are multiples of 8, got ",
              banks[0].sizes(), "; use 'auto'");
  if (!gram) {
    for (size_t i = 0; i < shapes.size(); ++i) out.push_back(run_portable(in[i], shapes[i]));
    return out;
  }
  auto next = list.begin();
  for (const at::Tensor& x : in) {
    out.push_back(at::empty(x.sizes(), x.options()));
    if (x.numel() > 0) (next++)->out = out.back().mutable_data_ptr();
  }
  if (list.empty()) return out;
  const NewtonSchulzShape& shape = shapes[0];  // coefficients and eps are the same for all
  const auto bytes = static_cast<int64_t>(newton_schulz_sm90_workspace(list.data(), count, shape.steps));
  const at::Tensor workspace = at::empty({bytes}, in[0].options().dtype(at::kByte));
  newton_schulz_sm90(list.data(), count, shape.coefficients, shape.steps, shape.eps,
                     workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
  return out;
}

at::Tensor run_cuda(const at::Tensor& x, at::ArrayRef<double> coefficients, double eps,
                    c10::string_view algorithm) {
  return run_banks_cuda(x, coefficients, eps, algorithm)[0];
}
#endif

}  // namespace
}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("newton_schulz(Tensor x, float[] coefficients, float eps, str algorithm=\"auto\") -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "newton_schulz_banks(Tensor[] banks, float[] coefficients, float eps, str algorithm=\"auto\") -> "
      "Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("newton_schulz", &pgolf::run_cpu);
  m.impl("newton_schulz_banks", &pgolf::run_banks_cpu);
}

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("newton_schulz", &pgolf::run_cuda);
  m.impl("newton_schulz_banks", &pgolf::run_banks_cuda);
}
#endif
