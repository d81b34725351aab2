// What this CPU, and the operating system on it, can run. Each answer covers a whole kernel table.
#pragma once

namespace q4metal::cpu {

bool has_avx2();   // AVX2, FMA, F16C, BMI2
bool has_avx512(); // has_avx2, AVX-512 F, BW, DQ, VL, VNNI
bool has_amx();    // has_avx512, AVX-512 BF16 and VBMI, int8 and bf16 tiles, which Linux grants on
                   // request
bool has_neon();   // NEON with dot products: M1 and later, Neoverse N1 and later
bool has_i8mm();   // has_neon, 8-bit matrix products: M2 and later, Neoverse V1 and later

} // namespace q4metal::cpu
