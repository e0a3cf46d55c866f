// The kernels for AVX-512 F, BW and VL.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace moe::cpu {
namespace {
#include "number.inc"

#include "vector_avx512.inc"

#include "kernel.inc"
}  // namespace

const Kernels kAvx512Kernels =
    MOE_KERNELS(do_nothing, do_nothing, attend<bf16>, streams_nothing, lay_out<bf16>, multiply<bf16>);

}  // namespace moe::cpu
