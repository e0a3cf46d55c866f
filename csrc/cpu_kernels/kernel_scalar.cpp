// The kernels for any CPU.

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace moe::cpu {
namespace {
#include "number.inc"

#include "vector_scalar.inc"

#include "kernel.inc"
}  // namespace

const Kernels kScalarKernels =
    MOE_KERNELS(do_nothing, do_nothing, attend<bf16>, streams_nothing, lay_out<bf16>, multiply<bf16>);

}  // namespace moe::cpu
