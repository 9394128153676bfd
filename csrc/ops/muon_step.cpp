// Binding of muon_step and muon_apply: schema, checks, scratch memory, dispatch. Maths: kernels/muon_step.h
// around kernels/newton_schulz.h.
#include "kernels/muon_step.h"


#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "kernels/newton_schulz.h"
#include "kernels/newton_schulz_sm90.h"
#include "ops/checks.h"

namespace pgolf {
namespace {

constexpr int64_t kAlign = 64;  // elements between the directions of two banks


// Calls body(T{}) for float32 and bfloat16; TypeError otherwise.
template <typename Body>
void dispatch_state(const char* what, ScalarType type, const Body& body) {
  PGOLF_CHECK_TYPE(type == kFloat || type == kBFloat16, "muon_step: ", what,
                   " must be float32 or bfloat16, got ", type);
  if (type == kFloat) return body(float{});
  body(bf16{});
}

void check_hyper(const Tensor& hyper) {
  PGOLF_CHECK_TYPE(hyper.scalar_type() == kFloat, "muon_step: hyper must be float32, got ",
                   hyper.scalar_type());
  PGOLF_CHECK_VALUE(hyper.dim() == 1 && hyper.size(0) == kMuonHyper && hyper.is_contiguous(),
                    "muon_step: hyper must be (", int{kMuonHyper}, ",) contiguous, got ", hyper.sizes());
}

// `tensor` of list `what` at `index` must have the shape of `model`; check_list sees to the rest.
void check_like(const Tensor& tensor, const Tensor& model, const char* what, size_t index) {
  PGOLF_CHECK_VALUE(same(tensor.sizes(), model.sizes()), "muon_step: ", what, " ", index, " must have shape ",
                    model.sizes(), ", got ", tensor.sizes());
}

void check_list(TensorList list, const char* what, ScalarType type, const Tensor& hyper) {
  for (size_t i = 0; i < list.size(); ++i) {
    PGOLF_CHECK_TYPE(list[i].scalar_type() == type, "muon_step: ", what, " ", i, " must be ", type, ", got ",
                     list[i].scalar_type());
    PGOLF_CHECK_VALUE(list[i].device() == hyper.device(), "muon_step: ", what, " ", i, " must be on ",
                      hyper.device(), " like the hyper, got ", list[i].device());
    PGOLF_CHECK_VALUE(list[i].is_contiguous(), "muon_step: ", what, " ", i,
                      " must be contiguous, got strides ", list[i].strides(),
                      "; it is read and written in place");
  }
}

void check_counts(size_t got, size_t want, const char* what) {
  PGOLF_CHECK_VALUE(got == want, "muon_step: expected ", want, " ", what, ", one a tensor, got ", got);
}

ScalarType first_type(TensorList list) { return list.empty() ? kFloat : list[0].scalar_type(); }

// What muon_apply works on; `averages` may be empty.
std::vector<MuonTarget> check_targets(TensorList params, TensorList updates, TensorList averages,
                                      const Tensor& hyper, Doubles lr_scales) {
  check_hyper(hyper);
  check_counts(updates.size(), params.size(), "updates");
  check_counts(lr_scales.size(), params.size(), "lr_scales");
  if (!averages.empty()) check_counts(averages.size(), params.size(), "averages");
  check_list(params, "param", kFloat, hyper);
  check_list(updates, "update", first_type(updates), hyper);
  check_list(averages, "average", kFloat, hyper);
  std::vector<MuonTarget> targets;
  for (size_t i = 0; i < params.size(); ++i) {
    check_like(updates[i], params[i], "update", i);
    MuonTarget target{mutable_pointer<float>(params[i]), updates[i].const_data_ptr(), nullptr,
                      params[i].numel(), static_cast<float>(lr_scales[i])};
    if (!averages.empty()) {
      check_like(averages[i], params[i], "average", i);
      target.average = mutable_pointer<float>(averages[i]);
    }
    targets.push_back(target);
  }
  return targets;
}

std::vector<NewtonSchulzShape> check_banks(TensorList grads, TensorList momenta,
                                           TensorList updates, const Tensor& hyper,
                                           Doubles coefficients, double eps, int64_t algorithm) {
  check_hyper(hyper);
  PGOLF_CHECK_VALUE(algorithm >= kNsAuto && algorithm <= kNsGram, "muon_step: algorithm must be 0 (auto), 1 (standard) or 2 (gram), got ", algorithm);
  check_counts(momenta.size(), grads.size(), "momenta");
  check_counts(updates.size(), grads.size(), "updates");
  check_list(grads, "grad", first_type(grads), hyper);
  check_list(momenta, "momentum", first_type(momenta), hyper);
  check_list(updates, "update", first_type(updates), hyper);
  const auto count = static_cast<int64_t>(coefficients.size());
  PGOLF_CHECK_VALUE(count % 3 == 0 && count >= 3 && count <= 3 * kNewtonSchulzMaxSteps,
                    "muon_step: coefficients must be 1 to ", kNewtonSchulzMaxSteps,
                    " triples (a, b, c), got ", count, " numbers");
  PGOLF_CHECK_VALUE(eps >= 0, "muon_step: eps must be >= 0, got ", eps);
  NewtonSchulzShape shape{};
  shape.steps = static_cast<int>(count / 3);
  shape.eps = static_cast<float>(eps);
  for (int64_t i = 0; i < count; ++i) {
    const double value = coefficients[static_cast<size_t>(i)];
    PGOLF_CHECK_VALUE(std::isfinite(value), "muon_step: coefficients must be finite, got ", value,
                      " in triple ", i / 3);
    shape.coefficients[i / 3][i % 3] = static_cast<float>(value);
  }
  std::vector<NewtonSchulzShape> shapes;
  for (size_t i = 0; i < grads.size(); ++i) {
    PGOLF_CHECK_VALUE(grads[i].dim() == 3, "muon_step: grad ", i,
                      " must be a bank (matrices, rows, cols), got ", grads[i].sizes());
    check_like(momenta[i], grads[i], "momentum", i);
    check_like(updates[i], grads[i], "update", i);
    shape.batch = grads[i].size(0);
    shape.rows = grads[i].size(1);
    shape.cols = grads[i].size(2);
    shapes.push_back(shape);
  }
  return shapes;
}

// Directions of all banks in one scratch buffer: element offsets, the total last.
std::vector<int64_t> direction_offsets(TensorList updates) {
  std::vector<int64_t> offsets{0};
  for (const Tensor& update : updates)
    offsets.push_back(offsets.back() + (update.numel() + kAlign - 1) / kAlign * kAlign);
  return offsets;
}

template <typename X>
std::vector<MuonDirection> directions(TensorList grads, TensorList momenta, X* scratch,
                                      const std::vector<int64_t>& offsets) {
  std::vector<MuonDirection> banks;
  for (size_t i = 0; i < grads.size(); ++i) {
    banks.push_back({grads[i].const_data_ptr(), momenta[i].mutable_data_ptr(), scratch + offsets[i],
                     grads[i].size(0) * grads[i].size(1), grads[i].size(2)});
  }
  return banks;
}

void apply_cpu(TensorList params, TensorList updates, TensorList averages,
               const Tensor& hyper, Doubles lr_scales) {
  const std::vector<MuonTarget> targets = check_targets(params, updates, averages, hyper, lr_scales);
  dispatch_state("updates", first_type(updates), [&](auto tag) {
    muon_apply_cpu<decltype(tag)>(targets.data(), static_cast<int>(targets.size()),
                                  const_pointer<float>(hyper), num_threads());
  });
}

void step_cpu(TensorList params, TensorList grads, TensorList momenta, TensorList updates,
              TensorList averages, const Tensor& hyper, Doubles lr_scales, Doubles coefficients,
              double eps, bool nesterov, bool lerp, bool row_normalize, int64_t algorithm) {
  const auto shapes = check_banks(grads, momenta, updates, hyper, coefficients, eps, algorithm);
  PGOLF_CHECK(algorithm != kNsGram, "muon_step: algorithm 'gram' needs a Hopper GPU, got CPU tensors; ",
              "use 'auto'");
  if (!params.empty()) check_targets(params, updates, averages, hyper, lr_scales);
  const std::vector<int64_t> offsets = direction_offsets(updates);
  const Tensor scratch = torch::stable::new_empty(hyper, {offsets.back()}, first_type(updates));
  dispatch_state("grads", first_type(grads), [&](auto g) {
    dispatch_state("momenta", first_type(momenta), [&](auto m) {
      dispatch_state("updates", first_type(updates), [&](auto x) {
        using X = decltype(x);
        const auto banks = directions(grads, momenta, mutable_pointer<X>(scratch), offsets);
        const int threads = num_threads();
        muon_direction_cpu<decltype(g), decltype(m), X>(banks.data(), static_cast<int>(banks.size()),
                                                        const_pointer<float>(hyper),
                                                        {nesterov, lerp, row_normalize}, threads);
        for (size_t i = 0; i < shapes.size(); ++i) {
          newton_schulz_cpu(static_cast<const X*>(banks[i].direction), mutable_pointer<X>(updates[i]),
                            shapes[i], threads);
        }
      });
    });
  });
  if (!params.empty()) apply_cpu(params, updates, averages, hyper, lr_scales);
}

#ifdef PGOLF_WITH_CUDA
void apply_cuda(TensorList params, TensorList updates, TensorList averages,
                const Tensor& hyper, Doubles lr_scales) {
  const std::vector<MuonTarget> targets = check_targets(params, updates, averages, hyper, lr_scales);
  const DeviceGuard guard(hyper);
  dispatch_state("updates", first_type(updates), [&](auto tag) {
    muon_apply_cuda<decltype(tag)>(targets.data(), static_cast<int>(targets.size()),
                                   const_pointer<float>(hyper), current_stream());
  });
}

Tensor scratch_bytes(int64_t bytes, const Tensor& like) {
  return torch::stable::new_empty(like, {bytes}, kByte);
}

NsType ns_type(float) { return NsType::kFloat32; }
NsType ns_type(bf16) { return NsType::kBfloat16; }

// The banks, where all are to be iterated by the Hopper kernel, else nothing. Their X is written in place.
template <typename X>
std::vector<NsBank> hopper_banks(TensorList updates, const std::vector<NewtonSchulzShape>& shapes,
                                 int64_t algorithm) {
  std::vector<NsBank> list;
  if (algorithm == kNsStandard) return list;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (updates[i].numel() == 0) continue;
    list.push_back({nullptr, mutable_pointer<X>(updates[i]), ns_type(X{}), shapes[i].batch, shapes[i].rows,
                    shapes[i].cols});
  }
  const int count = static_cast<int>(list.size());
  const bool can_run = count > 0 && newton_schulz_sm90_can_run(list.data(), count);
  PGOLF_CHECK(can_run || count == 0 || algorithm != kNsGram, "muon_step: algorithm 'gram' needs a Hopper ",
              "GPU and banks with sides that are multiples of 8; use 'auto'");
  if (!can_run) list.clear();
  return list;
}

bool aligned(TensorList list) {
  return std::all_of(list.begin(), list.end(), [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  });
}

// The directions go straight to where the products of the Hopper kernel start.
template <typename G, typename M>
void direct_and_iterate(TensorList grads, TensorList momenta, const std::vector<NsBank>& hopper,
                        const NewtonSchulzShape& shape, const Tensor& hyper, MuonOptions options,
                        CUstream_st* stream) {
  std::vector<MuonPolarInput> inputs;
  for (size_t i = 0; i < static_cast<size_t>(grads.size()); ++i) {
    if (grads[i].numel() == 0) continue;
    inputs.push_back({grads[i].const_data_ptr(), momenta[i].mutable_data_ptr(), nullptr, grads[i].size(0),
                      grads[i].size(1), grads[i].size(2)});
  }
  const int count = static_cast<int>(hopper.size());
  const Tensor scratch = scratch_bytes(
      static_cast<int64_t>(newton_schulz_sm90_workspace(hopper.data(), count, shape.steps)), hyper);
  for (int first = 0, here = 0; first < count; first += here) {
    NsPrepared prepared{};
    here = newton_schulz_sm90_prepare(hopper.data() + first, count - first, shape.steps,
                                      scratch.mutable_data_ptr(), &prepared);
    for (int i = 0; i < here; ++i) inputs[static_cast<size_t>(first + i)].x = prepared.x[i];
    muon_direction_sm90<G, M>(inputs.data() + first, here, prepared, shape.eps, const_pointer<float>(hyper),
                              options, stream);
    newton_schulz_sm90_prepared(hopper.data() + first, here, shape.coefficients, shape.steps,
                                scratch.mutable_data_ptr(), stream);
  }
}

// The same of directions that are written out, where gradients or momenta are not aligned.
void iterate_hopper(const std::vector<MuonDirection>& directions, std::vector<NsBank>& hopper,
                    const NewtonSchulzShape& shape, const Tensor& hyper, CUstream_st* stream) {
  size_t next = 0;
  for (const MuonDirection& bank : directions) {
    if (bank.rows * bank.cols > 0) hopper[next++].in = bank.direction;
  }
  const int count = static_cast<int>(hopper.size());
  const Tensor scratch = scratch_bytes(
      static_cast<int64_t>(newton_schulz_sm90_workspace(hopper.data(), count, shape.steps)), hyper);
  newton_schulz_sm90(hopper.data(), count, shape.coefficients, shape.steps, shape.eps,
                     scratch.mutable_data_ptr(), stream);
}

void step_cuda(TensorList params, TensorList grads, TensorList momenta, TensorList updates,
               TensorList averages, const Tensor& hyper, Doubles lr_scales, Doubles coefficients,
               double eps, bool nesterov, bool lerp, bool row_normalize, int64_t algorithm) {
  const auto shapes = check_banks(grads, momenta, updates, hyper, coefficients, eps, algorithm);
  if (!params.empty()) check_targets(params, updates, averages, hyper, lr_scales);
  const DeviceGuard guard(hyper);
  const MuonOptions options{nesterov, lerp, row_normalize};
  dispatch_state("grads", first_type(grads), [&](auto g) {
    dispatch_state("momenta", first_type(momenta), [&](auto m) {
      dispatch_state("updates", first_type(updates), [&](auto x) {
        using G = decltype(g);
        using M = decltype(m);
        using X = decltype(x);
        const CUstream_st* stream = current_stream();
        std::vector<NsBank> hopper = hopper_banks<X>(updates, shapes, algorithm);
        if (!hopper.empty() && aligned(grads) && aligned(momenta)) {
          direct_and_iterate<G, M>(grads, momenta, hopper, shapes[0], hyper, options, stream);
          return;
        }
        const std::vector<int64_t> offsets = direction_offsets(updates);
        const Tensor scratch = torch::stable::new_empty(hyper, {offsets.back()}, first_type(updates));
        const auto banks = directions(grads, momenta, mutable_pointer<X>(scratch), offsets);
        muon_direction_cuda<G, M, X>(banks.data(), static_cast<int>(banks.size()),
                                     const_pointer<float>(hyper), options, stream);
        if (!hopper.empty()) {
          iterate_hopper(banks, hopper, shapes[0], hyper, stream);
          return;
        }
        for (size_t i = 0; i < shapes.size(); ++i) {
          const Tensor space = scratch_bytes(newton_schulz_workspace_bytes(shapes[i]), updates[i]);
          newton_schulz_cuda(static_cast<const X*>(banks[i].direction), mutable_pointer<X>(updates[i]),
                             space.mutable_data_ptr(), shapes[i], stream);
        }
      });
    });
  });
  if (!params.empty()) apply_cuda(params, updates, averages, hyper, lr_scales);
}
#endif

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "muon_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] updates, "
      "Tensor(d!)[] averages, Tensor hyper, float[] lr_scales, float[] coefficients, float eps, "
      "bool nesterov, bool lerp, bool row_normalize, int algorithm=0) -> ()");
  m.def(
      "muon_apply(Tensor(a!)[] params, Tensor[] updates, Tensor(b!)[] averages, Tensor hyper, "
      "float[] lr_scales) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("muon_step", TORCH_BOX(&pgolf::step_cpu));
  m.impl("muon_apply", TORCH_BOX(&pgolf::apply_cpu));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("muon_step", TORCH_BOX(&pgolf::step_cuda));
  m.impl("muon_apply", TORCH_BOX(&pgolf::apply_cuda));
}
#endif
