// The kernels for AVX-512 with BF16 and AMX with BF16.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel.h"

#define MOE_BF16

namespace moe::cpu {
namespace {
#include "number.inc"

#include "vector_avx512.inc"

#include "kernel.inc"

#include "tiles_amx.inc"

#include "kernel_tiles.inc"

#include "experts_tiles.inc"
}  // namespace

const Kernels kAmxKernels =
    MOE_KERNELS(configure_tiles, release_tiles, attend_bf16, streams_out, lay_out_bf16, multiply_bf16);

}  // namespace moe::cpu
