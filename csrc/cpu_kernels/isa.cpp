// Which kernels this CPU can run.

#include "isa.h"

#include <stdexcept>

#if defined(MOE_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe::cpu {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512_bf16",
                                         "amx",    "amx_emulated"};

#if defined(MOE_X86)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // zeros if the CPU has no such leaf
  return r;
}

// Register files that the operating system saves: bit 2 for YMM, bits 5 to 7 for AVX-512, 17 and 18 for AMX.
unsigned saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(unsigned reg, std::initializer_list<int> bits) {
  for (const int bit : bits)
    if (!(reg >> bit & 1u)) return false;
  return true;
}

// Linux lets a process use tiles only once it has asked for them. It refuses where a signal stack is too small to save
// them on.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int level_of_this_cpu() {
  const Registers basic = cpuid(1, 0), more = cpuid(7, 0), most = cpuid(7, 1);
  if (!has(basic.c, {27}) || (saved_state() & 0x06) != 0x06) return 0;  // OSXSAVE; XMM and YMM
  if (!has(basic.c, {12, 28, 29}) || !has(more.b, {5})) return 0;        // FMA, AVX, F16C; AVX2
  if ((saved_state() & 0xe0) != 0xe0 || !has(more.b, {16, 30, 31})) return 1;  // F, BW, VL
  if (!has(most.a, {5})) return 2;                                             // BF16
  if ((saved_state() & 0x60000) != 0x60000 || !has(more.d, {22, 24})) return 3;  // AMX-BF16, AMX-TILE
  return may_use_tiles() ? 4 : 3;
}

#else

int level_of_this_cpu() { return 0; }

#endif

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  static const int level = level_of_this_cpu();
  for (int i = 0; i <= level; ++i) isas.push_back(static_cast<Isa>(i));
  return isas;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
  if (name == isa_name(Isa::amx_emulated)) return Isa::amx_emulated;
  std::string known;
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    known += known.empty() ? "" : ", ";
    known += isa_name(isa);
  }
  throw std::invalid_argument("no kernels for instruction set '" + name + "' on this CPU; available: " + known);
}

const Kernels& kernels_of(Isa isa) {
#if defined(MOE_X86)
  switch (isa) {
    case Isa::avx2: return kAvx2Kernels;
    case Isa::avx512: return kAvx512Kernels;
    case Isa::avx512_bf16: return kAvx512Bf16Kernels;
    case Isa::amx: return kAmxKernels;
    case Isa::amx_emulated:
    case Isa::scalar: break;
  }
#endif
  return isa == Isa::amx_emulated ? kAmxEmulatedKernels : kScalarKernels;
}

}  // namespace moe::cpu
