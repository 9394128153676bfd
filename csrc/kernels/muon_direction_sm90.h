// The first half of a Muon step for Hopper: the directions of muon_step.h, written as what the products of
// newton_schulz_sm90 start from.
#pragma once

#include "kernels/muon_step.h"
#include "kernels/newton_schulz_sm90.h"

namespace pgolf {

struct MuonPolarInput {
  const void* grad;              // (matrices, rows, cols) row-major, G
  void* momentum;                // the same shape, M, in place
  void* x;                       // the same shape, float16: a place that newton_schulz_sm90_prepare named
  int64_t matrices, rows, cols;  // cols a multiple of 8; pointers aligned to 16 bytes
};

// Directions that were not rounded before, as float16 times a power of two 2^e that brings each matrix's norm
// near [16, 32), and prepared.sigma = 1 / ((norm + eps) 2^e). At most kNsMaxBanks banks.
template <typename G, typename M>
void muon_direction_sm90(const MuonPolarInput* banks, int count, const NsPrepared& prepared, float eps,
                         const float* hyper,  // (kHyperCount,), on the device
                         MuonOptions options, CUstream_st* stream);

}  // namespace pgolf
