// The coder of kernels/range_coder.h on its own, and rounding along a trellis, behind a C interface: for
// programs that have no compiled pgolf and compile it themselves. csrc/alone/make.py writes it, with what it
// includes, as one small file; with PGOLF_DECODER_ONLY, which that defines, there is the decoder only.
#include "kernels/range_coder_cpu.cpp"

#ifndef PGOLF_DECODER_ONLY
struct CUstream_st;  // of the declarations for CUDA in kernels/trellis.h, which nothing here uses
#include "kernels/trellis_cpu.cpp"
#endif  // PGOLF_DECODER_ONLY

// Returns nullptr, or what is wrong with the stream. Arguments as of decode_codes_cpu.
extern "C" const char* decode(const uint8_t* data, int64_t size, const int8_t* pool, int8_t* codes,
                              int64_t rows, int64_t cols, int64_t pool_rows) {
  try {
    return pgolf::decode_codes_cpu(data, size, pool, codes, {rows, cols, pool_rows});
  } catch (...) {  // a C interface throws nothing; only memory can run out
    return "there is not enough memory";
  }
}

#ifndef PGOLF_DECODER_ONLY
// Fills in the stream, at most rows * cols + 1 bytes, and returns its length; -1 if memory runs out.
extern "C" int64_t encode(const int8_t* codes, const int8_t* pool, uint8_t* stream, int64_t rows,
                          int64_t cols, int64_t pool_rows, int fast) {
  try {
    const auto found = pgolf::encode_codes_cpu(codes, pool, {rows, cols, pool_rows}, fast != 0);
    std::copy(found.begin(), found.end(), stream);
    return static_cast<int64_t>(found.size());
  } catch (...) {
    return -1;
  }
}

// Arguments as of trellis_round_cpu.
extern "C" void trellis(const float* x, float* value, int64_t rows, int64_t n, int threads) {
  pgolf::trellis_round_cpu(x, value, rows, n, threads);
}
#endif  // PGOLF_DECODER_ONLY
