// The tensor face of kernels/softcap_ce.h, on CPU and CUDA tensors, for softcap_ce and linear_softcap_ce.
// Callers have checked shapes, made tensors contiguous and set the device.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "kernels/softcap_ce.h"
#include "ops/checks.h"

namespace pgolf {

// What every cross-entropy takes in addition to tensors.
struct SoftcapCeOptions {
  std::optional<double> cap;
  int64_t ignore_index;
  double z_loss;

  // Checks the values; `op` names the operator in messages.
  SoftcapCeShape shape(const char* op, int64_t rows, int64_t vocab) const {
    constexpr double kLargest = std::numeric_limits<float>::max();
    // The kernels divide by the cap in float32: below, 1 / cap would be infinite, above, a GPU's is 0.
    constexpr double kLeastCap = std::numeric_limits<float>::min(), kLargestCap = 0x1p126;
    PGOLF_CHECK_VALUE(!cap || (*cap >= kLeastCap && *cap <= kLargestCap), op,
                      ": cap must be finite and > 0, or None for no cap, got ", cap.value_or(0),
                      "; float32 divides by ", kLeastCap, " to ", kLargestCap);
    PGOLF_CHECK_VALUE(z_loss >= 0 && z_loss <= kLargest, op, ": z_loss must be finite and >= 0, got ",
                      z_loss);
    const float limit = cap ? static_cast<float>(*cap) : std::numeric_limits<float>::infinity();
    return {.rows = rows,
            .vocab = vocab,
            .cap = limit,
            .ignore_index = ignore_index,
            .z_loss = static_cast<float>(z_loss)};
  }
};

// Checks that `target` has one int64 for each row of `rows_of`, called `name`, on its device.
inline void check_target_tensor(const char* op, const char* name, const Tensor& rows_of,
                                const Tensor& target) {
  PGOLF_CHECK_VALUE(target.dim() == 1 && target.size(0) == rows_of.size(0), op, ": target must be (rows,)=(",
                    rows_of.size(0), ",), got ", target.sizes());
  PGOLF_CHECK_TYPE(target.scalar_type() == kLong, op, ": target must be int64, got ", target.scalar_type());
  PGOLF_CHECK_VALUE(target.device() == rows_of.device(), op, ": target must be on ", rows_of.device(), " as ",
                    name, " is, got ", target.device());
}

// Checks that every target is a token or ignore_index. Always on the CPU, where a bad one would be read out
// of bounds; on a GPU, where looking stalls the stream and the kernels answer NaN, only if asked.
inline void check_target_values(const char* op, const Tensor& target, const SoftcapCeShape& shape,
                                bool always) {
  if (!always && !target.is_cpu()) return;
  const Tensor host = target.is_cpu() ? target : torch::stable::to(target, torch::stable::Device("cpu"));
  const int64_t* data = const_pointer<int64_t>(host);
  const int64_t bad = softcap_ce_first_bad_row(data, shape);
  PGOLF_CHECK_VALUE(bad < 0, op, ": target must be in [0, vocab=", shape.vocab,
                    ") or ignore_index=", shape.ignore_index, ", got ", data[bad], " at row ", bad);
}

// Writes loss and lse, (rows,) float32.
void softcap_ce_forward(const Tensor& logits,  // (rows, vocab)
                        const Tensor& target,  // (rows,)
                        Tensor& loss, Tensor& lse, const SoftcapCeShape& shape);

// Writes the gradient of sum_i grad_loss_i loss_i.
void softcap_ce_backward(const Tensor& grad_loss,  // (rows,)
                         const Tensor& logits, const Tensor& target, const Tensor& loss, const Tensor& lse,
                         Tensor& grad, const SoftcapCeShape& shape);

// Writes all three in one pass; `grad` may be `logits`.
void softcap_ce_gradient(const Tensor& logits, const Tensor& target,
                         const Tensor& grad_loss,  // (rows,), or one number
                         Tensor& loss, Tensor& lse, Tensor& grad, const SoftcapCeShape& shape);

}  // namespace pgolf
