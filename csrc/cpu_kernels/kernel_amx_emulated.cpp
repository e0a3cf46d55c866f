// The kernels of AMX as a CPU without it can run them, for tests.

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace moe::cpu {
namespace {
#include "number.inc"

#include "vector_scalar.inc"

#include "kernel.inc"

#include "tiles_emulated.inc"

#include "kernel_tiles.inc"

#include "experts_tiles.inc"
}  // namespace

const Kernels kAmxEmulatedKernels =
    MOE_KERNELS(configure_tiles, release_tiles, attend_bf16, streams_out, lay_out_bf16, multiply_bf16);

}  // namespace moe::cpu
