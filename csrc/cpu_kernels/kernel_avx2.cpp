// The kernels for AVX2, FMA and F16C.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace moe::cpu {
namespace {
#include "number.inc"

#include "vector_avx2.inc"

#include "kernel.inc"
}  // namespace

const Kernels kAvx2Kernels =
    MOE_KERNELS(do_nothing, do_nothing, attend<bf16>, streams_nothing, lay_out<bf16>, multiply<bf16>);

}  // namespace moe::cpu
