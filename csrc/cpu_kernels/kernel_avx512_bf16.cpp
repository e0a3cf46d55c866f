// The kernels for AVX-512 with BF16.

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
}  // namespace

const Kernels kAvx512Bf16Kernels =
    MOE_KERNELS(do_nothing, do_nothing, attend<bf16>, streams_nothing, lay_out<bf16>, multiply<bf16>);

}  // namespace moe::cpu
