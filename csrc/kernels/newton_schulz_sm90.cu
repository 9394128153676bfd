// Launches of newton_schulz_sm90.h: two kernels that normalise, then one that runs every product.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels/cuda_check.cuh"
#include "kernels/newton_schulz_sm90_products.cuh"
#include "kernels/newton_schulz_sm90_scale.cuh"

namespace pgolf {
namespace {

using namespace ns90;

using EncodeFunction = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                    CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill);

EncodeFunction encode_function() {
  static const EncodeFunction function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    PGOLF_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                                      cudaEnableDefault, &result));
    if (symbol == nullptr)
      throw std::runtime_error("newton_schulz: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeFunction>(symbol);
  }();
  return function;
}

CUtensorMap tensor_map(const Place& place, int64_t batch) {
  const cuuint64_t size[3] = {static_cast<cuuint64_t>(place.cols), static_cast<cuuint64_t>(place.rows),
                              static_cast<cuuint64_t>(batch)};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(2 * place.cols),
                                static_cast<cuuint64_t>(2 * place.batch)};
  const cuuint32_t box[3] = {kBox, kBox, 1}, step[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode_function()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, place.first, size, stride, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("newton_schulz: cuTensorMapEncodeTiled failed");
  return map;
}

int multiprocessor_count() {
  int device = 0, count = 0;
  PGOLF_CUDA_CHECK(cudaGetDevice(&device));
  PGOLF_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// How many of the banks one launch takes.
int banks_of_launch(const NsBank* banks, int count, int steps) {
  int here = 0, products = 0;
  while (here < std::min(count, kMaxBanks) && products + product_count(banks[here], steps) <= kMaxProducts) {
    products += product_count(banks[here++], steps);
  }
  return here;
}

// Long tasks reuse an operand; many tasks fill the device.
Tuning tune(const NsBank* banks, int count, int multiprocessors) {
  int64_t panels = 0, tiles = 0;
  for (int i = 0; i < count; ++i) {
    panels += banks[i].batch * tiles_of(std::min(banks[i].rows, banks[i].cols), kTile);
    tiles += banks[i].batch * tiles_of(banks[i].rows, kTile) * tiles_of(banks[i].cols, kTile);
  }
  Tuning tuning{};
  tuning.small_chunk = panels >= multiprocessors ? 4 : 1;
  tuning.update_chunk = tiles >= 8 * multiprocessors ? 4 : 1;
  tuning.spread = panels < multiprocessors;
  return tuning;
}

void launch_products(const Plan& plan, int first, int last, int queue, int multiprocessors,
                     cudaStream_t stream) {
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(products_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int blocks = std::min(last - first, multiprocessors);
  products_kernel<<<blocks, kThreads, kSharedBytes, stream>>>(plan, first, last, queue);
  PGOLF_LAUNCH_CHECK();
}

void run_banks(const NsBank* banks, int count, const float (*table)[3], int steps, bool normalize, float eps,
               unsigned char* workspace, const Tuning& tuning, int multiprocessors, cudaStream_t stream) {
  Plan plan{};
  CastPlan cast{};
  std::vector<Ranked> order;
  size_t at = words_bytes(banks, count);
  int matrices = 0, blocks = 0;
  for (int i = 0; i < count; ++i) {
    const NsBank& bank = banks[i];
    const BankSpace space(bank, steps, at);
    at = space.end;
    const int first_map = i * kMapsPerBank;
    for (int buffer = 0; buffer < kMapsPerBank; ++buffer) {
      const bool square = buffer >= kSquaresOut && buffer < kFactor;
      const int64_t fitting = std::max(bank.rows, bank.cols) / std::min(bank.rows, bank.cols);
      if (square && (buffer - kSquaresOut) % 3 >= fitting) continue;  // no product names it
      plan.maps[first_map + buffer] = tensor_map(place_of(bank, workspace, space, buffer), bank.batch);
    }
    Chain chain(bank, workspace, space, first_map, matrices, tuning);
    for (const Ranked& ranked : chain.run(table, steps)) order.push_back(ranked);
    const Buffer start = Chain::x_buffer(segment_count(bank, steps));
    cast.banks[i] = {bank.in,
                     place_of(bank, workspace, space, start).first,
                     bank.type,
                     bank.rows * bank.cols,
                     static_cast<int>(chunks_of(bank)),
                     blocks,
                     matrices};
    blocks += static_cast<int>(bank.batch * chunks_of(bank));
    matrices += static_cast<int>(bank.batch);
  }
  auto* words = reinterpret_cast<uint32_t*>(workspace);
  cast.bank_count = count;
  cast.partials = reinterpret_cast<float*>(words);
  cast.sigma = reinterpret_cast<float*>(words + 3 * static_cast<size_t>(blocks));
  cast.clear = words + 3 * static_cast<size_t>(blocks) + matrices;
  cast.clear_count = matrices + kMaxProducts;
  cast.normalize = normalize;
  cast.eps = eps;
  plan.sigma = cast.sigma;
  plan.done = cast.clear;
  plan.queue = cast.clear + matrices;

  std::stable_sort(order.begin(), order.end(), [&](const Ranked& a, const Ranked& b) {
    return tuning.grouped ? a.rank < b.rank : a.progress < b.progress;
  });
  int tasks = 0;
  for (const Ranked& ranked : order) {
    Product& product = plan.products[plan.product_count++];
    product = ranked.product;
    product.first_task = tasks;
    tasks += static_cast<int>(ranked.batch) * product.tasks;
  }
  if (normalize) {
    squares_kernel<<<blocks, kCastThreads, 0, stream>>>(cast);
    PGOLF_LAUNCH_CHECK();
  }
  cast_kernel<<<blocks, kCastThreads, 0, stream>>>(cast);
  PGOLF_LAUNCH_CHECK();
  if (!tuning.grouped) {
    launch_products(plan, 0, tasks, 0, multiprocessors, stream);
    return;
  }
  for (int first = 0, queue = 0; first < plan.product_count; ++queue) {
    int last = first;
    while (last < plan.product_count && order[last].rank == order[first].rank) ++last;
    const int end = last < plan.product_count ? plan.products[last].first_task : tasks;
    launch_products(plan, plan.products[first].first_task, end, queue, multiprocessors, stream);
    first = last;
  }
}

}  // namespace

bool newton_schulz_sm90_can_run(const NsBank* banks, int count) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (major != 9) return false;
  for (int i = 0; i < count; ++i) {
    const NsBank& bank = banks[i];
    if (bank.batch < 1 || bank.rows < 8 || bank.cols < 8 || bank.rows % 8 != 0 || bank.cols % 8 != 0)
      return false;
    if (bank.batch >= (1 << 20) || bank.rows > (1 << 16) || bank.cols > (1 << 16)) return false;
    if (bank.batch * chunks_of(bank) >= (1 << 24)) return false;
    if (reinterpret_cast<uintptr_t>(bank.in) % 16 != 0 || reinterpret_cast<uintptr_t>(bank.out) % 16 != 0)
      return false;
  }
  return true;
}

size_t newton_schulz_sm90_workspace(const NsBank* banks, int count, int steps) {
  size_t most = 0;
  for (int first = 0, here = 0; first < count; first += here) {
    here = banks_of_launch(banks + first, count - first, steps);
    size_t at = words_bytes(banks + first, here);
    for (int i = 0; i < here; ++i) at = BankSpace(banks[first + i], steps, at).end;
    most = std::max(most, at);
  }
  return most;
}

void newton_schulz_sm90(const NsBank* banks, int count, const float (*coefficients)[3], int steps,
                        bool normalize, float eps, void* workspace, CUstream_st* stream) {
  const int multiprocessors = multiprocessor_count();
  for (int first = 0, here = 0; first < count; first += here) {
    here = banks_of_launch(banks + first, count - first, steps);
    run_banks(banks + first, here, coefficients, steps, normalize, eps,
              static_cast<unsigned char*>(workspace), tune(banks + first, here, multiprocessors),
              multiprocessors, stream);
  }
}

}  // namespace pgolf
