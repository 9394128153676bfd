// CPU kernel of gemm.h: packed panels and a register-blocked microkernel per instruction set.
//
// For each slice of kDepth along k, A is packed once into blocks of `Rows` rows; each strip of columns of B
// is packed (depth x columns, at most 32 KB, so that it stays in L1) and every row block of A runs against
// it.
#include <algorithm>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/isa.h"
#include "kernels/parallel.h"

namespace pgolf {
namespace {

constexpr int64_t kDepth = 256;

// Register tile of one instruction set: Rows x (Vectors * Width) accumulators.
template <int Rows_, int Vectors_, int Width_>
struct Tile {
  static constexpr int kRows = Rows_;
  static constexpr int kVectors = Vectors_;
  static constexpr int kWidth = Width_;
  static constexpr int kColumns = Vectors_ * Width_;
  typedef float Vector __attribute__((vector_size(Width_ * 4)));
  typedef float Unaligned __attribute__((vector_size(Width_ * 4), aligned(4), may_alias));
};
using TileAvx512 = Tile<12, 2, 16>;  // 24 of 32 registers accumulate
using TileAvx2 = Tile<6, 2, 8>;      // 12 of 16
using TileBaseline = Tile<4, 2, 4>;  // 8 of 16
constexpr int64_t kMaxTile = TileAvx512::kRows * TileAvx512::kColumns;

// tile[i][j] = sum_p a[p][i] * b[p][j] over packed panels.
template <typename Tile>
[[gnu::always_inline]] inline void microkernel(const float* a, const float* b, int64_t depth, float* tile) {
  using Vector = typename Tile::Vector;
  using Unaligned = typename Tile::Unaligned;
  Vector sum[Tile::kRows][Tile::kVectors] = {};
  for (int64_t p = 0; p < depth; ++p, a += Tile::kRows, b += Tile::kColumns) {
    Vector column[Tile::kVectors];
    for (int v = 0; v < Tile::kVectors; ++v)
      column[v] = *reinterpret_cast<const Unaligned*>(b + v * Tile::kWidth);
    for (int i = 0; i < Tile::kRows; ++i) {
      for (int v = 0; v < Tile::kVectors; ++v) sum[i][v] += a[i] * column[v];
    }
  }
  for (int i = 0; i < Tile::kRows; ++i) {
    for (int v = 0; v < Tile::kVectors; ++v) {
      *reinterpret_cast<Unaligned*>(tile + i * Tile::kColumns + v * Tile::kWidth) = sum[i][v];
    }
  }
}

PGOLF_TARGET("avx512f,avx512dq,fma")
void microkernel_avx512(const float* a, const float* b, int64_t depth, float* tile) {
  microkernel<TileAvx512>(a, b, depth, tile);
}

PGOLF_TARGET("avx2,fma")
void microkernel_avx2(const float* a, const float* b, int64_t depth, float* tile) {
  microkernel<TileAvx2>(a, b, depth, tile);
}

void microkernel_baseline(const float* a, const float* b, int64_t depth, float* tile) {
  microkernel<TileBaseline>(a, b, depth, tile);
}

struct Kernel {
  void (*run)(const float* a, const float* b, int64_t depth, float* tile);
  int64_t rows;
  int64_t columns;
};

Kernel pick_kernel() {
  switch (best_isa()) {
    case Isa::kAvx512:
      return {microkernel_avx512, TileAvx512::kRows, TileAvx512::kColumns};
    case Isa::kAvx2:
      return {microkernel_avx2, TileAvx2::kRows, TileAvx2::kColumns};
    default:
      return {microkernel_baseline, TileBaseline::kRows, TileBaseline::kColumns};
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// packed[block][p][i] = a[block * rows + i][first + p]; rows past the end are zero.
void pack_a(const GemmArgs& g, int64_t first, int64_t depth, int64_t rows, float* packed) {
  for (int64_t i0 = 0; i0 < g.m; i0 += rows, packed += rows * depth) {
    for (int64_t i = 0; i < rows; ++i) {
      const bool inside = i0 + i < g.m;
      const float* source = g.a + (inside ? i0 + i : 0) * g.a_stride + first;
      for (int64_t p = 0; p < depth; ++p) packed[p * rows + i] = inside ? source[p] : 0.0f;
    }
  }
}

// packed[p][j] = b[first + p][j0 + j]; columns past the end are zero.
void pack_b(const GemmArgs& g, int64_t first, int64_t depth, int64_t j0, int64_t columns, float* packed) {
  const int64_t valid = std::min(columns, g.n - j0);
  std::fill(packed, packed + depth * columns, 0.0f);
  const float* source = g.b + first * g.b_row_stride + j0 * g.b_col_stride;
  if (g.b_col_stride == 1) {
    for (int64_t p = 0; p < depth; ++p) std::copy_n(source + p * g.b_row_stride, valid, packed + p * columns);
    return;
  }
  for (int64_t j = 0; j < valid; ++j) {
    for (int64_t p = 0; p < depth; ++p)
      packed[p * columns + j] = source[p * g.b_row_stride + j * g.b_col_stride];
  }
}

// Adds one tile to C; the first slice of k also brings in beta * D.
void store_tile(const GemmArgs& g, const float* tile, int64_t i0, int64_t j0, const Kernel& kernel,
                bool first) {
  const int64_t rows = std::min(kernel.rows, g.m - i0);
  const int64_t columns = std::min(kernel.columns, g.n - j0);
  for (int64_t i = 0; i < rows; ++i, tile += kernel.columns) {
    float* c = g.c + (i0 + i) * g.n + j0;
    const float* d = g.beta != 0.0f ? g.d + (i0 + i) * g.n + j0 : nullptr;
    if (!first) {
      for (int64_t j = 0; j < columns; ++j) c[j] += g.alpha * tile[j];
    } else if (d) {
      for (int64_t j = 0; j < columns; ++j) c[j] = g.alpha * tile[j] + g.beta * d[j];
    } else {
      for (int64_t j = 0; j < columns; ++j) c[j] = g.alpha * tile[j];
    }
  }
}

void run_strips(const GemmArgs& g, const Kernel& kernel, const float* packed_a, int64_t first, int64_t depth,
                int64_t strip_begin, int64_t strip_end) {
  std::vector<float> packed_b(static_cast<size_t>(depth * kernel.columns));
  float tile[kMaxTile];
  for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
    const int64_t j0 = strip * kernel.columns;
    pack_b(g, first, depth, j0, kernel.columns, packed_b.data());
    for (int64_t i0 = 0; i0 < g.m; i0 += kernel.rows) {
      if (g.symmetric && j0 + kernel.columns <= i0)
        break;  // wholly below the diagonal, as is all that follows
      kernel.run(packed_a + i0 * depth, packed_b.data(), depth, tile);
      store_tile(g, tile, i0, j0, kernel, first == 0);
    }
  }
}

}  // namespace

void gemm_cpu(const GemmArgs& args, int threads) {
  const Kernel kernel = pick_kernel();
  const int64_t strips = ceil_div(args.n, kernel.columns);
  std::vector<float> packed_a(static_cast<size_t>(ceil_div(args.m, kernel.rows) * kernel.rows * kDepth));
  for (int64_t first = 0; first < args.k; first += kDepth) {
    const int64_t depth = std::min(kDepth, args.k - first);
    pack_a(args, first, depth, kernel.rows, packed_a.data());
    // A strip must carry about a million multiply-adds before a thread pays.
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 20) / (args.m * depth * kernel.columns));
    parallel_for(strips, grain, threads, [&](int64_t begin, int64_t end) {
      run_strips(args, kernel, packed_a.data(), first, depth, begin, end);
    });
  }
  if (!args.symmetric) return;
  for (int64_t i = 1; i < args.m; ++i) {
    for (int64_t j = 0; j < i; ++j) args.c[i * args.n + j] = args.c[j * args.n + i];
  }
}

}  // namespace pgolf
