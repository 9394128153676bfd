// Hopper kernel of linear_softcap_ce.h: x = hidden weight^T, a product of product_sm90.cuh with the
// soft-capped exponential in the epilogue.
//
// Where a row block of `hidden` stays in shared memory, the epilogue takes longer than the product, and two
// warpgroups share a tile. For large widths tiles are 128 x 192. They read less per product, which at the
// power limit leaves a higher clock rate (docs/findings.md, 2026-11-24), and their accumulators fill a
// warpgroup's registers.
#include <cuda.h>

#include "kernels/linear_softcap_ce.h"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/product_sm90.cuh"

namespace pgolf {
namespace {

using product::kDepth;
using product::kMaxSlices;
using product::kWideColumns;
using product::Place;

constexpr int kTileColumns = product::kTile;
constexpr float kMinCap = 1e-6f;
constexpr float kMaxCap = 40.0f;  // exp(-80) = 1.8e-35

struct KernelArgs : epilogue::Args {
  const int64_t* target;
  int64_t ignore_index;
  int row_tiles, slices;  // of the product's schedule, as are rows and column_tiles
};

// The target's column, or one of epilogue's kInvalidTarget and kIgnoredTarget, whose logits are written here.
__device__ __forceinline__ int load_target(const KernelArgs& args, int row) {
  if (row >= args.rows) return epilogue::kIgnoredTarget;
  const int64_t label = args.target[row];
  if (label != args.ignore_index && label >= 0 && label < args.vocab) return static_cast<int>(label);
  const bool ignored = label == args.ignore_index;
  args.target_logit[row] = ignored ? 0.0f : __int_as_float(0x7fffffff);
  return ignored ? epilogue::kIgnoredTarget : epilogue::kInvalidTarget;
}

template <typename F, bool Factor>
struct CeEpilogue {
  using Form = F;
  using Args = KernelArgs;
  struct Config {
    static constexpr int kColumns = F::kColumns;
    static constexpr bool kPermuted = F::kPermuted, kFactor = Factor;
  };
  using Row = epilogue::Row<Config>;
  static constexpr int kRows = 2 * F::kFragments;
  int target[kRows];  // of rows +0, +8, +64, +72
  uint32_t own;       // one byte per row

  __device__ __forceinline__ void fetch(const Args& args, const Place& place) {
    if (place.new_rows) {
      PGOLF_UNROLL
      for (int r = 0; r < kRows; ++r) target[r] = load_target(args, place.row + r / 2 * 64 + r % 2 * 8);
    }
    own = 0;
    PGOLF_UNROLL
    for (int r = 0; r < kRows; ++r) own |= Row::own_column(target[r], place.column_tile) << 8 * r;
  }

  __device__ __forceinline__ void finish(const Args& args, const float (&c)[F::kFragments][F::kAccumulators],
                                         const Place& place) const {
    PGOLF_UNROLL
    for (int f = 0; f < F::kFragments; ++f) {
      finish_row<0>(args, c[f], own >> 16 * f, place.row + 64 * f, place.column_tile);
      finish_row<1>(args, c[f], own >> (16 * f + 8), place.row + 64 * f + 8, place.column_tile);
    }
  }

  // One of the two rows that this thread holds of 64.
  template <int Half>
  __device__ __forceinline__ static void finish_row(const Args& args, const float (&c)[F::kAccumulators],
                                                    uint32_t own, int row, int column_tile) {
    float value[F::kColumns / 4];
    PGOLF_UNROLL
    for (int i = 0; i < F::kColumns / 4; ++i) value[i] = c[i / 2 * 4 + Half * 2 + i % 2];
    Row{.args = args, .value = value, .row = row, .column_tile = column_tile, .t = lane_index() % 4}.run(
        own & 255u);
  }
};

template <int Columns, int Parts, bool Resident, bool Permuted>
void launch(const LinearSoftcapCeForward& in, const LinearSoftcapCeShape& shape, cudaStream_t stream) {
  using Form = product::Form<Columns, Parts, Resident, Permuted>;
  const double cap = shape.cap;
  KernelArgs args{};
  args.target = in.target;
  args.factor = in.factor;
  args.factor_ld = static_cast<int>(in.factor_ld);
  args.partial_sums = in.partial_sums;
  args.target_logit = in.target_logit;
  args.ignore_index = shape.ignore_index;
  args.vocab = static_cast<int>(shape.vocab);
  args.rate = static_cast<float>(2.0 * epilogue::kLog2e / cap);
  args.slope = static_cast<float>(-2.0 * epilogue::kLog2e * cap);
  const product::Operands operands{.left = in.hidden,
                                   .right = in.weight,
                                   .rows = shape.rows,
                                   .columns = shape.vocab,
                                   .depth = shape.width};
  if (in.factor != nullptr) {
    product::launch<CeEpilogue<Form, true>>(operands, args, stream);
  } else {
    product::launch<CeEpilogue<Form, false>>(operands, args, stream);
  }
}

enum class Form { kResident, kNarrow, kWide, kPlain };

Form choose(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kResidentWeightBytes = 24 << 20;  // half of the L2: all clusters walk it out of step
  if (shape.vocab % 32 != 0) return Form::kPlain;
  const bool resident = shape.width <= kMaxSlices * kDepth && shape.vocab >= 4 * kTileColumns &&
                        shape.vocab * shape.width * 2 <= kResidentWeightBytes;
  if (resident) return Form::kResident;
  // Width 768: 4.32 ms narrow, 4.47 wide; 4096: 15.2 and 12.2 (results/20261124_*_kernels). Between, what is
  // longer in a wide tile, the product or the epilogue: they meet near 1024.
  constexpr int64_t kWideWidth = 2048;
  return shape.width < kWideWidth ? Form::kNarrow : Form::kWide;
}

}  // namespace

bool linear_softcap_ce_sm90_supports(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kMaxRows = int64_t{1} << 30, kMaxVocab = int64_t{1} << 30;
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // of 128 x 128; their indices have 32 bits
  return shape.width % 8 == 0 && shape.width > 0 && shape.vocab < kMaxVocab && shape.rows < kMaxRows &&
         (shape.rows / 128 + 2) * (shape.vocab / 128 + 1) < kMaxTiles && shape.cap >= kMinCap &&
         shape.cap <= kMaxCap && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

int64_t linear_softcap_ce_sm90_tiles(const LinearSoftcapCeShape& shape) {
  const int64_t columns = choose(shape) == Form::kWide ? kWideColumns : kTileColumns;
  return (shape.vocab + columns - 1) / columns;
}

void linear_softcap_ce_forward_sm90(const LinearSoftcapCeForward& args, const LinearSoftcapCeShape& shape,
                                    CUstream_st* stream) {
  if (shape.rows == 0) return;
  // One kernel template in four sizes; see product::Form.
  switch (choose(shape)) {
    case Form::kResident:
      return launch<kTileColumns, 2, true, true>(args, shape, stream);
    case Form::kNarrow:
      return launch<kTileColumns, 1, false, true>(args, shape, stream);
    case Form::kWide:
      return launch<kWideColumns, 1, false, true>(args, shape, stream);
    case Form::kPlain:
      return launch<kTileColumns, 2, false, false>(args, shape, stream);
  }
}

}  // namespace pgolf
