// Where the directions of a Muon step lie in its workspace, before they are iterated. Host code.
#pragma once

#include <vector>

#include "kernels/muon_step.h"

namespace pgolf {

inline int64_t element_count(const MuonBank& bank) { return bank.matrices * bank.rows * bank.cols; }

// Elements of a bank's directions, rounded up so that the next bank's are aligned as well as the workspace
// is.
inline int64_t direction_room(const MuonBank& bank) {
  constexpr int64_t kAlign = 64;
  return (element_count(bank) + kAlign - 1) / kAlign * kAlign;
}

// The directions of all banks, one after the other. X is float or bf16.
template <typename X>
int64_t direction_bytes(const MuonStep& step) {
  int64_t elements = 0;
  for (int i = 0; i < step.count; ++i) elements += direction_room(step.banks[i]);
  return elements * static_cast<int64_t>(sizeof(X));
}

template <typename X>
std::vector<MuonDirection> directions_in(const MuonStep& step, void* workspace) {
  std::vector<MuonDirection> directions;
  X* next = static_cast<X*>(workspace);
  for (int i = 0; i < step.count; ++i) {
    const MuonBank& bank = step.banks[i];
    directions.push_back({.grad = bank.grad,
                          .momentum = bank.momentum,
                          .direction = next,
                          .rows = bank.matrices * bank.rows,
                          .cols = bank.cols});
    next += direction_room(bank);
  }
  return directions;
}

inline NewtonSchulzShape iteration_of(const MuonStep& step, int bank) {
  NewtonSchulzShape shape = step.iteration;
  shape.batch = step.banks[bank].matrices;
  shape.rows = step.banks[bank].rows;
  shape.cols = step.banks[bank].cols;
  return shape;
}

}  // namespace pgolf
