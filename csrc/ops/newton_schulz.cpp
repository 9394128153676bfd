// Binding of newton_schulz: schema, checks, allocation, dispatch. Maths: kernels/newton_schulz.h.
#include "kernels/newton_schulz.h"

#include <cmath>
#include <vector>

#include "kernels/newton_schulz_sm90.h"
#include "ops/checks.h"

namespace pgolf {
namespace {

NewtonSchulzShape check_inputs(const Tensor& x, Doubles coefficients, double eps) {
  PGOLF_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "newton_schulz: x must be (m, n) or (b, m, n), got ",
                    x.sizes());
  const auto count = static_cast<int64_t>(coefficients.size());
  PGOLF_CHECK_VALUE(count % 3 == 0 && count >= 3 && count <= 3 * kNewtonSchulzMaxSteps,
                    "newton_schulz: coefficients must be 1 to ", kNewtonSchulzMaxSteps,
                    " triples (a, b, c), got ", count, " numbers");
  PGOLF_CHECK_VALUE(eps >= 0, "newton_schulz: eps must be >= 0, got ", eps);
  NewtonSchulzShape shape{};
  shape.batch = x.dim() == 3 ? x.size(0) : 1;
  shape.rows = x.size(-2);
  shape.cols = x.size(-1);
  shape.steps = static_cast<int>(count / 3);
  shape.eps = static_cast<float>(eps);
  for (int64_t i = 0; i < count; ++i) {
    const double value = coefficients[static_cast<size_t>(i)];
    PGOLF_CHECK_VALUE(std::isfinite(value), "newton_schulz: coefficients must be finite, got ", value,
                      " in triple ", i / 3);
    shape.coefficients[i / 3][i % 3] = static_cast<float>(value);
  }
  return shape;
}

Tensor run_cpu(const Tensor& x, Doubles coefficients, double eps, int64_t algorithm) {
  const NsAlgorithm chosen = check_algorithm("newton_schulz", algorithm);
  const NewtonSchulzShape shape = check_inputs(x, coefficients, eps);
  PGOLF_CHECK(chosen != NsAlgorithm::kGram,
              "newton_schulz: algorithm 'gram' needs a Hopper GPU, got a CPU tensor; ", "use 'auto'");
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(in, in.sizes());
  dispatch_float("newton_schulz", in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    newton_schulz_cpu(const_pointer<T>(in), mutable_pointer<T>(out), shape, num_threads());
  });
  return out;
}

std::vector<Tensor> run_banks_cpu(TensorList banks, Doubles coefficients, double eps, int64_t algorithm) {
  std::vector<Tensor> out;
  for (const Tensor& x : banks) out.push_back(run_cpu(x, coefficients, eps, algorithm));
  return out;
}

#ifdef PGOLF_WITH_CUDA
NsType type_of(ScalarType type) {
  dispatch_float("newton_schulz", type, [](auto) {});
  return type == kFloat ? NsType::kFloat32 : type == kHalf ? NsType::kFloat16 : NsType::kBfloat16;
}

Tensor run_portable(const Tensor& in, const NewtonSchulzShape& shape) {
  Tensor out = torch::stable::new_empty(in, in.sizes());
  const Tensor workspace = torch::stable::new_empty(in, {newton_schulz_workspace_bytes(shape)}, kByte);
  dispatch_float("newton_schulz", in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    newton_schulz_cuda(const_pointer<T>(in), mutable_pointer<T>(out), workspace.mutable_data_ptr(), shape,
                       current_stream());
  });
  return out;
}

std::vector<Tensor> run_banks_cuda(TensorList banks, Doubles coefficients, double eps, int64_t algorithm) {
  const NsAlgorithm chosen = check_algorithm("newton_schulz", algorithm);
  std::vector<Tensor> in, out;
  std::vector<NewtonSchulzShape> shapes;
  for (const Tensor& x : banks) shapes.push_back(check_inputs(x, coefficients, eps));
  if (banks.empty()) return out;
  const DeviceGuard guard(banks[0]);
  std::vector<NsBank> list;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const NsType type = type_of(banks[i].scalar_type());
    in.push_back(torch::stable::contiguous(banks[i]));
    if (banks[i].numel() == 0) continue;
    list.push_back({.in = in[i].const_data_ptr(),
                    .out = nullptr,
                    .type = type,
                    .batch = shapes[i].batch,
                    .rows = shapes[i].rows,
                    .cols = shapes[i].cols});
  }
  const int count = static_cast<int>(list.size());
  const bool wanted = chosen == NsAlgorithm::kGram ||
                      (chosen == NsAlgorithm::kAuto && !newton_schulz_portable_pays(list.data(), count));
  const bool gram = wanted && newton_schulz_sm90_can_run(list.data(), count);
  PGOLF_CHECK(gram || chosen != NsAlgorithm::kGram,
              "newton_schulz: algorithm 'gram' needs a Hopper GPU and sides that are multiples of 8, got ",
              banks[0].sizes(), "; use 'auto'");
  if (!gram) {
    for (size_t i = 0; i < shapes.size(); ++i) out.push_back(run_portable(in[i], shapes[i]));
    return out;
  }
  auto next = list.begin();
  for (const Tensor& x : in) {
    out.push_back(torch::stable::new_empty(x, x.sizes()));
    if (x.numel() > 0) (next++)->out = out.back().mutable_data_ptr();
  }
  if (list.empty()) return out;
  const NewtonSchulzShape& shape = shapes[0];  // coefficients and eps are the same for all
  const auto bytes = static_cast<int64_t>(newton_schulz_sm90_workspace(list.data(), count, shape.steps));
  const Tensor workspace = torch::stable::new_empty(in[0], {bytes}, kByte);
  newton_schulz_sm90(list.data(), count, shape.coefficients, shape.steps, shape.eps,
                     workspace.mutable_data_ptr(), current_stream());
  return out;
}

Tensor run_cuda(const Tensor& x, Doubles coefficients, double eps, int64_t algorithm) {
  return run_banks_cuda(x, coefficients, eps, algorithm)[0];
}
#endif

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("newton_schulz(Tensor x, float[] coefficients, float eps, int algorithm) -> Tensor");
  m.def(
      "newton_schulz_banks(Tensor[] banks, float[] coefficients, float eps, int algorithm) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("newton_schulz", TORCH_BOX(&pgolf::run_cpu));
  m.impl("newton_schulz_banks", TORCH_BOX(&pgolf::run_banks_cpu));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("newton_schulz", TORCH_BOX(&pgolf::run_cuda));
  m.impl("newton_schulz_banks", TORCH_BOX(&pgolf::run_banks_cuda));
}
#endif
