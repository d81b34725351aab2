// The kernels on tile registers with the tiles emulated, for any CPU.
#define Q4_AMX_TILES 0
#define Q4_AMX_AVX512 0
#include "amx.h"
#include "amx_table.h"

namespace q4metal::cpu {

KernelTable amx_emulated_table(const KernelTable& base) { return with_tiles(base, "amx-emulated"); }

} // namespace q4metal::cpu
