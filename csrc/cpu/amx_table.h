// Puts the kernels on tiles into a table; what amx.cpp and amx_emulated.cpp share.
#pragma once

#include "amx_attention.h"
#include "amx_gemm.h"
#include "amx_rows.h"

namespace q4metal::cpu {
namespace {

// What rows too few for tiles go to.
MatvecKernel few_rows[kPrecisions];

template <Precision kPrecision>
constexpr MatvecKernel rows_kernel = {
    [](const PackedMatrix& w, int64_t rows) {
      return rows < kFewestTileRows ? few_rows[int(kPrecision)].prepared_bytes(w, rows)
                                    : TileMatvec<kPrecision>::prepared_bytes(w, rows);
    },
    [](const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
      rows < kFewestTileRows ? few_rows[int(kPrecision)].prepare(w, x, rows, prepared)
                             : TileMatvec<kPrecision>::prepare(w, x, rows, prepared);
    },
    [](const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
       int64_t end) {
      rows < kFewestTileRows ? few_rows[int(kPrecision)].run(w, prepared, rows, y, begin, end)
                             : TileMatvec<kPrecision>::run(w, prepared, rows, y, begin, end);
    }};

KernelTable with_tiles(const KernelTable& base, const char* name) {
  std::copy(base.matvec_of, base.matvec_of + kPrecisions, few_rows);
  KernelTable table = base;
  table.name = name;
  table.matvec_of[int(Precision::fast)] = rows_kernel<Precision::fast>;
  table.matvec_of[int(Precision::int8)] = rows_kernel<Precision::int8>;
  table.gemm_of[int(Precision::fast)] = {packed_x_bytes, pack_x, run_gemm, gemm_piece};
  table.gemm_of[int(Precision::int8)] = table.gemm_of[int(Precision::fast)];
  vector_attention_rows = base.vector.fast_attention_rows;
  table.vector.fast_attention_rows = attend_rows;
  return table;
}

} // namespace
} // namespace q4metal::cpu
