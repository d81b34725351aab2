// Puts the kernels on tiles into a table; what amx.cpp and amx_emulated.cpp share.
#pragma once

#include "amx_gemm.h"
#include "amx_rows.h"

namespace q4metal::cpu {
namespace {

// What rows too few for tiles go to. int8 keeps its vectors: with one plane of x they are faster
// than tiles at any number of rows (12 to 14 GB/s of weights against 10 at 8 rows of K = 3584).
MatvecKernel few_rows;

constexpr MatvecKernel rows_kernel = {
    [](const PackedMatrix& w, int64_t rows) {
      return rows < kFewestTileRows ? few_rows.prepared_bytes(w, rows) : tile_rows_bytes(w, rows);
    },
    [](const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
      rows < kFewestTileRows ? few_rows.prepare(w, x, rows, prepared)
                             : prepare_tile_rows(w, x, rows, prepared);
    },
    [](const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
       int64_t end) {
      rows < kFewestTileRows ? few_rows.run(w, prepared, rows, y, begin, end)
                             : run_tile_rows(w, prepared, rows, y, begin, end);
    }};

KernelTable with_tiles(const KernelTable& base, const char* name) {
  few_rows = base.matvec(Precision::fast);
  KernelTable table = base;
  table.name = name;
  table.matvec_of[int(Precision::fast)] = rows_kernel;
  table.gemm_of[int(Precision::fast)] = {packed_x_bytes, pack_x, run_gemm};
  table.gemm_of[int(Precision::int8)] = {packed_x_bytes, pack_x, run_gemm};
  return table;
}

} // namespace
} // namespace q4metal::cpu
